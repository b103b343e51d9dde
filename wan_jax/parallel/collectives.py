"""Collectives over mesh axes, for model code that knows nothing of meshes.

Inside `jax.shard_map` a mesh axis has a size, and these exchange data between the devices along it. Anywhere else, and
for an axis that the mesh does not have, they do nothing. So one model runs on one device and on any mesh.

Names of mesh axes, one for each kind of parallelism:

    experts    the high-noise expert and the low-noise one, for two videos at once (diffusion/relay.py)
    data       prompts of a batch
    cfg        the prompt and the negative prompt
    pipeline   layers
    fsdp       parts of every weight at rest; tokens while computing, as "ulysses"
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
    """Those of the axes along which there is more than one device."""
    return tuple(name for name in names if _size(name) > 1)


def index(*names: str) -> jax.Array | int:
    """This device's place along the axes together, the first being the slowest."""
    names = bound(*names)
    return lax.axis_index(names) if names else 0


def sum_over_contracted(y: jax.Array, axis: str | None) -> jax.Array:
    """A product that contracts logical axis `axis`, of which each device has a part -> the whole product."""
    return lax.psum(y, TENSOR) if axis in TENSOR_AXES and bound(TENSOR) else y


def mean_over_shards(mean: jax.Array, axis: str | None) -> jax.Array:
    """Means over equal parts of logical axis `axis` -> the mean over all of it."""
    return lax.pmean(mean, TENSOR) if axis in TENSOR_AXES and bound(TENSOR) else mean


def look_up(table: jax.Array, rows: jax.Array) -> jax.Array:
    """table[rows], each device along "tensor" having as many rows of a table as the others."""
    if not bound(TENSOR):
        return table[rows]
    here = rows - index(TENSOR) * len(table)
    is_here = (here >= 0) & (here < len(table))
    return lax.psum(jnp.where(is_here[..., None], table[jnp.where(is_here, here, 0)], 0), TENSOR)


def in_parts(axes: Sequence[str | None]) -> bool:
    """Whether devices have parts of a parameter with these logical axes: along "embed", of all but vectors ("fsdp")."""
    return bool(bound(FSDP)) and len(axes) > 1 and "embed" in axes


def gather_weight(array: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """This device's part of a parameter -> the whole."""
    return lax.all_gather(array, FSDP, axis=axes.index("embed"), tiled=True) if in_parts(axes) else array


def split_axis(tree: Any, names: Sequence[str], axis: int) -> Any:
    """This device's part of arrays that every device along the axes has whole; the last parts are padded with zeros."""
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
    """The inverse of `split_axis`: all parts in order, without the padding behind `length`."""
    names = bound(*names)
    if not names:
        return array
    whole = lax.all_gather(array, names, axis=axis, tiled=True)
    return lax.slice_in_dim(whole, 0, length, axis=axis)
