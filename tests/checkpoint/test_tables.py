"""The tables of names against the models, against diffusers and transformers, and against the release's numbers."""

import dataclasses
import math

import numpy as np
import pytest

from wan_jax.checkpoint.components import check_against_model, check_table
from wan_jax.checkpoint.tables import expanded_table
from wan_jax.checkpoint.tables.denoiser import denoiser_table
from wan_jax.checkpoint.tables.text_encoder import text_encoder_table
from wan_jax.checkpoint.tables.vae import vae_table
from wan_jax.config import DenoiserConfig, ImageEncoderConfig, TextEncoderConfig, VAEConfig
from wan_jax.presets import PRESETS, WAN22_VAE

DENOISERS = (
    DenoiserConfig(num_layers=2, dim=60, num_heads=3, ffn_dim=52, text_dim=28, freq_dim=64),
    DenoiserConfig(num_layers=1, dim=24, num_heads=2, ffn_dim=40, in_channels=5, out_channels=7, patch_size=(2, 1, 3)),
    DenoiserConfig(num_layers=2, dim=24, num_heads=2, ffn_dim=40, in_channels=36, image_dim=22),
    DenoiserConfig(num_layers=1, dim=24, num_heads=2, ffn_dim=40, image_dim=22, image_position_length=10),
)
IMAGE_ENCODER = ImageEncoderConfig(image_size=21, patch_size=7, dim=22, num_layers=2, num_heads=2, ffn_dim=36)
TEXT_ENCODER = TextEncoderConfig(vocab_size=67, dim=28, num_layers=2, num_heads=5, head_dim=6, ffn_dim=44)
VAES = (
    VAEConfig(base_dim=6),
    VAEConfig(base_dim=4, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(True,)),
    VAEConfig(base_dim=4, dim_mult=(2, 1, 3, 1, 2), num_res_blocks=3, temporal_downsample=(True, False, True, False)),
    VAEConfig(base_dim=4, decoder_base_dim=6, patch_size=2, residual=True),
    VAEConfig(base_dim=2, dim_mult=(2, 4, 2), num_res_blocks=1, temporal_downsample=(True, False), residual=True),
)
MODELS = (*DENOISERS, TEXT_ENCODER, *VAES, IMAGE_ENCODER)


@pytest.mark.parametrize("config", MODELS)
def test_names_and_shapes_are_the_models(config):
    check_against_model(config)


def test_a_table_that_differs_from_the_model_is_found():
    config = dataclasses.replace(TEXT_ENCODER, num_layers=3)
    rows = text_encoder_table(config)
    with pytest.raises(ValueError, match=r"1 names or shapes differ .* final_norm\.scale"):
        check_table(rows[:-1], config)


@pytest.mark.parametrize("config", MODELS)
@pytest.mark.parametrize("naming", ["wan_jax", "official", "diffusers"])
def test_names_are_unique(config, naming):
    names = [mapping.stored_name(naming) for mapping in expanded_table(config)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("config", "tensors", "parameters"),
    [
        (PRESETS["t2v-a14b"].denoiser, 1095, 14_288_491_584),
        (PRESETS["t2v-1.3b"].denoiser, 825, 1_418_996_800),
        (PRESETS["i2v-a14b"].denoiser, 1095, 14_288_901_184),
        (PRESETS["ti2v-5b"].denoiser, 825, 4_999_787_712),
        (PRESETS["i2v-14b-480p"].denoiser, 1095 + 208, 16_394_878_784),
        (PRESETS["flf2v-14b-720p"].denoiser, 1095 + 209, 16_395_536_704),
        (TextEncoderConfig(), 242, 5_680_910_336),
        (VAEConfig(), 194, 126_892_531),
        (WAN22_VAE, 196, 704_688_668),
        (ImageEncoderConfig(), 519, 630_766_080),
    ],
)
def test_counts_of_the_release(config, tensors, parameters):
    rows = expanded_table(config)
    assert len(rows) == tensors
    assert sum(mapping.size for mapping in rows) == parameters
    assert sum(math.prod(mapping.shape) for mapping in rows) == parameters


