"""The causal 3-D video VAEs of Wan2.1 and Wan2.2 (wan/modules/vae2_1.py, vae2_2.py), streaming over time.

The model is causal in time, so frames are processed in order with constant memory: every temporal convolution caches
what later frames need of the past. These arrays (`CausalCache`) are the carry of a scan, or of a host loop that fetches
each chunk of frames. The first frame is special: one latent frame stands for this frame alone, and temporal resampling
skips it; each later latent frame stands for `temporal_stride` frames. At high resolution the frames of a step pass the
layers one at a time.

The Wan2.2 VAE moves squares of pixels into channels first (pixel unshuffle), and has a shortcut without parameters
around each stage that changes the resolution (`nn/pixel_shuffle.py`).

Inside, activations are channels-last: [batch, time, height, width, channels].
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from wan_jax.config import VAEConfig
from wan_jax.kernels.attention import attention
from wan_jax.kernels.precision import matmul_precision
from wan_jax.models.nn.causal_conv import CacheArrays, CausalCache, overlap_add, scan_over_time, sum_float32
from wan_jax.models.nn.linear import Linear, Options
from wan_jax.models.nn.pixel_shuffle import avg_down_3d, dup_up_3d, pixel_shuffle, pixel_unshuffle
from wan_jax.parallel.tiles import SpatialSharding

# Frames that pass the layers of full time resolution at once; their memory is proportional to it.
FRAMES_AT_ONCE = 1
# Most memory that the attention's float32 logits take.
LOGITS_BYTES = 128 * 2**20


def spatial_conv(x: jax.Array, kernel: jax.Array, padding: Sequence[tuple[int, int]], stride: int = 1) -> jax.Array:
    """Convolves every frame: [B, T, H, W, C_in] with [h, w, C_in, C_out]; `padding` is before and after H, and W."""
    y = lax.conv_general_dilated(
        rearrange(x, "b t h w c -> (b t) h w c"),
        kernel,
        window_strides=(stride, stride),
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=matmul_precision(x.dtype),
    )
    return rearrange(y, "(b t) h w c -> b t h w c", b=x.shape[0])


def time_taps(x: jax.Array, kernel: jax.Array, sharding: SpatialSharding) -> list[jax.Array]:
    """Convolves every frame with every time tap: [B, T, H, W, C_in], [taps, h, w, C_in, C_out] -> `taps` results.

    Two-dimensional convolutions are as fast as three-dimensional ones on GPUs and quicker to compile. (They cannot
    return float32: XLA:GPU has no mixed-precision convolution and would compute bfloat16 ones in float32.)
    """
    margin = kernel.shape[1] // 2  # kernels are odd
    x, padding = sharding.exchange_halos(x, (margin, margin))
    return [spatial_conv(x, tap, padding) for tap in kernel]


class CausalConv(nnx.Module):
    """Convolution over (time, height, width) in which no output frame sees a later input frame.

    Space is padded to keep its size, time is not: what came before is in the cache.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size=(3, 3, 3), time_stride=1, **options: Unpack[Options]
    ):
        self.kernel, self.bias = _conv_parameters(kernel_size, in_channels, out_channels, options)
        self.time_stride = time_stride
        self.dtype = options["dtype"]

    def __call__(self, x: jax.Array, cache: CausalCache) -> jax.Array:
        """[B, T, H, W, C_in] -> [B, T / time_stride, H, W, C_out] in float32."""
        kernel = self.kernel[...].astype(self.dtype)
        x = cache.force_write(x.astype(self.dtype))
        if self.time_stride > 1:
            frames = self.strided(x, kernel, cache)
        else:
            taps = time_taps(x, kernel, cache.sharding)
            frames, future = overlap_add(taps, cache.read(taps[0], len(taps) - 1) if len(taps) > 1 else ())
            if future:
                cache.write(tuple(frame.astype(self.dtype) for frame in future))
        return jnp.concatenate(frames, axis=1) + self.bias[...].astype(jnp.float32)

    def write_zeros(self, x: jax.Array, cache: CausalCache) -> None:
        """Writes the cache that frames of zeros, of x's size, would leave."""
        taps, channels = self.kernel.shape[0], self.kernel.shape[-1]
        cache.write((jnp.zeros((x.shape[0], 1, *x.shape[2:4], channels), self.dtype),) * (taps - 1))

    def strided(self, x: jax.Array, kernel: jax.Array, cache: CausalCache) -> list[jax.Array]:
        """Computes every `time_stride`-th frame alone; the cache holds input frames."""
        length, frames = x.shape[1], kernel.shape[0] - self.time_stride
        x = jnp.concatenate([*cache.read(x, frames), x], axis=1)
        cache.write(tuple(jnp.split(x[:, -frames:], frames, axis=1)))
        windows = [x[:, tap : tap + length : self.time_stride] for tap in range(kernel.shape[0])]
        taps = [time_taps(window, kernel[tap, None], cache.sharding)[0] for tap, window in enumerate(windows)]
        return [sum_float32(taps)]


