"""Spatial sharding: frames in tiles, one on each device, for convolutional models. Results are those of one device.

Before a convolution each tile gets its neighbours' borders (a halo exchange). At the edges of the frame nothing
arrives, which leaves zeros, as padding would. Heights and widths need not divide: the last tiles reach beyond the
frame, and what is there is set to zero before every convolution.

Outside `jax.shard_map` frames stay whole, and everything is the identity.
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
# The mesh axis that splits each axis of an activation [B, T, H, W, C].
FRAME_AXES = {2: HEIGHT, 3: WIDTH}
# The spec of such an activation.
TILES = PartitionSpec(None, None, HEIGHT, WIDTH, None)


def frame_mesh(devices: Sequence[jax.Device], height: int, width: int) -> Mesh:
    """The devices as a row or a column of tiles, whichever has the smaller tiles for latents of that size."""
    count = len(devices)
    rows, columns = min(((count, 1), (1, count)), key=lambda grid: -(-height // grid[0]) * -(-width // grid[1]))
    return Mesh(np.asarray(devices).reshape(rows, columns), (HEIGHT, WIDTH), axis_types=(AxisType.Auto,) * 2)


@dataclass(frozen=True)
class SpatialSharding:
    """How the frames of one pass are split, at every resolution of a network: tiles scale as the frames do."""

    frame: tuple[int, int]  # height and width of frames when they are split
    tile: tuple[int, int]  # height and width of a tile then

    @classmethod
    def of(cls, frames: jax.Array, multiple: int = 1) -> "SpatialSharding":
        """Splits frames [B, T, H, W, C] into tiles whose sides are multiples of `multiple`, as H and W are."""
        height, width = frames.shape[2:4]
        rows, columns = (
            multiple * math.ceil(side / (multiple * collectives.size(name)))
            for side, name in zip((height, width), FRAME_AXES.values(), strict=True)
        )
        return cls((height, width), (rows, columns))

    @property
    def tiles(self) -> int:
        """The number of tiles."""
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

    def exchange_halos(
        self, x: jax.Array, padding: tuple[int, int]
    ) -> tuple[jax.Array, tuple[tuple[int, int], tuple[int, int]]]:
        """Prepares x for a convolution with zero padding (before, after) along height and width.

        Returns:
          x, with its neighbours' borders along the axes that are split, and the padding that is still due, of height
          and of width.
        """
        due = [padding, padding]
        for axis, name in FRAME_AXES.items():
            if collectives.bound(name) and any(padding):
                x = _with_halos(self._zero_outside(x, axis, name), axis, name, *padding)
                due[axis - 2] = 0, 0
        return x, (due[0], due[1])

    def _length(self, axis: int, x: jax.Array) -> int:
        """The length of whole frames at the resolution of the tile x."""
        return self.frame[axis - 2] * x.shape[axis] // self.tile[axis - 2]

    def _zero_outside(self, x: jax.Array, axis: int, name: str) -> jax.Array:
        length, side = self._length(axis, x), x.shape[axis]
        if length == side * collectives.size(name):
            return x
        place = lax.broadcasted_iota(jnp.int32, (*[1] * axis, side, *[1] * (x.ndim - axis - 1)), axis)
        return jnp.where(place + side * collectives.index(name) < length, x, jnp.zeros((), x.dtype))


def _with_halos(x: jax.Array, axis: int, name: str, before: int, after: int) -> jax.Array:
    parts, side, last = [x], x.shape[axis], collectives.size(name) - 1
    if before:
        border = lax.slice_in_dim(x, side - before, side, axis=axis)
        parts.insert(0, lax.ppermute(border, name, [(tile, tile + 1) for tile in range(last)]))
    if after:
        border = lax.slice_in_dim(x, 0, after, axis=axis)
        parts.append(lax.ppermute(border, name, [(tile + 1, tile) for tile in range(last)]))
    return jnp.concatenate(parts, axis)
