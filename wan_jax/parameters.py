"""The abstract tree of a model: every parameter's name, shape, dtype and logical axes, without any memory.

Initialisation, conversion, restore, sharding and the tests all derive from it. A name is the attribute path joined by
dots ("blocks.self_attention.query.kernel"). Parameters of scanned layers are stacked on a leading axis called "layers".
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

Model = TypeVar("Model", bound=nnx.Module)


@dataclass(frozen=True)
class ParameterInfo:
    """One entry of the abstract tree."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: tuple[str | None, ...]  # a logical name per dimension

    @property
    def stacked(self) -> bool:
        """Whether the leading axis runs over the model's layers."""
        return bool(self.axes) and self.axes[0] == "layers"


def abstract_parameters(build: Callable[[], nnx.Module]) -> dict[str, ParameterInfo]:
    """Describes the parameters of the model that `build` makes; nothing is allocated."""
    _, state = nnx.split(nnx.eval_shape(build))
    tree = {}
    for path, variable in state.flat_state():
        value = variable.get_value()
        axes = variable.get_metadata()["axes"]
        if len(axes) == len(value.shape) - 1:  # made under nnx.vmap, which stacks the value and not our metadata
            axes = ("layers", *axes)
        tree[dotted(path)] = ParameterInfo(tuple(value.shape), value.dtype, axes)
    return tree


def with_parameters(build: Callable[[], Model], arrays: Mapping[str, jax.Array]) -> Model:
    """Builds the model around existing arrays, keyed as in `abstract_parameters`.

    Raises ValueError when names or shapes differ from the abstract tree (loaders check first, with better messages).
    """
    graphdef, state = nnx.split(nnx.eval_shape(build))
    entries = {dotted(path): (path, variable) for path, variable in state.flat_state()}
    if entries.keys() != arrays.keys():
        raise ValueError(f"parameter names differ: {sorted(entries.keys() ^ arrays.keys())[:5]}")
    leaves = []
    for name, (path, variable) in entries.items():
        if variable.shape != arrays[name].shape:
            raise ValueError(f"{name} has shape {arrays[name].shape}, the model needs {variable.shape}")
        leaves.append((path, variable.replace(arrays[name])))
    return nnx.merge(graphdef, nnx.State.from_flat_path(leaves))


def named_parameters(model: nnx.Module) -> dict[str, jax.Array]:
    """The model's arrays by dotted name: the inverse of `with_parameters`."""
    return {dotted(path): variable.get_value() for path, variable in nnx.state(model).flat_state()}


def dotted(path: tuple) -> str:
    return ".".join(str(part) for part in path)