class SpatialConv(nnx.Module):
    """3x3 convolution of each frame. With stride 2 the zero padding is at the right and the bottom only."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, **options: Unpack[Options]):
        self.kernel, self.bias = _conv_parameters((3, 3), in_channels, out_channels, options)
        self.stride = stride
        self.padding = (1, 1) if stride == 1 else (0, 1)
        self.dtype = options["dtype"]

    def __call__(self, x: jax.Array, sharding: SpatialSharding) -> jax.Array:
        """[B, T, H, W, C_in] -> [B, T, H / stride, W / stride, C_out] in `dtype`."""
        kernel = self.kernel[...].astype(self.dtype)
        x, padding = sharding.exchange_halos(x.astype(self.dtype), self.padding)
        y = spatial_conv(x, kernel, padding, self.stride)
        return y + self.bias[...].astype(self.dtype)


def _conv_parameters(size: tuple[int, ...], in_channels: int, out_channels: int, options: Options):
    param_dtype = options["param_dtype"]
    shape = (*size, in_channels, out_channels)
    kernel = jax.random.normal(options["rngs"].params(), shape, param_dtype) * math.prod(shape[:-1]) ** -0.5
    axes = (*[None] * len(size), "conv_in", "conv_out")
    bias = nnx.Param(jnp.zeros((out_channels,), param_dtype), axes=("conv_out",))
    return nnx.Param(kernel.astype(param_dtype), axes=axes), bias


class ChannelNorm(nnx.Module):
    """x / max(||x||_2 over channels, 1e-12) * sqrt(C) * scale, in float32."""

    def __init__(self, channels: int, **options: Unpack[Options]):
        self.scale = nnx.Param(jnp.ones((channels,), options["param_dtype"]), axes=(None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., C] -> the same shape in float32."""
        x = x.astype(jnp.float32)
        length = jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True))
        return x * (x.shape[-1] ** 0.5 / jnp.maximum(length, 1e-12)) * self.scale[...].astype(jnp.float32)


class ResidualBlock(nnx.Module):
    """Two rounds of norm, SiLU and 3x3x3 convolution, beside a shortcut. The sum is float32."""

    def __init__(self, in_channels: int, out_channels: int, **options: Unpack[Options]):
        self.norm_1 = ChannelNorm(in_channels, **options)
        self.conv_1 = CausalConv(in_channels, out_channels, **options)
        self.norm_2 = ChannelNorm(out_channels, **options)
        self.conv_2 = CausalConv(out_channels, out_channels, **options)
        widens = in_channels != out_channels
        self.shortcut = CausalConv(in_channels, out_channels, (1, 1, 1), **options) if widens else None

    def __call__(self, x: jax.Array, cache: CausalCache) -> jax.Array:
        """[B, T, H, W, C_in] -> [B, T, H, W, C_out]."""
        y = self.conv_1(nnx.silu(self.norm_1(x)), cache)
        y = self.conv_2(nnx.silu(self.norm_2(y)), cache)
        y = y + (x if self.shortcut is None else self.shortcut(x, cache))
        # Without the barrier XLA recomputes the sum, from all the convolutions before it, wherever it is read.
        return lax.optimization_barrier(y)


