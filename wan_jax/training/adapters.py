"""Training a LoRA: which of a denoiser's Linears get an adapter, and the model with them."""

import fnmatch
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from wan_jax.errors import InputError
from wan_jax.lora.adapters import adapt, find_linear
from wan_jax.models.denoiser import Denoiser
from wan_jax.models.nn.linear import Adapter
from wan_jax.parameters import ParameterInfo
from wan_jax.training.config import LoraConfig

KERNEL = ".kernel"


def adapter_tree(tree: Mapping[str, ParameterInfo], config: LoraConfig) -> dict[str, ParameterInfo]:
    """The abstract tree of the adapters of a model: "blocks.self_attention.query.down" and ".up", float32.

    Raises InputError for a pattern that no Linear matches.
    """
    linears = [name.removesuffix(KERNEL) for name in tree if name.endswith(KERNEL)]
    chosen: dict[str, None] = {}
    for pattern in config.targets.split(","):
        matching = fnmatch.filter(linears, pattern.strip())
        if not matching:
            raise InputError(f"LoRA target {pattern.strip()!r} matches none of the Linears, such as {linears[0]}")
        chosen |= dict.fromkeys(matching)
    adapters = {}
    for name in chosen:
        info = tree[name + KERNEL]
        *layers, inputs, outputs = info.shape
        *layer_axis, input_axis, output_axis = info.axes
        float32 = jnp.dtype(jnp.float32)
        adapters[f"{name}.down"] = ParameterInfo(
            (*layers, inputs, config.rank), float32, (*layer_axis, input_axis, None)
        )
        adapters[f"{name}.up"] = ParameterInfo(
            (*layers, config.rank, outputs), float32, (*layer_axis, None, output_axis)
        )
    return adapters


def initial_adapters(tree: Mapping[str, ParameterInfo], seed: int) -> dict[str, np.ndarray]:
    """Adapters that change nothing yet: random on the way down, zeros on the way up."""
    arrays = {}
    for index, (name, info) in enumerate(sorted(tree.items())):
        array = np.zeros(info.shape, np.float32)
        if name.endswith(".down"):
            np.random.default_rng((seed, index)).standard_normal(dtype=np.float32, out=array)
            array *= np.float32(info.shape[-2] ** -0.5)
        arrays[name] = array
    return arrays


def make_adapters(model: Denoiser, parameters: Mapping[str, jax.Array], scale: float) -> dict[str, Adapter]:
    """Trained arrays as adapters by the Linear's name, unmerged."""
    adapters = {}
    for name in dict.fromkeys(name.rpartition(".")[0] for name in parameters):
        down, up = parameters[f"{name}.down"], parameters[f"{name}.up"]
        scales = jnp.full((*down.shape[:-2], down.shape[-1]), scale, jnp.float32)
        axes = find_linear(model, name).kernel.axes
        adapters[name] = Adapter(down, up, scales, axes=axes, merge=False)
    return adapters


def with_adapters(model: Denoiser, parameters: Mapping[str, jax.Array], scale: float) -> Denoiser:
    """The model with unmerged adapters; its own arrays are shared."""
    return adapt(model, make_adapters(model, parameters, scale))
