"""What models need, by formula: floating-point operations, and of the VAE also device memory beside weights and cache.

The VAE's operations are those of its convolutions; attention and the 1x1x1 convolutions are 1 % beside them. Its memory
is what XLA:GPU's analysis says of the compiled steps, and a little more: the tests hold the figures.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jax.typing import DTypeLike

from wan_jax.config import DenoiserConfig, VAEConfig

TAPS = 27  # of a 3x3x3 convolution


@dataclass(frozen=True)
class Rates:
    """Measured speeds of one kind of device."""

    denoiser: float  # FLOP/s of a bfloat16 forward, attention included
    text: float  # FLOP/s of the text encoder
    vae: float  # FLOP/s of decoding in float32 with TF32
    vae_bfloat16: float
    copy: float  # bytes per second from pinned host memory


# In benchmarks/results: denoiser_h200_parts.json (denoiser, text, VAE in bfloat16), generate_full_size_h200.json (in
# float32) and profiles_h200.json (copies, over PCIe 5). An H100 has the same arithmetic units.
_HOPPER = Rates(denoiser=690e12, text=285e12, vae=175e12, vae_bfloat16=377e12, copy=55e9)
RATES: dict[str, Rates] = {"NVIDIA H200": _HOPPER, "NVIDIA H100 80GB HBM3": _HOPPER}


def denoiser_flops(config: DenoiserConfig, tokens: int) -> float:
    """Floating-point operations of one forward: products of the blocks, and both products of attention."""
    projections = 2 * tokens * config.dim * (6 * config.dim + 2 * config.ffn_dim)
    attention = 4 * tokens * (tokens + config.text_length) * config.dim
    return config.num_layers * (projections + attention)


def decode_flops(config: VAEConfig, pixels: int) -> float:
    """Floating-point operations of decoding `pixels` (frames * height * width) of video."""
    stages, blocks = config.decoder_stages, config.num_res_blocks + 1
    first, last = stages[0][0], stages[-1][1]
    places = pixels / (config.temporal_stride * config.spatial_stride**2)  # positions in time and space at a stage
    products = places * TAPS * (config.z_dim * first + 4 * first**2)
    for stage, (before, inside, temporal) in enumerate(stages):
        products += places * TAPS * (before * inside + (2 * blocks - 1) * inside**2)
        if temporal is None:
            continue
        if temporal:
            products += places * 3 * inside * 2 * inside
            places *= 2
        places *= 4
        products += places * 9 * inside * stages[stage + 1][0]
    return 2 * (products + places * TAPS * last * config.image_channels)


def encode_flops(config: VAEConfig, pixels: int) -> float:
    """Floating-point operations of encoding `pixels` (frames * height * width) of video."""
    stages, blocks = config.encoder_stages, config.num_res_blocks
    first, last = stages[0][0], stages[-1][1]
    places = pixels / config.patch_size**2
    products = places * TAPS * config.image_channels * first
    for before, inside, temporal in stages:
        products += places * TAPS * (before * inside + (2 * blocks - 1) * inside**2)
        if temporal is None:
            continue
        places /= 4
        products += places * 9 * inside**2
        if temporal:
            places /= 2
            products += places * 3 * inside**2
    return 2 * (products + places * TAPS * (4 * last**2 + last * 2 * config.z_dim))


def decode_workspace(config: VAEConfig, dtype: DTypeLike, width: int, height: int, frames: int = 1) -> int:
    """Bytes that decoding one latent frame takes beside weights and cache.

    The larger of two: at full resolution, seven arrays of `frames` at once around a residual block, and one in
    float32; where time is doubled for the last time, all frames of a step before and after the convolution that
    follows, and their sum in float32. The kernels of the layers that take one frame at a time come on top: they are
    rearranged first.
    """
    item = jnp.dtype(dtype).itemsize
    stages, late = config.decoder_stages, config.full_rate_stages + 1
    pixels = width * height // config.patch_size**2
    memory = frames * pixels * stages[-1][1] * (7 * item + 4)
    if late < len(stages):
        doubled = config.temporal_stride * stages[-late][0] * pixels // 4 ** (late - 1)
        memory = max(memory, int(doubled * (2 * item + 4.5)))
    blocks = config.num_res_blocks + 1
    kernels = sum(TAPS * (before * inside + (2 * blocks - 1) * inside**2) for before, inside, _ in stages[-late:])
    return memory + item * kernels


def encode_workspace(config: VAEConfig, dtype: DTypeLike, width: int, height: int, frames: int) -> int:
    """Bytes that encoding takes beside weights and cache.

    Of one frame alone, the first convolution's result, in the dtype and in float32. Of several, five arrays of all
    frames of a step, and one and a half in float32, in the first stage that takes them at once.
    """
    item = jnp.dtype(dtype).itemsize
    pixels = width * height // config.patch_size**2
    if frames == 1:
        return int(pixels * config.base_dim * (item + 4.2))
    early = min(config.full_rate_stages, len(config.encoder_stages) - 1)
    together = config.temporal_stride * config.encoder_stages[early][1] * pixels // 4**early
    return together * (5 * item + 6)
