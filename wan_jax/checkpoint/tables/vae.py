"""The parameters of the VAE of Wan2.1 or Wan2.2, and its config from their shapes.

Of Wan2.1 the official release keeps the encoder's and the decoder's stages in flat lists (`encoder.downsamples.7`), and
diffusers keeps the encoder flat and groups the decoder by stage. Of Wan2.2 (`residual`) both group everything by stage
(`encoder.downsamples.1.downsamples.2`), as ours does for either.
"""

import math
import re

from wan_jax.checkpoint.family import another_family
from wan_jax.checkpoint.tables.mapping import (
    Names,
    Naming,
    ParamMapping,
    Tensors,
    count_indices,
    names,
    read_shape,
    weight_and_bias,
)
from wan_jax.config import VAEConfig
from wan_jax.presets import WAN22_VAE

CONV3D = "o i t h w -> t h w i o"
CONV2D = "o i h w -> h w i o"
CONV2D_AS_LINEAR = "o i 1 1 -> i o"
GAMMA_3D = "n 1 1 1 -> n"
GAMMA_2D = "n 1 1 -> n"


def vae_table(config: VAEConfig) -> list[ParamMapping]:
    """Every convolution and norm, encoder first."""
    z = config.z_dim
    return [
        *_encoder(config),
        *weight_and_bias(names("quant_conv", "conv1"), CONV3D, (2 * z, 2 * z, 1, 1, 1)),
        *weight_and_bias(names("post_quant_conv", "conv2"), CONV3D, (z, z, 1, 1, 1)),
        *_decoder(config),
    ]


def _encoder(config: VAEConfig) -> list[ParamMapping]:
    width, last = config.encoder_stages[0][0], config.encoder_stages[-1][1]
    table = _conv3d(names("encoder.conv_in", "encoder.conv1"), config.image_channels, width)
    index = 0  # in the list of the official and the diffusers layout
    for stage, (width, out_width, temporal) in enumerate(config.encoder_stages):
        name, official, diffusers = f"encoder.stages.{stage}", "encoder.downsamples", f"encoder.down_blocks.{stage}"
        if config.residual:
            index, official = 0, f"encoder.downsamples.{stage}.downsamples"
        for block in range(config.num_res_blocks):
            in_diffusers = f"{diffusers}.resnets.{block}" if config.residual else f"encoder.down_blocks.{index}"
            table += _residual_block(
                Names(f"{name}.blocks.{block}", f"{official}.{index}", in_diffusers), width, out_width
            )
            width = out_width
            index += 1
        if temporal is not None:
            in_diffusers = f"{diffusers}.downsampler" if config.residual else f"encoder.down_blocks.{index}"
            resample = Names(f"{name}.downsample", f"{official}.{index}", in_diffusers)
            table += _resample(resample, width, width, width if temporal else None)
            index += 1
    return [
        *table,
        *_middle("encoder", last),
        _gamma(names("encoder.norm_out", "encoder.head.0"), last),
        *_conv3d(names("encoder.conv_out", "encoder.head.2"), last, 2 * config.z_dim),
    ]


def _decoder(config: VAEConfig) -> list[ParamMapping]:
    width, last = config.decoder_stages[0][0], config.decoder_stages[-1][1]
    table = _conv3d(names("decoder.conv_in", "decoder.conv1"), config.z_dim, width) + _middle("decoder", width)
    index = 0  # in the list of the official layout
    for stage, (width, out_width, temporal) in enumerate(config.decoder_stages):
        name, official, diffusers = f"decoder.stages.{stage}", "decoder.upsamples", f"decoder.up_blocks.{stage}"
        if config.residual:
            index, official = 0, f"decoder.upsamples.{stage}.upsamples"
        for block in range(config.num_res_blocks + 1):
            module = Names(f"{name}.blocks.{block}", f"{official}.{index}", f"{diffusers}.resnets.{block}")
            table += _residual_block(module, width, out_width)
            width = out_width
            index += 1
        if temporal is not None:
            in_diffusers = f"{diffusers}.upsampler" if config.residual else f"{diffusers}.upsamplers.0"
            resample = Names(f"{name}.upsample", f"{official}.{index}", in_diffusers)
            out_width = width if config.residual else width // 2
            table += _resample(resample, width, out_width, 2 * width if temporal else None)
            index += 1
    return [
        *table,
        _gamma(names("decoder.norm_out", "decoder.head.0"), last),
        *_conv3d(names("decoder.conv_out", "decoder.head.2"), last, config.image_channels),
    ]