class AttentionBlock(nnx.Module):
    """Single-head self-attention over the positions of each frame, for a band of its rows at a time.

    The head is wider than cuDNN's attention takes, and alone: large products with the logits between them are fastest.
    """

    def __init__(self, channels: int, **options: Unpack[Options]):
        self.norm = ChannelNorm(channels, **options)
        self.qkv = Linear(channels, 3 * channels, axes=("conv_in", "conv_out"), **options)
        self.projection = Linear(channels, channels, axes=("conv_in", "conv_out"), **options)

    def __call__(self, x: jax.Array, sharding: SpatialSharding) -> jax.Array:
        """[B, T, H, W, C] -> the same shape."""
        batch, time, height, width, _ = x.shape
        query, key, value = jnp.split(self.qkv(self.norm(x)), 3, axis=-1)
        key, value = (rearrange(sharding.join(y), "b t h w c -> (b t) (h w) 1 c") for y in (key, value))
        row_bytes = 4 * batch * time * width * key.shape[1]
        rows = max(n for n in range(1, height + 1) if height % n == 0 and (n == 1 or n * row_bytes <= LOGITS_BYTES))
        y = lax.map(
            lambda band: attention(band, key, value, implementation="reference"),
            rearrange(query, "b t (n rows) w c -> n (b t) (rows w) 1 c", rows=rows),
        )
        y = rearrange(y, "n (b t) (rows w) 1 c -> b t (n rows) w c", b=batch, rows=rows)
        return x + self.projection(y)


class Middle(nnx.Module):
    """The blocks at the lowest resolution, the only ones with attention."""

    def __init__(self, channels: int, **options: Unpack[Options]):
        self.block_1 = ResidualBlock(channels, channels, **options)
        self.attention = AttentionBlock(channels, **options)
        self.block_2 = ResidualBlock(channels, channels, **options)

    def __call__(self, x: jax.Array, cache: CausalCache) -> jax.Array:
        """[B, T, H, W, C] -> the same shape."""
        return self.block_2(self.attention(self.block_1(x, cache), cache.sharding), cache)


class Downsample(nnx.Module):
    """Halves height and width, and time where asked."""

    def __init__(self, channels: int, temporal: bool, **options: Unpack[Options]):
        self.conv = SpatialConv(channels, channels, stride=2, **options)
        self.time_conv = CausalConv(channels, channels, (3, 1, 1), 2, **options) if temporal else None

    def __call__(self, x: jax.Array, cache: CausalCache) -> jax.Array:
        """[B, T, H, W, C] -> [B, T or T / 2, H / 2, W / 2, C]; the first frame stays one frame."""
        x = self.conv(x, cache.sharding)
        if self.time_conv is None:
            return x
        if cache.is_first_frame:
            cache.write((x,))
            return x
        return self.time_conv(x, cache)


class Upsample(nnx.Module):
    """Doubles time where asked, then height and width."""

    def __init__(self, in_channels: int, out_channels: int, temporal: bool, **options: Unpack[Options]):
        self.time_conv = CausalConv(in_channels, 2 * in_channels, (3, 1, 1), **options) if temporal else None
        self.conv = SpatialConv(in_channels, out_channels, **options)

    def __call__(self, x: jax.Array, cache: CausalCache) -> jax.Array:
        """[B, T, H, W, C_in] -> [B, T or 2 T, 2 H, 2 W, C_out]; the first frame stays one frame."""
        if self.time_conv is not None:
            if cache.is_first_frame:
                # The original's time convolution never sees the first frame: zeros stand before the second.
                self.time_conv.write_zeros(x, cache)
            else:
                x = rearrange(self.time_conv(x, cache), "b t h w (two c) -> b (t two) h w c", two=2)
        x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
        return self.conv(x, cache.sharding)


