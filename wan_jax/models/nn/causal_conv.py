"""The causal convolution cache: what convolutions over time keep, so that a video can pass in chunks of frames."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax

from wan_jax.parallel.tiles import SpatialSharding

# Nested tuples of frames [B, 1, H, W, C]: what each temporal convolution needs of the past, in the network's order.
# Frames are arrays of their own, so that a step can write the new ones into the memory of the old ones.
CacheArrays = tuple[Any, ...]


class CausalCache:
    """The caches of all temporal convolutions during one pass: each reads its own and writes that of the next call.

    Args:
      arrays: what the call before wrote; None for the first frame, which zeros precede.
      sharding: how the frames of this pass are split over a mesh.
    """

    def __init__(self, arrays: CacheArrays | None, sharding: SpatialSharding):
        self.sharding = sharding
        self.is_first_frame = arrays is None
        self.previous: Iterator[Any] = iter(arrays or ())
        self.written: list[Any] = []

    def read(self, like: jax.Array, frames: int) -> tuple[jax.Array, ...]:
        """The next convolution's cache: `frames` times [B, 1, H, W, C], as a frame of `like`."""
        return (jnp.zeros_like(like[:, :1]),) * frames if self.is_first_frame else next(self.previous)

    def write(self, frames: tuple[jax.Array, ...]) -> None:
        self.written.append(frames)

    def force_write(self, x: jax.Array) -> jax.Array:
        """Returns x after forcing the last write.

        XLA would otherwise delay it to the end of the step and keep its operands alive until then.
        """
        if self.written:
            x, self.written[-1] = lax.optimization_barrier((x, self.written[-1]))
        return x

    def in_slices(
        self, function: Callable[[jax.Array, "CausalCache"], jax.Array], x: jax.Array, frames: int
    ) -> jax.Array:
        """function(x, cache), run on few frames of x [B, T, ...] at a time, to hold less at once.

        `frames` counts whole frames. A slice of tiled frames has as many more as there are tiles: a device holds the
        same, and neighbours exchange halos less often.
        """
        frames = max(count for count in range(1, frames * self.sharding.tiles + 1) if x.shape[1] % count == 0)

        def step(arrays: CacheArrays | None, x: jax.Array) -> tuple[CacheArrays, jax.Array]:
            cache = CausalCache(arrays, self.sharding)
            y = function(x, cache)
            return cache.arrays, y

        arrays: Any = None if self.is_first_frame else next(self.previous)
        if x.shape[1] <= frames:
            arrays, y = step(arrays, x)
        else:
            arrays, y = lax.scan(step, arrays, rearrange(x, "b (n frames) h w c -> n b frames h w c", frames=frames))
            y = rearrange(y, "n b frames h w c -> b (n frames) h w c")
        self.written.append(arrays)
        return y

    @property
    def arrays(self) -> CacheArrays:
        """What was written, for the next call."""
        return tuple(self.written)


def overlap_add(taps: list[jax.Array], past: tuple[jax.Array, ...]) -> tuple[list[jax.Array], tuple[jax.Array, ...]]:
    """Adds up every tap's result for every frame, each at its place in time.

    The last tap's results belong to the frames they were computed from, those of the tap before it to one frame later,
    and so on. So earlier frames need not be kept, only what they contribute.

    Args:
      taps: of [B, T, H, W, C] each.
      past: len(taps) - 1 times [B, 1, H, W, C], what earlier frames contribute to the first of these.

    Returns:
      The sums for the T frames, and what these contribute to later frames: the next call's `past`. In float32.
    """
    length, later = taps[0].shape[1], len(taps) - 1

    def total(t: int) -> jax.Array:
        parts = [past[t]] if t < later else []
        for tap, x in enumerate(taps):
            source = t - (later - tap)
            if 0 <= source < length:
                parts.append(x[:, source : source + 1])
        return sum_float32(parts)

    totals = [total(t) for t in range(length + later)]
    return totals[:length], tuple(totals[length:])


def sum_float32(parts: list[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, [part.astype(jnp.float32) for part in parts])


def scan_over_time(
    step: Callable[[CacheArrays | None, jax.Array], tuple[jax.Array, CacheArrays]],
    x: jax.Array,
    *,
    in_stride: int,
    out_stride: int,
    chunk: int,
) -> jax.Array:
    """Runs `step` on the first frame of x [B, T, ...], then on `chunk * in_stride` frames at a time.

    The result is a carry into which each step writes its `chunk * out_stride` frames, not the scan's stacked output, so
    the video is never copied.
    """
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; give at least 1")
    first, cache = step(None, x[:, :1])
    if (x.shape[1] - 1) % in_stride:
        raise ValueError(f"the VAE cannot take {x.shape[1]} frames; give 1 + a multiple of {in_stride}")
    steps = (x.shape[1] - 1) // in_stride
    output = jnp.pad(first, [(0, 0), (0, steps * out_stride), *[(0, 0)] * (first.ndim - 2)])

    def body(carry: tuple[CacheArrays, jax.Array], start: int | jax.Array, length: int = chunk):
        cache, output = carry
        y, cache = step(cache, lax.dynamic_slice_in_dim(x, 1 + start * in_stride, length * in_stride, axis=1))
        return (cache, lax.dynamic_update_slice_in_dim(output, y, 1 + start * out_stride, axis=1)), None

    carry = (cache, output)
    whole = steps - steps % chunk
    if whole:
        carry, _ = lax.scan(body, carry, jnp.arange(0, whole, chunk))
    if whole < steps:
        carry, _ = body(carry, whole, steps - whole)
    return carry[1]
