"""The compiled functions of a pipeline's models, but for the denoising step (diffusion/step.py)."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from wan_jax.models.image_encoder import ImageEncoder
from wan_jax.models.nn.causal_conv import CacheArrays
from wan_jax.models.text_encoder import TextEncoder
from wan_jax.models.vae import VAE
from wan_jax.parallel.placement import SINGLE, Placement
from wan_jax.parallel.sharding import state_specs
from wan_jax.parallel.tiles import TILES, frame_mesh
from wan_jax.runtime.compiled import CompiledFunction
from wan_jax.runtime.xla_flags import TEXT_ENCODER_OPTIONS


class CompiledModels:
    """What a pipeline compiles, but for the denoising step (diffusion/step.py).

    `exact` keeps the float32 of the VAE float32. Beside a bfloat16 denoiser it may use TF32 (on TPUs three passes of
    bfloat16), as PyTorch's convolutions do by default. On a mesh all devices work together: on a prompt, each with a
    part of the encoder, and on a frame, each on a tile; frames, latents and the VAE's parameters are whole on each.
    """

    def __init__(self, exact: bool, placement: Placement = SINGLE):
        self.encode_text = CompiledFunction(_text_encoding(placement), compiler_options=TEXT_ENCODER_OPTIONS)
        self.encode_image = CompiledFunction(_encode_image)

        def vae_function(function: Callable) -> CompiledFunction:
            precision = None if exact else "tensorfloat32"
            return CompiledFunction(_in_tiles(function, placement), matmul_precision=precision, donate_argnums=(1,))

        # Latent frames decoded at once: tiles leave memory for as many as there are devices, and one halo exchange
        # serves them all.
        self.decode_chunk = placement.mesh_spec.devices
        # (vae, cache or None, latents or frames) -> (frames or latents, cache); see `VAE`.
        self.decode = vae_function(_decode)
        self.encode = vae_function(_encode)


def _text_encoding(placement: Placement) -> Callable:
    def encode_text(encoder: TextEncoder, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        graphdef, state = nnx.split(encoder)
        parts = placement.for_text(encoder.config)

        def encode(state: nnx.State, tokens: jax.Array, mask: jax.Array) -> jax.Array:
            return nnx.merge(graphdef, state)(tokens, mask)

        return parts.run(encode, (state_specs(state), P(), P()), P())(state, tokens, mask)

    return encode_text


def _encode_image(encoder: ImageEncoder, images: jax.Array) -> jax.Array:
    return encoder(images)


def _decode(vae: VAE, cache: CacheArrays | None, latents: jax.Array) -> tuple[jax.Array, CacheArrays]:
    """[1, z, k, h, w] -> uint8 [F, H, W, 3], truncated as the official code does."""
    frames, cache = vae.decode_step(cache, latents)
    return ((jnp.clip(frames[0], -1.0, 1.0) + 1.0) / 2.0 * 255.0).astype(jnp.uint8), cache


def _encode(vae: VAE, cache: CacheArrays | None, frames: jax.Array) -> tuple[jax.Array, CacheArrays]:
    """[F, H, W, 3], uint8 or floats in [-1, 1] -> [z, k, h, w]."""
    if frames.dtype == jnp.uint8:
        frames = (frames.astype(jnp.float32) / 255.0 - 0.5) / 0.5
    latents, cache = vae.encode_step(cache, frames.astype(jnp.float32)[None])
    return latents[0], cache


def _in_tiles(function: Callable, placement: Placement) -> Callable:
    """One of the VAE's functions, on all devices."""
    if placement.is_single:
        return function

    @wraps(function)
    def run(vae: VAE, cache: CacheArrays | None, x: jax.Array) -> Any:
        height, width = x.shape[-2:] if x.ndim == 5 else (side // vae.config.spatial_stride for side in x.shape[1:3])
        mesh = frame_mesh(placement.devices, height, width)
        in_specs, out_specs = (P(), TILES, P()), (P(), TILES)
        on_tiles = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        return on_tiles(vae, cache, x)

    return run
