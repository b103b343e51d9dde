"""The compiled functions of a pipeline's models, but for the denoising step (diffusion/step.py)."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from wan_jax.models.image_encoder import ImageEncoder
from wan_jax.models.nn.causal_conv import Cache
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

        def vae_program(function: Callable, **jit_options: Any) -> CompiledFunction:
            precision = None if exact else "tensorfloat32"
            return CompiledFunction(_in_tiles(function, placement), matmul_precision=precision, **jit_options)

        # Latent frames decoded at once: tiles leave memory for as many as there are devices, and one halo exchange
        # serves them all.
        self.decode_chunk = placement.mesh_spec.devices
        self.decode_first = vae_program(_decode_first)
        self.decode_next = vae_program(_decode_next, donate_argnums=(1,))
        self.encode_first = vae_program(_encode_first)
        self.encode_next = vae_program(_encode_next, donate_argnums=(1,))


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


def _decode_first(vae: VAE, latents: jax.Array) -> tuple[jax.Array, Cache]:
    frames, cache = vae.decode_first(latents)
    return _to_uint8(frames), cache


def _decode_next(vae: VAE, cache: Cache, latents: jax.Array) -> tuple[jax.Array, Cache]:
    frames, cache = vae.decode_next(cache, latents)
    return _to_uint8(frames), cache


def _to_uint8(frames: jax.Array) -> jax.Array:
    """[1, F, H, W, 3] around [-1, 1] -> uint8 [F, H, W, 3], truncated as the official code does."""
    return ((jnp.clip(frames[0], -1.0, 1.0) + 1.0) / 2.0 * 255.0).astype(jnp.uint8)


def _encode_first(vae: VAE, frames: jax.Array) -> tuple[jax.Array, Cache]:
    latents, cache = vae.encode_first(_from_pixels(frames))
    return latents[0], cache


def _encode_next(vae: VAE, cache: Cache, frames: jax.Array) -> tuple[jax.Array, Cache]:
    latents, cache = vae.encode_next(cache, _from_pixels(frames))
    return latents[0], cache


def _from_pixels(frames: jax.Array) -> jax.Array:
    """[F, H, W, 3], uint8 or floats in [-1, 1] -> float32 [1, F, H, W, 3] in [-1, 1]."""
    if frames.dtype == jnp.uint8:
        frames = (frames.astype(jnp.float32) / 255.0 - 0.5) / 0.5
    return frames.astype(jnp.float32)[None]


def _in_tiles(function: Callable, placement: Placement) -> Callable:
    """One of the VAE's functions, (vae, [cache,] latents or frames) -> (frames or latents, cache), on all devices."""
    if placement.is_single:
        return function

    @wraps(function)
    def run(vae: VAE, *arguments: Any) -> Any:
        *cache, x = arguments
        height, width = x.shape[-2:] if x.ndim == 5 else (side // vae.config.spatial_stride for side in x.shape[1:3])
        mesh = frame_mesh(placement.devices, height, width)
        places = P(), *[TILES] * len(cache), P()
        return jax.shard_map(function, mesh=mesh, in_specs=places, out_specs=(P(), TILES), check_vma=False)(
            vae, *arguments
        )

    return run
