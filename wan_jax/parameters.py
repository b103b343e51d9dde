"""The abstract tree of a model: every parameter's name, shape, dtype and logical axes, without any memory.

Initialisation, conversion, restore, sharding and the tests all derive from it. A name is the attribute path joined by
dots ("blocks.self_attention.query.kernel"). Parameters of scanned layers are stacked on a leading axis called "layers".
"""

import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

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


LARGE = 2**24
BLOCK = 2**20 + 7  # odd, so that no row of a matrix is like the one before


def random_parameters(
    tree: Mapping[str, ParameterInfo],
    seed: int,
    dtype: DTypeLike,
    shardings: Mapping[str, jax.sharding.Sharding] | None = None,
) -> dict[str, jax.Array]:
    """Fixed random weights of a scale at which signals neither die nor explode: for demos, benchmarks and tests.

    Drawn on the host, a thread for each layer: compiling a generator for each of a VAE's shapes takes longer. Large
    parameters, which only benchmarks have, repeat one block of numbers, which takes seconds instead of minutes; every
    device makes its own part of them. `shardings` says where parameters lie, by name; it changes no number.
    """
    dtype = jnp.dtype(dtype)
    scales = {"scale": (1.0, 0.1), "bias": (0.0, 0.1), "table": (0.0, 1.0)}
    block = jnp.asarray(np.random.default_rng(seed).standard_normal(BLOCK, np.float32))
    arrays = {}
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for index, name in enumerate(sorted(tree)):
            info = tree[name]
            shape = info.shape if info.stacked else (1, *info.shape)
            fan_in = math.prod(shape[1:-1])
            mean, std = scales.get(name.rpartition(".")[2], (0.0, fan_in**-0.5))
            if math.prod(shape) > LARGE:
                fill = _repeater(shape, dtype, info.shape, None if shardings is None else shardings[name])
                arrays[name] = jax.block_until_ready(fill(block, mean, std))
                continue
            host = np.empty(shape, dtype)

            def draw(layer: int, host=host, index=index, mean=mean, std=std) -> None:
                values = np.random.default_rng((seed, index, layer)).standard_normal(host.shape[1:], np.float32)
                values *= np.float32(std)
                values += np.float32(mean)
                if dtype == jnp.bfloat16:  # cut, not rounded: these are random anyway, and NumPy does it in threads
                    host[layer].view(np.uint16)[...] = values.view(np.uint32) >> 16
                else:
                    host[layer] = values

            list(threads.map(draw, range(shape[0])))
            arrays[name] = jax.block_until_ready(
                jax.device_put(host.reshape(info.shape), None if shardings is None else shardings[name])
            )
    return arrays


@cache
def _repeater(
    shape: tuple[int, ...], dtype: jnp.dtype, result: tuple[int, ...], sharding: jax.sharding.Sharding | None
) -> Callable[..., jax.Array]:
    return jax.jit(partial(_repeat, shape=shape, dtype=dtype, result=result), out_shardings=sharding)


def _repeat(
    block: jax.Array, mean: float, std: float, *, shape: tuple[int, ...], dtype: jnp.dtype, result: tuple[int, ...]
) -> jax.Array:
    """Fills [layers, ...] with copies of `block`, every second layer turned around its mean; in the shape `result`."""
    layers, count = shape[0], math.prod(shape[1:])
    copies = -(-count // block.size)
    layer = lax.slice(jnp.broadcast_to(block, (copies, block.size)).reshape(-1), (0,), (count,)).reshape(shape[1:])
    signs = 1 - 2 * (jnp.arange(layers) % 2).reshape(-1, *[1] * (len(shape) - 1))
    return (layer * signs * std + mean).astype(dtype).reshape(result)