class EncoderStage(nnx.Module):
    """Residual blocks at one resolution, then the way to the next lower one; with `residual`, a shortcut beside all."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        temporal: bool | None,
        num_blocks: int,
        residual: bool,
        **options: Any,
    ):
        """`temporal`: whether the downsampling covers time too; None on the last stage, which does not downsample."""
        widths = itertools.pairwise([in_channels, *[out_channels] * num_blocks])
        self.blocks = nnx.List(ResidualBlock(*pair, **options) for pair in widths)
        self.downsample = None if temporal is None else Downsample(out_channels, temporal, **options)
        self.temporal, self.residual = temporal, residual

    def __call__(self, x: jax.Array, cache: CausalCache) -> jax.Array:
        y = x
        for block in self.blocks:
            y = block(y, cache)
        if self.downsample is not None:
            y = self.downsample(y, cache)
        if self.residual:
            space = 1 if self.temporal is None else 2
            shortcut = avg_down_3d(x, y.shape[-1], time=2 if self.temporal else 1, space=space)
            y = lax.optimization_barrier(y + shortcut)
        return y


class DecoderStage(nnx.Module):
    """Residual blocks at one resolution, then the way to the next higher one; with `residual`, a shortcut beside all.

    The last stage stays at its resolution and has no shortcut.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        temporal: bool | None,
        num_blocks: int,
        residual: bool,
        **options: Any,
    ):
        """`temporal`: whether the upsampling covers time too; None on the last stage, which does not upsample."""
        widths = itertools.pairwise([in_channels, *[out_channels] * num_blocks])
        self.blocks = nnx.List(ResidualBlock(*pair, **options) for pair in widths)
        # Without shortcuts upsampling halves the channels; the next stage's first block takes them up.
        upsampled = out_channels if residual else out_channels // 2
        self.upsample = None if temporal is None else Upsample(out_channels, upsampled, temporal, **options)
        self.temporal, self.residual = temporal, residual

    def __call__(self, x: jax.Array, cache: CausalCache) -> jax.Array:
        y = x
        for block in self.blocks:
            y = block(y, cache)
        if self.upsample is None:
            return y
        y = self.upsample(y, cache)
        if self.residual:
            shortcut = dup_up_3d(x, y.shape[-1], time=2 if self.temporal else 1, space=2)
            # The first frame stays one frame: its last copy.
            y = lax.optimization_barrier(y + shortcut[:, -y.shape[1] :])
        return y


class Encoder(nnx.Module):
    """Frames to the moments (mean, log variance) of the latents, before `quant_conv`."""

    def __init__(self, config: VAEConfig, **options: Unpack[Options]):
        stages = config.encoder_stages
        first, last = stages[0][0], stages[-1][1]
        self.conv_in = CausalConv(config.image_channels, first, **options)
        self.stages = nnx.List(
            EncoderStage(*stage, config.num_res_blocks, config.residual, **options) for stage in stages
        )
        self.middle = Middle(last, **options)
        self.norm_out = ChannelNorm(last, **options)
        self.conv_out = CausalConv(last, 2 * config.z_dim, **options)
        self.full_rate_stages = config.full_rate_stages

    def __call__(self, x: jax.Array, cache: CausalCache) -> jax.Array:
        """[B, F, H, W, image_channels] -> [B, T, h, w, 2 z]."""
        x = cache.in_slices(self.full_rate, x, FRAMES_AT_ONCE)
        for stage in self.stages[self.full_rate_stages :]:
            x = stage(x, cache)
        x = self.middle(x, cache)
        return self.conv_out(nnx.silu(self.norm_out(x)), cache)

    def full_rate(self, x: jax.Array, cache: CausalCache) -> jax.Array:
        """The layers before time is first halved."""
        x = self.conv_in(x, cache)
        for stage in self.stages[: self.full_rate_stages]:
            x = stage(x, cache)
        return x


