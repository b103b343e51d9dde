"""How given frames condition the denoise loop.

    TextOnly      no frame is given: all are made from noise
    KnownFrames   extra channels beside the noisy latents hold the given frames: I2V, first and last frame
    FirstFrame    the first latent frame is an image's, without noise and at timestep 0: TI2V

The loop calls two methods: `inputs` makes the denoiser's inputs, `restore` resets given latents after a step. All are
pytrees with a row per video, or one for all: another image is another array, and compiles nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np


class Conditioning(Protocol):
    """What the denoise loop needs."""

    def inputs(self, latents: jax.Array, timesteps: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Noisy latents [B, z, T, h, w] and timesteps [B] -> what the denoiser is called with."""

    def restore(self, latents: jax.Array) -> jax.Array:
        """Latents [B, z, T, h, w] with the given ones as they were given."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TextOnly:
    """Conditioning on the text alone."""

    def inputs(self, latents: jax.Array, timesteps: jax.Array) -> tuple[jax.Array, jax.Array]:
        return latents, timesteps

    def restore(self, latents: jax.Array) -> jax.Array:
        return latents


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KnownFrames:
    """Channels beside the latents: a mask of the given frames, and the latents of a video with those frames."""

    channels: jax.Array  # [1 or B, temporal_stride + z, T, h, w] float32, the mask first

    def inputs(self, latents: jax.Array, timesteps: jax.Array) -> tuple[jax.Array, jax.Array]:
        channels = jnp.broadcast_to(self.channels, (latents.shape[0], *self.channels.shape[1:]))
        return jnp.concatenate([latents, channels], axis=1), timesteps

    def restore(self, latents: jax.Array) -> jax.Array:
        return latents


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FirstFrame:
    """The first latent frame stays as given where `known` is true; videos with and without share one executable."""

    latents: jax.Array  # [1 or B, z, 1, h, w] float32
    known: jax.Array  # [1 or B] bool

    @classmethod
    def unknown(cls, channels: int, height: int, width: int) -> "FirstFrame":
        return cls(jnp.zeros((1, channels, 1, height, width)), jnp.zeros(1, bool))

    def inputs(self, latents: jax.Array, timesteps: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Timesteps become [B, T], one for each latent frame."""
        first = jnp.where(self.known, 0, timesteps)[:, None]
        others = jnp.broadcast_to(timesteps[:, None], (latents.shape[0], latents.shape[2] - 1))
        return latents, jnp.concatenate([first, others], axis=1)

    def restore(self, latents: jax.Array) -> jax.Array:
        """The solver's history of the first frame is left alone: it affects no other frame."""
        known = self.known[:, None, None, None, None]
        return latents.at[:, :, :1].set(jnp.where(known, self.latents, latents[:, :, :1]))


TEXT_ONLY = TextOnly()


def stack_conditioning(videos: Sequence[Conditioning]) -> Conditioning:
    """The conditioning of a batch, from that of each of its videos; what all share stays one row."""
    first, *others = videos
    if all(each is first for each in others):
        return first
    return jax.tree.map(lambda *rows: jnp.concatenate(rows), *videos)


def known_frames(latents: jax.Array, known: Sequence[int], stride: int) -> KnownFrames:
    """Conditioning on some frames of a video.

    Args:
      latents: float32 [1, z, T, h, w], normalised: the encoded video of which those frames are known. The others were
        grey (0 in [-1, 1]).
      known: their indices.
      stride: frames to a latent frame.
    """
    _, _, length, height, width = latents.shape
    mask = known_frames_mask(known, 1 + stride * (length - 1), stride)
    mask = np.broadcast_to(mask[None, :, :, None, None], (1, stride, length, height, width))
    return KnownFrames(jnp.concatenate([mask, latents], axis=1))


def known_frames_mask(known: Sequence[int], frames: int, stride: int) -> np.ndarray:
    """1 where a frame is known: float32 [stride, T], one channel for each frame in a latent frame.

    The first latent frame holds one frame alone, which fills all its channels (wan/image2video.py).
    """
    by_frame = np.zeros(frames, np.float32)
    by_frame[list(known)] = 1
    return np.concatenate([np.repeat(by_frame[:1], stride), by_frame[1:]]).reshape(-1, stride).T
