"""Checkpoints that PyTorch, diffusers and transformers write and read, bit by bit."""

import dataclasses

import numpy as np
import pytest
import safetensors.torch
import torch

from tests.checkpoint import trees
from tests.checkpoint.test_family import CONFIGS, WITH_CLIP, released_clip
from tests.checkpoint.test_family import write_official as write_official_family
from tests.checkpoint.test_open import assert_loads
from tests.checkpoint.test_tables import DENOISERS, MODELS, VAES
from tests.parity import originals
from tests.parity.torch_trees import as_torch, assert_same_state, bits, diffusers_models, stored, write_diffusers
from tests.prompts import PROMPTS
from wan_jax.checkpoint import convert, open_checkpoint
from wan_jax.checkpoint.layouts.diffusers import FOLDERS
from wan_jax.checkpoint.layouts.official import IMAGE_ENCODER, TEXT_ENCODER, vae_file
from wan_jax.checkpoint.tables import expanded_table
from wan_jax.checkpoint.tables.denoiser import denoiser_table
from wan_jax.checkpoint.tables.vae import vae_table
from wan_jax.config import DenoiserConfig, ImageEncoderConfig, TextEncoderConfig, VAEConfig
from wan_jax.errors import InputError
from wan_jax.presets import PRESETS


def test_opens_what_torch_and_safetensors_write(tmp_path):
    tree = trees.write_official(tmp_path)
    for path in tree.rglob("*.safetensors"):
        safetensors.torch.save_file(as_torch(trees.load_file(path)), path, {"format": "pt"})
    for path in tree.glob("*.pth"):
        torch.save(as_torch(trees.load_pickle(path)), path)
    assert_loads(open_checkpoint(tree), "official")


def test_torch_and_safetensors_read_what_convert_writes(tmp_path):
    """Through all layouts; torch reads the .pth files without running code."""
    tree = trees.write_official(tmp_path / "source", "bfloat16")
    for to in ("orbax", "diffusers", "official"):
        convert(tree, tmp_path / to, to=to)
        tree = tmp_path / to
    for expert in ("high_noise", "low_noise"):
        expected = as_torch(trees.state_dict(expert, "official", "bfloat16"))
        assert_same_state(stored(tree / f"{expert}_model"), expected)
    text_encoder = torch.load(tree / TEXT_ENCODER, weights_only=True)
    assert_same_state(text_encoder, as_torch(trees.state_dict("text_encoder", "official", "bfloat16")))
    vae = torch.load(tree / vae_file(VAEConfig()), weights_only=True)
    assert_same_state(vae, as_torch(trees.state_dict("vae", "official")))


def test_torch_reads_the_clip_that_convert_writes(tmp_path):
    tree = write_official_family(tmp_path / "source", CONFIGS["i2v-14b"])
    convert(tree, tmp_path / "result", to="official")
    clip = torch.load(tmp_path / "result" / IMAGE_ENCODER, weights_only=True)
    assert_same_state(clip, as_torch(released_clip(CONFIGS["i2v-14b"])))