class Decoder(nnx.Module):
    """Latents, after `post_quant_conv`, to frames."""

    def __init__(self, config: VAEConfig, **options: Unpack[Options]):
        stages = config.decoder_stages
        first, last = stages[0][0], stages[-1][1]
        self.conv_in = CausalConv(config.z_dim, first, **options)
        self.middle = Middle(first, **options)
        self.stages = nnx.List(
            DecoderStage(*stage, config.num_res_blocks + 1, config.residual, **options) for stage in stages
        )
        self.norm_out = ChannelNorm(last, **options)
        self.conv_out = CausalConv(last, config.image_channels, **options)
        self.full_rate_stages = 1 + config.full_rate_stages

    def __call__(self, x: jax.Array, cache: CausalCache) -> jax.Array:
        """[B, T, h, w, z] -> [B, F, H, W, image_channels]."""
        x = self.conv_in(x, cache)
        x = self.middle(x, cache)
        for stage in self.stages[: -self.full_rate_stages]:
            x = stage(x, cache)
        # A tile's cache is smaller, which leaves memory for two frames in bfloat16.
        several = 4 // jnp.dtype(self.conv_in.dtype).itemsize if cache.sharding.tiles > 1 else 1
        return cache.in_slices(self.full_rate, x, several * FRAMES_AT_ONCE)

    def full_rate(self, x: jax.Array, cache: CausalCache) -> jax.Array:
        """The layers after time is last doubled."""
        for stage in self.stages[-self.full_rate_stages :]:
            x = stage(x, cache)
        return self.conv_out(nnx.silu(self.norm_out(x)), cache)