def _middle(half: str, width: int) -> list[ParamMapping]:
    middle = names(f"{half}.middle", diffusers=f"{half}.mid_block")
    attention = middle.child("attention", "1", "attentions.0")
    return [
        *_residual_block(middle.child("block_1", "0", "resnets.0"), width, width),
        *_residual_block(middle.child("block_2", "2", "resnets.1"), width, width),
        _gamma(attention.child("norm"), width, GAMMA_2D),
        *weight_and_bias(attention.child("qkv", "to_qkv", "to_qkv"), CONV2D_AS_LINEAR, (3 * width, width, 1, 1)),
        *weight_and_bias(attention.child("projection", "proj", "proj"), CONV2D_AS_LINEAR, (width, width, 1, 1)),
    ]


def _residual_block(block: Names, in_width: int, out_width: int) -> list[ParamMapping]:
    table = [
        _gamma(block.child("norm_1", "residual.0", "norm1"), in_width),
        *_conv3d(block.child("conv_1", "residual.2", "conv1"), in_width, out_width),
        _gamma(block.child("norm_2", "residual.3", "norm2"), out_width),
        *_conv3d(block.child("conv_2", "residual.6", "conv2"), out_width, out_width),
    ]
    if in_width != out_width:
        shortcut = block.child("shortcut", diffusers="conv_shortcut")
        table += weight_and_bias(shortcut, CONV3D, (out_width, in_width, 1, 1, 1))
    return table


def _resample(module: Names, in_width: int, out_width: int, time_width: int | None) -> list[ParamMapping]:
    """A convolution over pixels and, with `time_width` output channels, one over time."""
    table = weight_and_bias(module.child("conv", "resample.1", "resample.1"), CONV2D, (out_width, in_width, 3, 3))
    if time_width is not None:
        table += weight_and_bias(module.child("time_conv"), CONV3D, (time_width, in_width, 3, 1, 1))
    return table


def _conv3d(module: Names, in_width: int, out_width: int) -> list[ParamMapping]:
    return weight_and_bias(module, CONV3D, (out_width, in_width, 3, 3, 3))


def _gamma(module: Names, width: int, pattern: str = GAMMA_3D) -> ParamMapping:
    return ParamMapping(module.child("scale", "gamma", "gamma"), pattern, (width, *[1] * pattern.count("1")))


def infer_vae(place: str, tensors: Tensors, naming: Naming = "official") -> VAEConfig:
    """The config of a VAE with the official names; its latents' mean and deviation are those of the released one."""
    assert naming == "official"
    z_dim = read_shape(place, tensors, "conv2.weight", 5)[0]
    # Wan2.2 has a list of modules for each stage, Wan2.1 one for all.
    residual = "encoder.downsamples.0.downsamples.0.residual.2.weight" in tensors
    released = WAN22_VAE if residual else VAEConfig()
    if z_dim != released.z_dim:
        raise another_family(
            place, f"its VAE has {z_dim} latent channels, and this layout does not say their mean and deviation"
        )
    base_dim, image_channels, *_ = read_shape(place, tensors, "encoder.conv1.weight", 5)
    if residual:
        stage_count = count_indices(tensors, r"encoder\.downsamples\.(\d+)\.")
        lists = [f"encoder.downsamples.{stage}.downsamples" for stage in range(stage_count)]
    else:
        lists = ["encoder.downsamples"]
    stages: list[list[int]] = []  # output channels of every residual block, by stage
    temporal_downsample = []
    for modules in lists:
        stages.append([])
        for index in range(count_indices(tensors, rf"{re.escape(modules)}\.(\d+)\.")):
            module = f"{modules}.{index}"
            if f"{module}.resample.1.weight" in tensors:
                temporal_downsample.append(f"{module}.time_conv.weight" in tensors)
                if not residual:
                    stages.append([])
            else:
                stages[-1].append(read_shape(place, tensors, f"{module}.residual.2.weight", 5)[0])
    if not all(stages):
        raise another_family(place, "its VAE has a stage without residual blocks")
    dim_mult = tuple(widths[-1] // base_dim for widths in stages)
    decoder_base_dim = read_shape(place, tensors, "decoder.head.2.weight", 5)[1] // dim_mult[0]
    return VAEConfig(
        z_dim=z_dim,
        base_dim=base_dim,
        decoder_base_dim=None if decoder_base_dim == base_dim else decoder_base_dim,
        dim_mult=dim_mult,
        num_res_blocks=len(stages[0]),
        temporal_downsample=tuple(temporal_downsample),
        patch_size=math.isqrt(image_channels // 3),
        residual=residual,
        latents_mean=released.latents_mean,
        latents_std=released.latents_std,
    )
