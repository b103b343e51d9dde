"""The VAE at work: latents to frames and back, a chunk at a time."""

import threading
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from wan_jax.media.preview import PreviewFilter, fit_preview
from wan_jax.media.video import check_frames
from wan_jax.models.compiled import CompiledModels
from wan_jax.models.vae import VAE
from wan_jax.parallel.placement import Placement
from wan_jax.runtime.events import FramesDecoded, Run
from wan_jax.runtime.offload import Memory


class Codec:
    """Decodes and encodes videos with one VAE. Device memory does not grow with a video's length."""

    def __init__(self, vae: VAE, programs: CompiledModels, memory: Memory, placement: Placement):
        self.vae = vae
        self._filter: PreviewFilter | None = None
        self._lock = threading.Lock()
        self._programs, self._memory, self._placement = programs, memory, placement

    def decode(self, latents: ArrayLike, run: Run, *, chunk: int | None = None, video: int = 0) -> Iterator[np.ndarray]:
        """Yields the frames of one video, uint8 [n, H, W, 3], while the next are decoded.

        Args:
            latents: float32 [C, F', h, w].
            run: is told of every chunk.
            chunk: latent frames decoded at a time; None takes one for each device.
            video: which video of a batch this is, for the events.
        """
        placed = self._placement.put(np.asarray(latents)[None])
        count, chunk = placed.shape[2], chunk or self._programs.decode_chunk
        total, done = 1 + self.vae.config.temporal_stride * (count - 1), 0

        def fetch(frames: jax.Array) -> np.ndarray:
            nonlocal done
            host = np.asarray(frames)
            done += len(host)
            run.emit(FramesDecoded(host, done, total, video))
            return host

        with self._memory.on_device(self.vae) as vae, run.stage("decode", total):
            frames: Any = None
            cache = None
            for start, stop in pairwise([0, *range(1, count, chunk), count]):
                run.check()
                following, cache = run.call(self._programs.decode, vae, cache, placed[:, :, start:stop])
                if frames is not None:
                    yield fetch(frames)
                frames = following
            yield fetch(frames)

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
            for start, stop in pairwise([0, *range(1, len(frames), stride), len(frames)]):
                run.check()
                latents, cache = run.call(self._programs.encode, vae, cache, self._placement.put(frames[start:stop]))
                # Waits for the latents before, so that the frames of one step at most are on their way to the device.
                encoded += map(np.asarray, pending)
                run.progress("encode", len(encoded))
                pending = [latents]
            encoded += map(np.asarray, pending)
            run.progress("encode", len(encoded))
        return np.concatenate(encoded, axis=1)
