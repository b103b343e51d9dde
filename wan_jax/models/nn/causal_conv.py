"""What causal convolutions over time keep between one call and the next, so that a sequence can pass in pieces."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax

from wan_jax.errors import InputError
from wan_jax.parallel.tiles import SpatialSharding

# Nested tuples of frames [B, 1, H, W, C]: what each temporal convolution left behind, in the order of the network.
# One array a frame, so that a step can put the new ones into the old one's memory.
Cache = tuple[Any, ...]


class History:
    """Hands each temporal convolution what its past left for it, and collects what it leaves for the next call.

    It lives for one pass through the network. Without a cache the input is the first frame, preceded by zeros.
    `sharding` says how the frames of this pass are split over a mesh.
    """

    def __init__(self, cache: Cache | None, sharding: SpatialSharding):
        self.sharding = sharding
        self.is_first_frame = cache is None
        self.previous: Iterator[Any] = iter(cache or ())
        self.collected: list[Any] = []

    def recall(self, like: jax.Array, frames: int) -> tuple[jax.Array, ...]:
        """What the last call left at this point: `frames` times [B, 1, H, W, C], as a frame of `like`."""
        return (jnp.zeros_like(like[:, :1]),) * frames if self.is_first_frame else next(self.previous)

    def remember(self, frames: tuple[jax.Array, ...]) -> None:
        """Sets what will be recalled at this point."""
        self.collected.append(frames)

    def settle(self, x: jax.Array) -> jax.Array:
        """x, but not before what was remembered last is computed.

        Left to itself XLA does that at the end of a step, and holds all that it needs until then.
        """
        if self.collected:
            x, self.collected[-1] = lax.optimization_barrier((x, self.collected[-1]))
        return x

    def in_slices(self, function: Callable[[jax.Array, "History"], jax.Array], x: jax.Array, frames: int) -> jax.Array:
        """function(x, history), run on few frames of x [B, T, ...] at a time, to hold less at once.

        `frames` counts whole frames. Of frames in tiles a slice has as many more as there are tiles: a device holds the
        same, and neighbours exchange halos less often.
        """
        frames = max(count for count in range(1, frames * self.sharding.tiles + 1) if x.shape[1] % count == 0)
        cache: Any = None if self.is_first_frame else next(self.previous)
        if x.shape[1] <= frames:
            history = History(cache, self.sharding)
            y = function(x, history)
            self.collected.append(history.cache)
            return y

        def step(cache: Cache, x: jax.Array) -> tuple[Cache, jax.Array]:
            history = History(cache, self.sharding)
            y = function(x, history)
            return history.cache, y

        slices = rearrange(x, "b (n frames) h w c -> n b frames h w c", frames=frames)
        cache, y = lax.scan(step, cache, slices)
        self.collected.append(cache)
        return rearrange(y, "n b frames h w c -> b (n frames) h w c")

    @property
    def cache(self) -> Cache:
        return tuple(self.collected)


def overlap_add(taps: list[jax.Array], past: tuple[jax.Array, ...]) -> tuple[list[jax.Array], tuple[jax.Array, ...]]:
    """Sums what every tap made of every frame, each in its place in time.

    The last tap's results are for the frames they were made of, those of the tap before it for one frame later, and so
    on. So the frames before need not be at hand, only what they contribute.

    Args:
      taps: of [B, T, H, W, C] each.
      past: len(taps) - 1 times [B, 1, H, W, C], what earlier frames contribute to the first frames here.

    Returns:
      The sums for the T frames, and what these contribute to those after them: the next call's `past`. In float32.
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
    step: Callable[[Cache | None, jax.Array], tuple[jax.Array, Cache]],
    x: jax.Array,
    *,
    in_stride: int,
    out_stride: int,
    chunk: int,
) -> jax.Array:
    """Runs `step` on the first frame of x [B, T, ...], then on `chunk * in_stride` frames at a time.

    The result is a carry that each step writes its `chunk * out_stride` frames into, not the scan's stacked output:
    so no second copy of the video is ever made.
    """
    if chunk < 1:
        raise InputError(f"chunk is {chunk}; give at least 1")
    first, cache = step(None, x[:, :1])
    if (x.shape[1] - 1) % in_stride:
        raise InputError(f"the VAE cannot take {x.shape[1]} frames; give 1 + a multiple of {in_stride}")
    steps = (x.shape[1] - 1) // in_stride
    output = jnp.pad(first, [(0, 0), (0, steps * out_stride), *[(0, 0)] * (first.ndim - 2)])

    def body(carry: tuple[Cache, jax.Array], start: int | jax.Array, length: int = chunk):
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
