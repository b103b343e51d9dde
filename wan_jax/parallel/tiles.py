"""Frames cut into tiles, one on each device, for models of convolutions: what is computed is what one device computes.

A convolution reads a little beyond its tile: those borders come from the neighbours, just before it runs. At the edge
of the picture nothing arrives, which leaves the zeros that padding would put there. Heights and widths need not divide:
the last tiles reach beyond the picture, and what is there is set to zero before every convolution.

Outside `jax.shard_map` frames stay whole and nothing here does anything.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, PartitionSpec

from wan_jax.parallel import collectives

HEIGHT, WIDTH = "height", "width"
# The mesh axis over which each axis of an activation [B, T, H, W, C] is cut.
FRAME_AXES = {2: HEIGHT, 3: WIDTH}
# Where such an activation lies.
TILES = PartitionSpec(None, None, HEIGHT, WIDTH, None)


def frame_mesh(devices: Sequence[jax.Device], height: int, width: int) -> Mesh:
    """The devices as a row or a column of tiles, whichever has the smaller tiles for latents of that size."""
    count = len(devices)
    rows, columns = min(((count, 1), (1, count)), key=lambda cut: -(-height // cut[0]) * -(-width // cut[1]))
    return Mesh(np.asarray(devices).reshape(rows, columns), (HEIGHT, WIDTH), axis_types=(AxisType.Auto,) * 2)


@dataclass(frozen=True)
class FrameCut:
    """How frames are cut, at every resolution that a network has them in: tiles all shrink and grow by the same."""

    whole: tuple[int, int]  # height and width of frames as they were cut
    tile: tuple[int, int]  # and of a tile then

    @classmethod
    def of(cls, frames: jax.Array, multiple: int = 1) -> "FrameCut":
        """Of frames [B, T, H, W, C] into tiles whose sides are multiples of `multiple`, which H and W must be."""
        height, width = frames.shape[2:4]
        counts = [collectives.size(name) for name in FRAME_AXES.values()]
        rows, columns = (
            multiple * math.ceil(side / (multiple * count)) for side, count in zip((height, width), counts, strict=True)
        )
        return cls((height, width), (rows, columns))

    @property
    def tiles(self) -> int:
        """In how many parts a frame is cut."""
        return collectives.size(*FRAME_AXES.values())

    def split(self, x: jax.Array) -> jax.Array:
        """Whole frames [B, T, H, W, C], the same on all devices -> this device's tile."""
        for axis, name in FRAME_AXES.items():
            if collectives.bound(name):
                side = self.tile[axis - 2]
                widths = [(0, 0)] * x.ndim
                widths[axis] = (0, side * collectives.size(name) - x.shape[axis])
                x = lax.dynamic_slice_in_dim(jnp.pad(x, widths), side * collectives.index(name), side, axis)
        return x

    def join(self, x: jax.Array) -> jax.Array:
        """This device's tile, at any resolution -> whole frames, on all devices."""
        for axis, name in FRAME_AXES.items():
            x = collectives.join_axis(x, [name], axis, self._length(axis, x))
        return x

    def pad(self, x: jax.Array, padding: tuple[int, int]) -> tuple[jax.Array, tuple[tuple[int, int], tuple[int, int]]]:
        """x and the zero padding, (before, after) of height and width, to convolve it with.

        Along an axis that is cut x has grown by its neighbours' borders instead, which are zeros outside the picture.
        """
        paddings = [padding, padding]
        for axis, name in FRAME_AXES.items():
            if collectives.bound(name) and any(padding):
                x = self._with_borders(self._zero_outside(x, axis, name), axis, name, *padding)
                paddings[axis - 2] = 0, 0
        return x, (paddings[0], paddings[1])

    def _length(self, axis: int, x: jax.Array) -> int:
        """Of whole frames at the resolution of the tile x."""
        return self.whole[axis - 2] * x.shape[axis] // self.tile[axis - 2]

    def _zero_outside(self, x: jax.Array, axis: int, name: str) -> jax.Array:
        length, side = self._length(axis, x), x.shape[axis]
        if length == side * collectives.size(name):
            return x
        place = lax.broadcasted_iota(jnp.int32, (*[1] * axis, side, *[1] * (x.ndim - axis - 1)), axis)
        return jnp.where(place + side * collectives.index(name) < length, x, jnp.zeros((), x.dtype))

    @staticmethod
    def _with_borders(x: jax.Array, axis: int, name: str, before: int, after: int) -> jax.Array:
        parts, side, last = [x], x.shape[axis], collectives.size(name) - 1
        if before:
            border = lax.slice_in_dim(x, side - before, side, axis=axis)
            parts.insert(0, lax.ppermute(border, name, [(tile, tile + 1) for tile in range(last)]))
        if after:
            border = lax.slice_in_dim(x, 0, after, axis=axis)
            parts.append(lax.ppermute(border, name, [(tile + 1, tile) for tile in range(last)]))
        return jnp.concatenate(parts, axis)