def test_official_vae_indices_of_the_release():
    official = {mapping.names.official: mapping.name for mapping in vae_table(VAEConfig())}
    expected = {
        "encoder.downsamples.1.residual.6.weight": "encoder.stages.0.blocks.1.conv_2.kernel",
        "encoder.downsamples.2.resample.1.weight": "encoder.stages.0.downsample.conv.kernel",
        "encoder.downsamples.3.shortcut.weight": "encoder.stages.1.blocks.0.shortcut.kernel",
        "encoder.downsamples.5.time_conv.bias": "encoder.stages.1.downsample.time_conv.bias",
        "encoder.downsamples.10.residual.0.gamma": "encoder.stages.3.blocks.1.norm_1.scale",
        "encoder.middle.1.to_qkv.weight": "encoder.middle.attention.qkv.kernel",
        "encoder.head.0.gamma": "encoder.norm_out.scale",
        "conv1.weight": "quant_conv.kernel",
        "conv2.bias": "post_quant_conv.bias",
        "decoder.upsamples.3.time_conv.weight": "decoder.stages.0.upsample.time_conv.kernel",
        "decoder.upsamples.4.shortcut.weight": "decoder.stages.1.blocks.0.shortcut.kernel",
        "decoder.upsamples.11.resample.1.bias": "decoder.stages.2.upsample.conv.bias",
        "decoder.upsamples.14.residual.2.weight": "decoder.stages.3.blocks.2.conv_1.kernel",
        "decoder.head.2.weight": "decoder.conv_out.kernel",
    }
    assert {name: official.get(name) for name in expected} == expected
    assert "decoder.upsamples.11.time_conv.weight" not in official
    assert "encoder.downsamples.2.time_conv.weight" not in official


def test_official_names_of_the_vae_of_wan22():
    names = {mapping.names.official: (mapping.name, mapping.names.diffusers) for mapping in vae_table(WAN22_VAE)}
    expected = {
        "encoder.downsamples.0.downsamples.2.resample.1.weight": (
            "encoder.stages.0.downsample.conv.kernel",
            "encoder.down_blocks.0.downsampler.resample.1.weight",
        ),
        "encoder.downsamples.1.downsamples.0.shortcut.bias": (
            "encoder.stages.1.blocks.0.shortcut.bias",
            "encoder.down_blocks.1.resnets.0.conv_shortcut.bias",
        ),
        "encoder.downsamples.2.downsamples.2.time_conv.weight": (
            "encoder.stages.2.downsample.time_conv.kernel",
            "encoder.down_blocks.2.downsampler.time_conv.weight",
        ),
        "encoder.downsamples.3.downsamples.1.residual.3.gamma": (
            "encoder.stages.3.blocks.1.norm_2.scale",
            "encoder.down_blocks.3.resnets.1.norm2.gamma",
        ),
        "decoder.upsamples.0.upsamples.3.time_conv.bias": (
            "decoder.stages.0.upsample.time_conv.bias",
            "decoder.up_blocks.0.upsampler.time_conv.bias",
        ),
        "decoder.upsamples.3.upsamples.0.shortcut.weight": (
            "decoder.stages.3.blocks.0.shortcut.kernel",
            "decoder.up_blocks.3.resnets.0.conv_shortcut.weight",
        ),
    }
    assert {name: names.get(name) for name in expected} == expected
    assert "decoder.upsamples.2.upsamples.3.resample.1.weight" in names
    assert "decoder.upsamples.2.upsamples.3.time_conv.weight" not in names


def test_official_denoiser_names_of_the_release():
    names = {
        mapping.names.official: (mapping.name, mapping.names.diffusers) for mapping in denoiser_table(DenoiserConfig())
    }
    # The official norm3 is the cross-attention norm, which diffusers calls norm2.
    assert names["blocks.{layer}.norm3.weight"] == (
        "blocks.{layer}.cross_attention_norm.scale",
        "blocks.{layer}.norm2.weight",
    )
    assert names["blocks.{layer}.self_attn.o.bias"][1] == "blocks.{layer}.attn1.to_out.0.bias"
    assert names["blocks.{layer}.ffn.2.weight"][1] == "blocks.{layer}.ffn.net.2.weight"
    assert names["head.modulation"][1] == "scale_shift_table"
    assert names["time_projection.1.weight"][1] == "condition_embedder.time_proj.weight"


def test_official_text_encoder_names_of_the_release():
    names = {mapping.names.official: mapping.names.diffusers for mapping in text_encoder_table(TextEncoderConfig())}
    block = "encoder.block.{layer}.layer.1.DenseReluDense"
    assert names["blocks.{layer}.ffn.gate.0.weight"] == f"{block}.wi_0.weight"
    assert names["blocks.{layer}.ffn.fc1.weight"] == f"{block}.wi_1.weight"
    assert names["blocks.{layer}.ffn.fc2.weight"] == f"{block}.wo.weight"


@pytest.mark.parametrize("config", MODELS)
def test_rearranging_is_exactly_invertible(config):
    generator = np.random.default_rng(0)
    for mapping in expanded_table(config):
        tensor = generator.standard_normal(mapping.torch_shape)
        ours = mapping.from_torch(tensor)
        assert ours.shape == mapping.shape
        np.testing.assert_array_equal(mapping.to_torch(ours), tensor)