@pytest.fixture(scope="module")
def saved_by_diffusers(tmp_path_factory):
    return write_diffusers(tmp_path_factory.mktemp("diffusers"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_opens_what_diffusers_saves(saved_by_diffusers, dtype):
    checkpoint = open_checkpoint(saved_by_diffusers)
    assert dataclasses.replace(checkpoint.config, sampling=trees.CONFIG.sampling) == trees.CONFIG
    assert checkpoint.config.sampling.shift == 3.0  # its scheduler's: it is no release
    assert len(list((saved_by_diffusers / "transformer").glob("*.safetensors"))) > 1
    assert_loads(checkpoint, "diffusers", dtype)


@pytest.mark.parametrize(("dtype", "through"), [("float32", "official"), ("bfloat16", "orbax")])
def test_diffusers_reads_its_own_weights_back(tmp_path, dtype, through):
    """Saved by diffusers, through another layout, read by diffusers: equal state dicts."""
    write_diffusers(tmp_path / "source", dtype)
    convert(tmp_path / "source", tmp_path / "between", to=through)
    convert(tmp_path / "between", tmp_path / "back", to="diffusers")
    for component, original in diffusers_models(dtype).items():
        option = "dtype" if component == "text_encoder" else "torch_dtype"
        # In bfloat16 diffusers keeps some modules in float32, so the original is read from its own files too.
        read, expected = (
            type(original).from_pretrained(
                tmp_path / tree / FOLDERS[component],
                output_loading_info=True,
                **{option: original.dtype},
            )
            for tree in ("back", "source")
        )
        assert not any(read[1][problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert_same_state(read[0].state_dict(), expected[0].state_dict())
        if component != "text_encoder":
            visible = {key: value for key, value in expected[0].config.items() if not key.startswith("_")}
            assert {key: read[0].config[key] for key in visible} == visible
        else:
            assert read[0].encoder.embed_tokens.weight is read[0].shared.weight
            np.testing.assert_array_equal(bits(read[0].shared.weight), bits(original.shared.weight))
    for name in ("transformer", "transformer_2", "vae"):
        before, after = (stored(tmp_path / tree / name) for tree in ("source", "back"))
        assert_same_state(after, before)


def test_a_whole_pipeline_for_diffusers(diffusers_tree, tmp_path):
    """With a real tokenizer: WanPipeline.from_pretrained takes our export, and finds the tree's own shift in it."""
    from diffusers import WanPipeline

    convert(diffusers_tree, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", to="diffusers")
    pipeline = WanPipeline.from_pretrained(tmp_path / "back")
    assert pipeline.config.boundary_ratio == 0.875
    assert pipeline.scheduler.config.flow_shift == 3.0
    assert pipeline.scheduler.config.use_flow_sigmas
    original = originals.denoiser(3)
    assert_same_state(pipeline.transformer_2.state_dict(), original.state_dict())
    tokens = pipeline.tokenizer(PROMPTS[0]).input_ids
    assert tokens == WanPipeline.from_pretrained(diffusers_tree).tokenizer(PROMPTS[0]).input_ids
    assert open_checkpoint(tmp_path / "back").notes == ()


@pytest.mark.parametrize("name", CONFIGS)
def test_diffusers_trees_come_back_bit_by_bit(tokenizer_folder, tmp_path, name):
    """Saved by diffusers, through our format, read by diffusers."""
    from diffusers import WanImageToVideoPipeline

    original = originals.image_pipeline(tokenizer_folder, name)
    original.save_pretrained(tmp_path / "source")
    checkpoint = open_checkpoint(tmp_path / "source")
    release = {"i2v-14b": "i2v-14b-720p", "flf2v-14b": "flf2v-14b-720p"}.get(name, name)
    sampling = checkpoint.config.sampling
    # No release: the scheduler's shift, and what diffusers does where nothing is said.
    assert (sampling.shift, sampling.size, sampling.steps, sampling.guidance) == (5.0, (832, 480), 50, (5.0, 5.0))
    assert sampling.boundary == PRESETS[release].sampling.boundary
    assert checkpoint.config.conditioning == PRESETS[release].conditioning
    assert checkpoint.config.denoiser.image_position_length == {"flf2v-14b": 34}.get(name)
    assert (checkpoint.config.image_encoder is not None) == (name in WITH_CLIP)

    convert(checkpoint, tmp_path / "ours")
    assert open_checkpoint(tmp_path / "ours").config == checkpoint.config
    convert(tmp_path / "ours", tmp_path / "back", to="diffusers")
    back = WanImageToVideoPipeline.from_pretrained(tmp_path / "back")
    assert back.config.expand_timesteps == (name == "ti2v-5b")
    assert back.config.boundary_ratio == (0.9 if name == "i2v-a14b" else None)
    for component in ("transformer", "transformer_2", "vae", "image_encoder"):
        model, expected = getattr(back, component), getattr(original, component)
        assert (model is None) == (expected is None), component
        if expected is not None:
            assert_same_state(model.state_dict(), expected.state_dict())
    for component in ("transformer", "transformer_2", "vae"):
        source, back_again = (stored(tmp_path / tree / component) for tree in ("source", "back"))
        assert_same_state(back_again, source)
    if name in WITH_CLIP:
        assert back.image_encoder.config.hidden_act == "gelu"
        assert back.image_processor.crop_size == {"height": 56, "width": 56}
        with pytest.raises(InputError, match="no place for image_encoder's num_heads"):
            convert(checkpoint, tmp_path / "official", to="official")


def test_a_first_frame_may_come_with_the_text_pipeline(tokenizer_folder, tmp_path):
    """As TI2V-5B is published."""
    originals.image_pipeline(tokenizer_folder, "ti2v-5b").save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(index.read_text().replace("WanImageToVideoPipeline", "WanPipeline"))
    assert open_checkpoint(tmp_path).config.conditioning == "first_frame"


def diffusers_original(config):
    match config:
        case DenoiserConfig():
            return originals.denoiser(
                0,
                num_attention_heads=config.num_heads,
                attention_head_dim=config.head_dim,
                in_channels=config.in_channels,
                out_channels=config.out_channels,
                patch_size=config.patch_size,
                text_dim=config.text_dim,
                freq_dim=config.freq_dim,
                ffn_dim=config.ffn_dim,
                num_layers=config.num_layers,
                image_dim=config.image_dim,
                added_kv_proj_dim=None if config.image_dim is None else config.dim,
                pos_embed_seq_len=config.image_position_length,
            )
        case ImageEncoderConfig():
            return originals.image_encoder(
                0,
                hidden_size=config.dim,
                intermediate_size=config.ffn_dim,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                image_size=config.image_size,
                patch_size=config.patch_size,
            )
        case TextEncoderConfig():
            return originals.text_encoder(0, config.vocab_size, tie_word_embeddings=True)
        case VAEConfig():
            return originals.vae(
                0,
                base_dim=config.base_dim,
                decoder_base_dim=config.decoder_base_dim,
                is_residual=config.residual,
                in_channels=config.image_channels,
                out_channels=config.image_channels,
                patch_size=config.patch_size,
                dim_mult=list(config.dim_mult),
                num_res_blocks=config.num_res_blocks,
                temperal_downsample=list(config.temporal_downsample),
            )


@pytest.mark.parametrize("config", MODELS)
def test_diffusers_names_and_shapes(config):
    theirs = {name: tuple(tensor.shape) for name, tensor in diffusers_original(config).state_dict().items()}
    theirs.pop("encoder.embed_tokens.weight", None)  # a second name of shared.weight
    if isinstance(config, ImageEncoderConfig):  # transformers 4 has a prefix and saves it, 5 reads it
        theirs = {f"vision_model.{name.removeprefix('vision_model.')}": shape for name, shape in theirs.items()}
    assert {mapping.names.diffusers: mapping.torch_shape for mapping in expanded_table(config)} == theirs


def test_rearrangements_are_the_right_ones():
    """Each kind against the operation that it serves, in torch."""
    generator = torch.Generator().manual_seed(0)
    denoiser = {mapping.name: mapping for mapping in denoiser_table(DENOISERS[1])}
    vae = {mapping.name: mapping for mapping in vae_table(VAES[0])}

    def random(mapping):
        return torch.randn(mapping.torch_shape, generator=generator, dtype=torch.float64)

    mapping = denoiser["time_projection.kernel"]
    weight, x = random(mapping), torch.randn(3, 24, generator=generator, dtype=torch.float64)
    np.testing.assert_allclose(
        x.numpy() @ mapping.from_torch(weight.numpy()), torch.nn.functional.linear(x, weight), rtol=1e-12
    )

    mapping = denoiser["patch_embedding.kernel"]
    weight, x = random(mapping), torch.randn(1, 5, 2, 1, 3, generator=generator, dtype=torch.float64)
    conv = torch.nn.functional.conv3d(x, weight).reshape(-1)
    np.testing.assert_allclose(x.numpy().reshape(-1) @ mapping.from_torch(weight.numpy()), conv, rtol=1e-12)

    mapping = vae["encoder.middle.attention.qkv.kernel"]
    weight, x = random(mapping), torch.randn(1, 24, 1, 1, generator=generator, dtype=torch.float64)
    conv = torch.nn.functional.conv2d(x, weight).reshape(-1)
    np.testing.assert_allclose(x.numpy().reshape(-1) @ mapping.from_torch(weight.numpy()), conv, rtol=1e-12)

    for name, einsum, conv in (
        ("decoder.conv_in.kernel", "bithw,thwio->bo", torch.nn.functional.conv3d),
        ("encoder.stages.0.downsample.conv.kernel", "bihw,hwio->bo", torch.nn.functional.conv2d),
    ):
        mapping = vae[name]
        weight = random(mapping)
        x = torch.randn(1, *mapping.torch_shape[1:], generator=generator, dtype=torch.float64)
        ours = np.einsum(einsum, x.numpy(), mapping.from_torch(weight.numpy()))
        np.testing.assert_allclose(ours.reshape(-1), conv(x, weight).reshape(-1), rtol=1e-12)

    table = random(denoiser["head.modulation"])
    np.testing.assert_array_equal(denoiser["head.modulation"].from_torch(table.numpy()), table[0])
