"""Names and shapes of the VAE's convolutions and norms in all three layouts, generated from its config.

Of Wan2.1 the official release keeps the encoder's and the decoder's stages in flat lists (`encoder.downsamples.7`), and
diffusers keeps the encoder flat and groups the decoder by stage. Of Wan2.2 (`residual`) both group everything by stage
(`encoder.downsamples.1.downsamples.2`), as ours does for either.
"""

from collections.abc import Iterator
from typing import Literal

from wan_jax.config import VAEConfig

Kind = Literal["conv3d", "conv2d", "conv2d_1x1", "gamma"]
Names = tuple[str, str, str]  # ours, official, diffusers
Entry = tuple[Kind, Names, tuple[int, ...]]  # kind, names without ".weight", PyTorch shape of the weight


def vae_entries(config: VAEConfig) -> Iterator[Entry]:
    """Every convolution and norm of the VAE, encoder first."""
    z = config.z_dim
    yield from _encoder(config)
    yield "conv3d", ("quant_conv", "conv1", "quant_conv"), (2 * z, 2 * z, 1, 1, 1)
    yield "conv3d", ("post_quant_conv", "conv2", "post_quant_conv"), (z, z, 1, 1, 1)
    yield from _decoder(config)


def _encoder(config: VAEConfig) -> Iterator[Entry]:
    width, last = config.encoder_stages[0][0], config.encoder_stages[-1][1]
    yield _conv3d(("encoder.conv_in", "encoder.conv1", "encoder.conv_in"), config.image_channels, width)
    index = 0  # in the list of the official and the diffusers layout
    for stage, (width, out_width, temporal) in enumerate(config.encoder_stages):
        ours, official, diffusers = f"encoder.stages.{stage}", "encoder.downsamples", f"encoder.down_blocks.{stage}"
        if config.residual:
            index, official = 0, f"encoder.downsamples.{stage}.downsamples"
        for block in range(config.num_res_blocks):
            theirs = f"{diffusers}.resnets.{block}" if config.residual else f"encoder.down_blocks.{index}"
            yield from _residual_block((f"{ours}.blocks.{block}", f"{official}.{index}", theirs), width, out_width)
            width = out_width
            index += 1
        if temporal is not None:
            theirs = f"{diffusers}.downsampler" if config.residual else f"encoder.down_blocks.{index}"
            names = (f"{ours}.downsample", f"{official}.{index}", theirs)
            yield "conv2d", _resample_conv(names), (width, width, 3, 3)
            if temporal:
                yield "conv3d", _join(names, "time_conv"), (width, width, 3, 1, 1)
            index += 1
    yield from _middle("encoder", last)
    yield "gamma", ("encoder.norm_out", "encoder.head.0", "encoder.norm_out"), (last, 1, 1, 1)
    yield _conv3d(("encoder.conv_out", "encoder.head.2", "encoder.conv_out"), last, 2 * config.z_dim)


def _decoder(config: VAEConfig) -> Iterator[Entry]:
    width, last = config.decoder_stages[0][0], config.decoder_stages[-1][1]
    yield _conv3d(("decoder.conv_in", "decoder.conv1", "decoder.conv_in"), config.z_dim, width)
    yield from _middle("decoder", width)
    index = 0  # in the list of the official layout
    for stage, (width, out_width, temporal) in enumerate(config.decoder_stages):
        ours, official, diffusers = f"decoder.stages.{stage}", "decoder.upsamples", f"decoder.up_blocks.{stage}"
        if config.residual:
            index, official = 0, f"decoder.upsamples.{stage}.upsamples"
        for block in range(config.num_res_blocks + 1):
            names = (f"{ours}.blocks.{block}", f"{official}.{index}", f"{diffusers}.resnets.{block}")
            yield from _residual_block(names, width, out_width)
            width = out_width
            index += 1
        if temporal is not None:
            theirs = f"{diffusers}.upsampler" if config.residual else f"{diffusers}.upsamplers.0"
            names = (f"{ours}.upsample", f"{official}.{index}", theirs)
            yield "conv2d", _resample_conv(names), (width if config.residual else width // 2, width, 3, 3)
            if temporal:
                yield "conv3d", _join(names, "time_conv"), (2 * width, width, 3, 1, 1)
            index += 1
    yield "gamma", ("decoder.norm_out", "decoder.head.0", "decoder.norm_out"), (last, 1, 1, 1)
    yield _conv3d(("decoder.conv_out", "decoder.head.2", "decoder.conv_out"), last, config.image_channels)


def _middle(half: str, width: int) -> Iterator[Entry]:
    for ours, official, diffusers in (("block_1", 0, "resnets.0"), ("block_2", 2, "resnets.1")):
        names = (f"{half}.middle.{ours}", f"{half}.middle.{official}", f"{half}.mid_block.{diffusers}")
        yield from _residual_block(names, width, width)
    attention = (f"{half}.middle.attention", f"{half}.middle.1", f"{half}.mid_block.attentions.0")
    yield "gamma", _join(attention, "norm"), (width, 1, 1)
    yield "conv2d_1x1", _join(attention, "qkv", "to_qkv", "to_qkv"), (3 * width, width, 1, 1)
    yield "conv2d_1x1", _join(attention, "projection", "proj", "proj"), (width, width, 1, 1)


def _residual_block(block: Names, in_width: int, out_width: int) -> Iterator[Entry]:
    yield "gamma", _join(block, "norm_1", "residual.0", "norm1"), (in_width, 1, 1, 1)
    yield _conv3d(_join(block, "conv_1", "residual.2", "conv1"), in_width, out_width)
    yield "gamma", _join(block, "norm_2", "residual.3", "norm2"), (out_width, 1, 1, 1)
    yield _conv3d(_join(block, "conv_2", "residual.6", "conv2"), out_width, out_width)
    if in_width != out_width:
        yield "conv3d", _join(block, "shortcut", "shortcut", "conv_shortcut"), (out_width, in_width, 1, 1, 1)


def _conv3d(names: Names, in_width: int, out_width: int) -> Entry:
    return "conv3d", names, (out_width, in_width, 3, 3, 3)


def _resample_conv(names: Names) -> Names:
    return _join(names, "conv", "resample.1", "resample.1")


def _join(module: Names, ours: str, official: str | None = None, diffusers: str | None = None) -> Names:
    """A member of a module; one name serves all layouts where the others are not given."""
    return f"{module[0]}.{ours}", f"{module[1]}.{official or ours}", f"{module[2]}.{diffusers or ours}"