class VAE(nnx.Module):
    """The video VAE: normalised latents [B, z, T, h, w] to and from frames [B, F, H, W, 3] in [-1, 1], both float32.

    F = 1 + temporal_stride * (T - 1), H = spatial_stride * h, W = spatial_stride * w. `encode` and `decode` scan over
    time. `encode_step` and `decode_step` are their steps, for a loop on the host:

        cache = None
        for t in range(latents.shape[2]):
            frames, cache = vae.decode_step(cache, latents[:, :, t : t + 1])

    A cache is a tuple of arrays in `dtype`, of the same shapes after every step of one direction: donate it.
    In bfloat16 norms, SiLU, the sums over time taps and those of residual blocks stay float32. The latents'
    distribution is never sampled: encoding gives its mean, as in all Wan pipelines. A wrong shape raises ValueError.

    Inside `jax.shard_map` each device computes its tile of the frames (parallel/tiles.py): inputs and outputs are
    replicated, the cache's arrays are in tiles (`tiles.TILES`).
    """

    def __init__(self, config: VAEConfig, *, dtype: DTypeLike, param_dtype: DTypeLike | None = None, rngs: nnx.Rngs):
        options = Options(dtype=dtype, param_dtype=dtype if param_dtype is None else param_dtype, rngs=rngs)
        self.encoder = Encoder(config, **options)
        self.quant_conv = CausalConv(2 * config.z_dim, 2 * config.z_dim, (1, 1, 1), **options)
        self.post_quant_conv = CausalConv(config.z_dim, config.z_dim, (1, 1, 1), **options)
        self.decoder = Decoder(config, **options)
        self.config = config

    def encode(self, frames: jax.Array, *, chunk: int = 1) -> jax.Array:
        """[B, F, H, W, 3] in [-1, 1] -> [B, z, T, h, w].

        `chunk` latent frames are made per scan step: more memory, the same result. Raises ValueError where F is not
        1 + a multiple of the temporal stride, or H or W no multiple of the spatial stride.
        """
        stride = self.config.temporal_stride
        latents = scan_over_time(self._encode, frames, in_stride=stride, out_stride=1, chunk=chunk)
        return rearrange(latents, "b t h w z -> b z t h w")

    def encode_step(self, cache: CacheArrays | None, frames: jax.Array) -> tuple[jax.Array, CacheArrays]:
        """The next frames [B, k * temporal_stride, H, W, 3] -> [B, z, k, h, w], and the next cache.

        Without a cache it takes the first frame alone, [B, 1, H, W, 3] -> [B, z, 1, h, w].
        """
        latents, cache = self._encode(cache, frames)
        return rearrange(latents, "b t h w z -> b z t h w"), cache

    def decode(self, latents: jax.Array, *, chunk: int = 1) -> jax.Array:
        """[B, z, T, h, w] -> [B, F, H, W, 3] around [-1, 1], not clamped.

        `chunk` latent frames are decoded per scan step: more memory, the same result.
        """
        stride = self.config.temporal_stride
        return scan_over_time(self._decode, self._channels_last(latents), in_stride=1, out_stride=stride, chunk=chunk)

    def decode_step(self, cache: CacheArrays | None, latents: jax.Array) -> tuple[jax.Array, CacheArrays]:
        """The next latent frames [B, z, k, h, w] -> [B, k * temporal_stride, H, W, 3], and the next cache.

        Without a cache it takes the first latent frame alone, [B, z, 1, h, w] -> [B, 1, H, W, 3].
        """
        return self._decode(cache, self._channels_last(latents))

    def _encode(self, arrays: CacheArrays | None, frames: jax.Array) -> tuple[jax.Array, CacheArrays]:
        """`encode_step`, channels-last."""
        stride = self.config.spatial_stride
        if frames.ndim != 5 or frames.shape[-1] != 3 or frames.shape[2] % stride or frames.shape[3] % stride:
            raise ValueError(
                f"cannot encode frames of shape {frames.shape}; give [batch, frames, height, width, 3] with height and "
                f"width divisible by {stride}"
            )
        _check_step(arrays, frames, self.config.temporal_stride)
        sharding = SpatialSharding.of(frames, stride)
        cache = CausalCache(arrays, sharding)
        moments = self.encoder(pixel_unshuffle(sharding.split(frames), self.config.patch_size), cache)
        moments = sharding.join(self.quant_conv(moments, cache))
        latents_mean, reciprocal_std = self._normalisation
        return (moments[..., : self.config.z_dim].astype(jnp.float32) - latents_mean) * reciprocal_std, cache.arrays

    def _decode(self, arrays: CacheArrays | None, latents: jax.Array) -> tuple[jax.Array, CacheArrays]:
        """`decode_step`, channels-last."""
        _check_step(arrays, latents, 1)
        sharding = SpatialSharding.of(latents)
        cache = CausalCache(arrays, sharding)
        latents_mean, reciprocal_std = self._normalisation
        latents = sharding.split(latents).astype(jnp.float32) / reciprocal_std + latents_mean
        frames = self.decoder(self.post_quant_conv(latents, cache), cache).astype(jnp.float32)
        return sharding.join(pixel_shuffle(frames, self.config.patch_size)), cache.arrays

    def _channels_last(self, latents: jax.Array) -> jax.Array:
        z_dim = self.config.z_dim
        if latents.ndim != 5 or latents.shape[1] != z_dim:
            raise ValueError(
                f"cannot decode latents of shape {latents.shape}; give [batch, {z_dim}, time, height, width]"
            )
        return rearrange(latents, "b z t h w -> b t h w z")

    @property
    def _normalisation(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and 1 / std of the latents' channels. The original, too, rounds the reciprocal and divides by it."""
        mean, std = np.array((self.config.latents_mean, self.config.latents_std), np.float32)
        return mean, np.float32(1) / std


def _check_step(cache: CacheArrays | None, x: jax.Array, stride: int) -> None:
    length = x.shape[1]
    if cache is None and length != 1:
        raise ValueError(f"the first step of the VAE takes one frame; it got {length}")
    if cache is not None and (length == 0 or length % stride):
        raise ValueError(f"a later step of the VAE takes a multiple of {stride} frames; it got {length}")
