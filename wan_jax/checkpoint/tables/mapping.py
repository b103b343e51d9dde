"""ParamMapping: one parameter's name in every naming, and how the axes of its PyTorch tensor become ours.

The values never change between layouts. Both PyTorch namings keep the same shapes, so one einops pattern serves both.
Reading, writing, inference of configs from shapes and the tests' checkpoints all derive from tables of these.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import einops
import numpy as np

from wan_jax.checkpoint.formats.tensors import Box, TensorInfo
from wan_jax.errors import InputError

Naming = Literal["wan_jax", "official", "diffusers"]

# How a PyTorch tensor becomes a parameter. Sizes come from `ParamMapping.torch_shape`.
VECTOR = "n -> n"
TABLE = "row column -> row column"
LINEAR = "o i -> i o"
MODULATION = "1 m n -> m n"

LAYER = "{layer}"  # stands for the layer's index in names that repeat for every layer


class Names(NamedTuple):
    """The name of a module or of a tensor in each naming."""

    wan_jax: str
    official: str
    diffusers: str

    def child(self, name: str, official: str | None = None, diffusers: str | None = None) -> "Names":
        """A member of the module; `name` serves the namings that are not given."""
        return Names(*(f"{a}.{b}" for a, b in zip(self, names(name, official, diffusers), strict=True)))


def names(name: str, official: str | None = None, diffusers: str | None = None) -> Names:
    """Names of which `name` serves the namings that are not given."""
    return Names(name, name if official is None else official, name if diffusers is None else diffusers)


@dataclass(frozen=True)
class ParamMapping:
    """One tensor: its name in every naming, its PyTorch shape, and how its axes are rearranged."""

    names: Names
    pattern: str
    torch_shape: tuple[int, ...]
    aliases: tuple[str, ...] = ()  # other names under which files with diffusers' names hold (a copy of) it

    @property
    def name(self) -> str:
        return self.names.wan_jax

    @property
    def per_layer(self) -> bool:
        return LAYER in self.name

    @property
    def stacked_name(self) -> str:
        """The name in the model's abstract tree, where layers are stacked."""
        return self.name.replace(f"{LAYER}.", "")

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape in our layout, of one layer."""
        # A zero-strided view: the rearrangement costs no memory whatever the size.
        return self.from_torch(np.broadcast_to(np.int8(0), self.torch_shape)).shape if self.size else ()

    @property
    def size(self) -> int:
        return math.prod(self.torch_shape)

    def at(self, layer: int) -> "ParamMapping":
        """The mapping of one layer, with its index in all names."""
        indexed = Names(*(name.replace(LAYER, str(layer)) for name in self.names))
        return replace(self, names=indexed, aliases=tuple(name.replace(LAYER, str(layer)) for name in self.aliases))

    def stored_names(self, naming: Naming) -> tuple[str, ...]:
        """The name in a naming and, after it, the aliases."""
        name = self.names[Names._fields.index(naming)]
        return (name, *self.aliases) if naming == "diffusers" else (name,)

    def stored_name(self, naming: Naming) -> str:
        return self.stored_names(naming)[0]

    def stored_shape(self, naming: Naming) -> tuple[int, ...]:
        return self.shape if naming == "wan_jax" else self.torch_shape

    def from_torch(self, tensor: np.ndarray) -> np.ndarray:
        """PyTorch tensor of `torch_shape` -> parameter of `shape`; a view where possible."""
        return einops.rearrange(tensor, self.pattern)

    def to_torch(self, parameter: np.ndarray) -> np.ndarray:
        """The exact inverse of `from_torch`."""
        source, target = self.pattern.split(" -> ")
        sizes = {axis: size for axis, size in zip(source.split(), self.torch_shape, strict=True) if axis != "1"}
        return einops.rearrange(parameter, f"{target} -> {source}", **sizes)

    def stored_box(self, box: Box, naming: Naming) -> Box | None:
        """The part of the stored tensor that is a part of the parameter; None where that is no box."""
        if naming == "wan_jax":
            return box
        source, target = (axes.split() for axes in self.pattern.split(" -> "))
        if any("(" in axis for axis in target):
            return None
        parts = dict(zip(target, box, strict=True))
        return tuple(parts.get(axis, slice(0, size)) for axis, size in zip(source, self.torch_shape, strict=True))


def weight_and_bias(
    module: Names, pattern: str, torch_shape: tuple[int, ...], *, bias: bool = True
) -> list[ParamMapping]:
    """The kernel of a Linear or a convolution, and its bias."""
    kernel = ParamMapping(module.child("kernel", "weight", "weight"), pattern, torch_shape)
    return [kernel, ParamMapping(module.child("bias"), VECTOR, torch_shape[:1])] if bias else [kernel]


def linear(module: Names, in_features: int, out_features: int, *, bias: bool = True) -> list[ParamMapping]:
    return weight_and_bias(module, LINEAR, (out_features, in_features), bias=bias)


def norm(module: Names, features: int, *, bias: bool = False) -> list[ParamMapping]:
    """The scale of an RMSNorm or, with a bias, of a LayerNorm."""
    scale = ParamMapping(module.child("scale", "weight", "weight"), VECTOR, (features,))
    return [scale, ParamMapping(module.child("bias"), VECTOR, (features,))] if bias else [scale]


# Configs from shapes.

Tensors = Mapping[str, TensorInfo]


def read_shape(place: str, tensors: Tensors, name: str, rank: int) -> tuple[int, ...]:
    """The shape of a stored tensor. Raises InputError where it is missing or has another number of dimensions."""
    if name not in tensors:
        raise InputError(f"{place}: tensor {name} is missing; is the file complete?")
    shape = tensors[name].shape
    if len(shape) != rank or 0 in shape:
        raise InputError(f"{place}: tensor {name} has shape {list(shape)}, it needs {rank} dimensions")
    return shape


def present_name(mapping: ParamMapping, tensors: Tensors, naming: Naming) -> str:
    """The name under which a file holds a parameter; the usual one where it holds none."""
    candidates = mapping.stored_names(naming)
    return next((name for name in candidates if name in tensors), candidates[0])


def count_indices(tensors: Tensors, pattern: str) -> int:
    """One more than the highest index that `pattern` (with one group of digits) finds in the names."""
    return 1 + max((int(match[1][:12]) for name in tensors if (match := re.match(pattern, name))), default=-1)
