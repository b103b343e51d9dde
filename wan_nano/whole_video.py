"""The VAE on whole videos at once, as training wants it: the same parameters and results as its streaming passes.

Streaming bounds memory and costs thousands of small kernels, and as many again for its gradient. Here every causal
convolution sees all frames: shifted copies of the input are put beside each other as channels and one 2-D convolution
reads them.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from wan_jax.kernels.attention import attention
from wan_jax.models.vae import (
    VAE,
    AttentionBlock,
    CausalConv,
    DecoderStage,
    Downsample,
    EncoderStage,
    Middle,
    ResidualBlock,
    SpatialConv,
    Upsample,
    spatial_conv,
)


def encode_moments(vae: VAE, frames: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Frames [B, F, H, W, 3] -> mean and log variance of the latents, not normalised, [B, T, h, w, z] float32 each."""
    x = _conv(vae.encoder.conv_in, frames)
    for stage in vae.encoder.stages:
        x = _encoder_stage(stage, x)
    x = _middle(vae.encoder.middle, x)
    x = _conv(vae.encoder.conv_out, nnx.silu(vae.encoder.norm_out(x)))
    mean, log_variance = jnp.split(_conv(vae.quant_conv, x), 2, axis=-1)
    return mean, jnp.clip(log_variance, -30.0, 20.0)


def decode_whole(vae: VAE, latents: jax.Array) -> jax.Array:
    """Latents [B, T, h, w, z], not normalised -> frames [B, F, H, W, 3] float32."""
    x = _conv(vae.decoder.conv_in, _conv(vae.post_quant_conv, latents))
    x = _middle(vae.decoder.middle, x)
    for stage in vae.decoder.stages:
        x = _decoder_stage(stage, x)
    return _conv(vae.decoder.conv_out, nnx.silu(vae.decoder.norm_out(x)))


def _conv(conv: CausalConv, x: jax.Array) -> jax.Array:
    """[B, T, H, W, C_in] -> [B, T, H, W, C_out] float32, zeros standing before the first frame."""
    kernel = conv.kernel[...].astype(conv.dtype)
    taps, margin = kernel.shape[0], kernel.shape[1] // 2
    return _taps_as_channels(jnp.pad(x, _before(taps - 1)), kernel, x.shape[1], 1, margin, conv)


def _strided_conv(conv: CausalConv, x: jax.Array) -> jax.Array:
    """As the streaming form: frame t of the result is made of frames 2t - 2 to 2t of x; the first stays as it is."""
    kernel = conv.kernel[...].astype(conv.dtype)
    later = _taps_as_channels(x, kernel, (x.shape[1] - 1) // conv.time_stride, conv.time_stride, 0, conv)
    return jnp.concatenate([x[:, :1].astype(later.dtype), later], axis=1)


def _taps_as_channels(
    x: jax.Array, kernel: jax.Array, length: int, stride: int, margin: int, conv: CausalConv
) -> jax.Array:
    x = x.astype(conv.dtype)
    shifted = [x[:, tap : tap + (length - 1) * stride + 1 : stride] for tap in range(kernel.shape[0])]
    y = spatial_conv(
        jnp.concatenate(shifted, axis=-1), rearrange(kernel, "t h w i o -> h w (t i) o"), [(margin, margin)] * 2
    )
    return y.astype(jnp.float32) + conv.bias[...].astype(jnp.float32)


def _spatial(conv: SpatialConv, x: jax.Array) -> jax.Array:
    y = spatial_conv(x.astype(conv.dtype), conv.kernel[...].astype(conv.dtype), [conv.padding] * 2, conv.stride)
    return y + conv.bias[...].astype(conv.dtype)


def _before(frames: int) -> list[tuple[int, int]]:
    return [(0, 0), (frames, 0), (0, 0), (0, 0), (0, 0)]


def _residual_block(block: ResidualBlock, x: jax.Array) -> jax.Array:
    y = _conv(block.conv_1, nnx.silu(block.norm_1(x)))
    y = _conv(block.conv_2, nnx.silu(block.norm_2(y)))
    return y + (x if block.shortcut is None else _conv(block.shortcut, x))


def _middle(middle: Middle, x: jax.Array) -> jax.Array:
    x = _attention_block(middle.attention, _residual_block(middle.block_1, x))
    return _residual_block(middle.block_2, x)


def _attention_block(block: AttentionBlock, x: jax.Array) -> jax.Array:
    batch, _, height, _, _ = x.shape
    heads = rearrange(block.qkv(block.norm(x)), "b t h w (n c) -> n (b t) (h w) 1 c", n=3)
    y = attention(*heads, implementation="reference")  # frames are small in training
    return x + block.projection(rearrange(y, "(b t) (h w) 1 c -> b t h w c", b=batch, h=height))


def _encoder_stage(stage: EncoderStage, x: jax.Array) -> jax.Array:
    for block in stage.blocks:
        x = _residual_block(block, x)
    return x if stage.downsample is None else _downsample(stage.downsample, x)


def _downsample(layer: Downsample, x: jax.Array) -> jax.Array:
    x = _spatial(layer.conv, x)
    return x if layer.time_conv is None else _strided_conv(layer.time_conv, x)


def _decoder_stage(stage: DecoderStage, x: jax.Array) -> jax.Array:
    for block in stage.blocks:
        x = _residual_block(block, x)
    return x if stage.upsample is None else _upsample(stage.upsample, x)


def _upsample(layer: Upsample, x: jax.Array) -> jax.Array:
    if layer.time_conv is not None:
        # The first frame passes by the time convolution, which starts from zeros at the second.
        doubled = rearrange(_conv(layer.time_conv, x[:, 1:]), "b t h w (two c) -> b (t two) h w c", two=2)
        x = jnp.concatenate([x[:, :1].astype(doubled.dtype), doubled], axis=1)
    x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
    return _spatial(layer.conv, x)
