"""The VAE at work: latents to frames and back, a chunk at a time."""

import functools
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from wan_jax.errors import InputError, check_finite
from wan_jax.fields import integer
from wan_jax.media.preview import PreviewFilter, fit_preview
from wan_jax.media.video import check_frames
from wan_jax.models.nn.causal_conv import CacheArrays
from wan_jax.models.vae import VAE
from wan_jax.parallel.placement import Placement
from wan_jax.parallel.tiles import TILES, frame_mesh
from wan_jax.runtime.compiled import CompiledFunction
from wan_jax.runtime.events import FramesDecoded, Run
from wan_jax.runtime.offload import Memory


class Codec:
    """Decodes and encodes videos with one VAE. Device memory does not grow with a video's length."""

    def __init__(self, vae: VAE, exact: bool, memory: Memory, placement: Placement):
        """
        Args:
            exact: see `decode_function`.
        """
        self.vae = vae
        self._decode, self._encode = decode_function(exact, placement), encode_function(exact, placement)
        self._filter: PreviewFilter | None = None
        self._lock = threading.Lock()
        self._memory, self._placement = memory, placement

    def decode(self, latents: ArrayLike, run: Run, *, chunk: int | None = None, video: int = 0) -> Iterator[np.ndarray]:
        """Yields the frames of one video, uint8 [n, H, W, 3], while the next are decoded.

        Args:
            latents: float32 [C, F', h, w].
            run: is told of every chunk.
            chunk: latent frames decoded at a time. None takes one for each device: tiles leave memory for them, and one
                halo exchange serves them all.
            video: which video of a batch this is, for the events.
        """
        host = np.asarray(latents)
        if host.ndim != 4 or host.shape[0] != self.vae.config.z_dim or not host.size or host.dtype.kind in "OSUc":
            what = f"{host.dtype} of shape {host.shape}"
            raise InputError(f"latents are {what}; give float32 [{self.vae.config.z_dim}, F', h, w]")
        if not np.isfinite(host).all():
            raise InputError("latents hold NaN or infinity; give finite numbers")
        if (chunk := self._placement.mesh_spec.devices if chunk is None else integer("chunk", chunk)) < 1:
            raise InputError(f"chunk {chunk}: give at least 1")
        placed = self._placement.put(host[None])
        count = placed.shape[2]
        total, done = 1 + self.vae.config.temporal_stride * (count - 1), 0

        def fetch(decoded: tuple[jax.Array, jax.Array]) -> np.ndarray:
            nonlocal done
            frames, is_finite = decoded
            host = np.asarray(frames)
            check_finite(is_finite, "the VAE's decoded frames")
            del decoded, frames
            done += len(host)
            run.emit(FramesDecoded(host, done, total, video))
            return host

        with self._memory.on_device(self.vae) as vae, run.stage("decode", total):
            frames: Any = None
            following: Any = None
            cache = None
            try:
                for start, stop in pairwise([0, *range(1, count, chunk), count]):
                    run.check()
                    following, cache = run.call(self._decode, vae, cache, placed[:, :, start:stop])
                    if frames is not None:
                        yield fetch(frames)
                    frames = following
                yield fetch(frames)
            finally:
                del frames, following, cache, placed  # a traceback keeps this frame

    def preview(self, latents: np.ndarray) -> np.ndarray:
        """Clean latents [B, C, F', h, w] -> a small picture of each latent frame, uint8 [B, F', h, w, 3].

        The first call fits a linear filter to the VAE, which takes a second (media/preview.py).
        """
        with self._lock:
            if self._filter is None:
                self._filter = fit_preview(lambda frames: self.encode(frames, Run(lambda event: None)), self.vae.config)
        return np.stack([self._filter(video) for video in latents])

    def encode(self, frames: ArrayLike, run: Run) -> np.ndarray:
        """Frames of one video [F, H, W, 3], uint8 or in [-1, 1] -> latents, float32 [C, F', h, w].

        Frames go to the device one latent frame's worth at a time, while those before are encoded.

        Raises:
            InputError: frames of another shape, dtype or range.
        """
        frames, stride = check_frames(np.asarray(frames), self.vae.config), self.vae.config.temporal_stride
        encoded: list[np.ndarray] = []
        with self._memory.on_device(self.vae) as vae, run.stage("encode", 1 + (len(frames) - 1) // stride):
            cache = None
            pending: list[jax.Array] = []
            try:
                for start, stop in pairwise([0, *range(1, len(frames), stride), len(frames)]):
                    run.check()
                    latents, cache = run.call(self._encode, vae, cache, self._placement.put(frames[start:stop]))
                    # Waits for the latents before, so that the frames of one step at most are on their way.
                    encoded += map(np.asarray, pending)
                    run.progress("encode", len(encoded))
                    pending = [latents]
                encoded += map(np.asarray, pending)
                run.progress("encode", len(encoded))
            finally:
                del cache, pending  # a traceback keeps this frame
        latents = np.concatenate(encoded, axis=1)
        check_finite(np.isfinite(latents).all(), "the VAE's encoded latents")
        return latents


@functools.cache
def decode_function(exact: bool, placement: Placement) -> CompiledFunction:
    """(vae, cache or None, latents [1, z, k, h, w]) -> ((uint8 frames [F, H, W, 3], all finite), cache); see `VAE`.

    Args:
        exact: keeps float32 float32. Beside a bfloat16 denoiser it may be TF32 (on TPUs three passes of bfloat16), as
            in PyTorch's convolutions by default.
        placement: on a mesh each device has a tile of each frame; frames, latents and the VAE are whole on each.
    """
    return _on_tiles(_decode, exact, placement)


@functools.cache
def encode_function(exact: bool, placement: Placement) -> CompiledFunction:
    """(vae, cache or None, frames [F, H, W, 3], uint8 or floats in [-1, 1]) -> (latents [z, k, h, w], cache)."""
    return _on_tiles(_encode, exact, placement)


def _decode(vae: VAE, cache: CacheArrays | None, latents: jax.Array) -> tuple[tuple[jax.Array, jax.Array], CacheArrays]:
    frames, cache = vae.decode_step(cache, latents)
    is_finite = jnp.isfinite(frames).all()
    # Truncated to whole levels, as the official code does.
    return (((jnp.clip(frames[0], -1.0, 1.0) + 1.0) / 2.0 * 255.0).astype(jnp.uint8), is_finite), cache


def _encode(vae: VAE, cache: CacheArrays | None, frames: jax.Array) -> tuple[jax.Array, CacheArrays]:
    if frames.dtype == jnp.uint8:
        frames = (frames.astype(jnp.float32) / 255.0 - 0.5) / 0.5
    latents, cache = vae.encode_step(cache, frames.astype(jnp.float32)[None])
    return latents[0], cache


def _on_tiles(function: Callable, exact: bool, placement: Placement) -> CompiledFunction:
    @functools.wraps(function)
    def run(vae: VAE, cache: CacheArrays | None, x: jax.Array) -> Any:
        if placement.is_single:
            return function(vae, cache, x)
        height, width = x.shape[-2:] if x.ndim == 5 else (side // vae.config.spatial_stride for side in x.shape[1:3])
        mesh = frame_mesh(placement.devices, height, width)
        in_specs, out_specs = (P(), TILES, P()), (P(), TILES)
        on_tiles = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        return on_tiles(vae, cache, x)

    return CompiledFunction(run, matmul_precision=None if exact else "tensorfloat32", donate_argnums=(1,))
