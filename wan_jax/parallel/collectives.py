"""Collectives over mesh axes, for model code that knows no mesh.

Inside `jax.shard_map` they exchange data between the devices along an axis. Outside it, and along axes absent from the
mesh, they are the identity. So one model runs on one device and on any mesh.

The mesh axes, one for each kind of parallelism, and what they split:

    experts    the two experts, for two videos at once (diffusion/relay.py); sampling alone
    data       the videos of a batch
    cfg        the prompt and the negative prompt; sampling alone
    pipeline   layers
    fsdp       weights at rest; while computing, tokens, as "ulysses"
    ring       tokens, in the order of the video; keys and values go around
    ulysses    tokens, and heads during attention
    tensor     heads, and features of the feed-forward layer
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

EXPERTS, DATA, CFG, PIPELINE = "experts", "data", "cfg", "pipeline"
RING, FSDP, ULYSSES, TENSOR = "ring", "fsdp", "ulysses", "tensor"
MESH_AXES = (EXPERTS, DATA, CFG, PIPELINE, RING, FSDP, ULYSSES, TENSOR)  # slowest first: neighbours exchange the most

# Logical axes of parameters (models/parameters.py) that tensor parallelism splits: a product that contracts one of them
# is a sum over the shards.
TENSOR_AXES = ("heads", "mlp")


def size(*names: str) -> int:
    """The number of devices along the axes together; 1 outside `shard_map`."""
    return math.prod(map(_size, names))


def _size(name: str) -> int:
    try:
        return lax.axis_size(name)
    except NameError:
        return 1


def bound(*names: str) -> tuple[str, ...]:
    """The axes with more than one device."""
    return tuple(name for name in names if _size(name) > 1)


def index(*names: str) -> jax.Array | int:
    """This device's index along the axes together, the first being the slowest."""
    names = bound(*names)
    return lax.axis_index(names) if names else 0


def sum_over_contracted(y: jax.Array, axis: str | None) -> jax.Array:
    """Sums a product over the devices that hold parts of its contracted logical axis."""
    return lax.psum(y, TENSOR) if axis in TENSOR_AXES and bound(TENSOR) else y


def mean_over_shards(mean: jax.Array, axis: str | None) -> jax.Array:
    """Averages means over the devices that hold equal parts of a logical axis."""
    return lax.pmean(mean, TENSOR) if axis in TENSOR_AXES and bound(TENSOR) else mean


def look_up(table: jax.Array, rows: jax.Array) -> jax.Array:
    """table[rows], of a table whose rows are split over "tensor"."""
    if not bound(TENSOR):
        return table[rows]
    local = rows - index(TENSOR) * len(table)
    is_local = (local >= 0) & (local < len(table))
    return lax.psum(jnp.where(is_local[..., None], table[jnp.where(is_local, local, 0)], 0), TENSOR)


def in_parts(axes: Sequence[str | None]) -> bool:
    """Whether "fsdp" splits a parameter with these logical axes: along "embed", all but vectors."""
    return bool(bound(FSDP)) and len(axes) > 1 and "embed" in axes


def gather_weight(array: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Gathers a parameter that "fsdp" splits."""
    return lax.all_gather(array, FSDP, axis=axes.index("embed"), tiled=True) if in_parts(axes) else array


def split_axis(tree: Any, names: Sequence[str], axis: int) -> Any:
    """Whole arrays, the same on all devices -> this device's part; the last parts are padded with zeros."""
    parts = size(*names)
    if parts == 1:
        return tree
    place = index(*names)

    def split(array: jax.Array) -> jax.Array:
        length = array.shape[axis]
        part = -(-length // parts)
        widths = [(0, 0)] * array.ndim
        widths[axis] = (0, part * parts - length)
        return lax.dynamic_slice_in_dim(jnp.pad(array, widths), place * part, part, axis)

    return jax.tree.map(split, tree)


def join_axis(array: jax.Array, names: Sequence[str], axis: int, length: int) -> jax.Array:
    """The inverse of `split_axis`: all parts in order, without the padding after `length`."""
    names = bound(*names)
    if not names:
        return array
    whole = lax.all_gather(array, names, axis=axis, tiled=True)
    return lax.slice_in_dim(whole, 0, length, axis=axis)
