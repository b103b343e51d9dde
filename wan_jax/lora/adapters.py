"""Models with adapters (LoRA): a model around the same arrays, but for what was changed."""

from collections.abc import Mapping
from typing import TypeVar

import jax
from flax import nnx

from wan_jax.models.nn.linear import Adapter, Linear
from wan_jax.parameters import dotted

Model = TypeVar("Model", bound=nnx.Module)


def adapt(model: Model, adapters: Mapping[str, Adapter], tensors: Mapping[str, jax.Array] | None = None) -> Model:
    """The model with adapters on some of its Linears and some parameters replaced.

    Nothing is copied: all other arrays are shared with `model`, which stays as it is.

    Args:
      model: a Denoiser, or a part of one.
      adapters: by the Linear's name ("blocks.self_attention.query"). Those of stacked layers have a leading layers axis
        on every array.
      tensors: arrays that take the place of parameters, by name ("blocks.self_attention.query.bias").
    """
    tensors = tensors or {}
    graphdef, state = nnx.split(model)
    leaves = []
    for path, variable in state.flat_state():
        name = dotted(path)
        leaves.append((path, variable.replace(tensors[name]) if name in tensors else variable))
    adapted = nnx.merge(graphdef, nnx.State.from_flat_path(leaves))
    for name, adapter in adapters.items():
        # nnx.data: until now the attribute held None, which NNX takes for a constant.
        find_linear(adapted, name).adapter = nnx.data(adapter)
    return adapted


def find_linear(model: nnx.Module, name: str) -> Linear:
    """The Linear of a dotted name; raises ValueError for the name of anything else (a bug)."""
    module = model
    for part in name.split("."):
        module = getattr(module, part)
    if not isinstance(module, Linear):
        raise ValueError(f"{name} is a {type(module).__name__}, not a Linear")
    return module
