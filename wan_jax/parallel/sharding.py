"""Meshes of devices, and rules from a model's logical axes to the mesh's.

Models say what an axis of a parameter is ("embed", "mlp"); a mesh says how devices are arranged ("data", "fsdp"); rules
say which goes over which. So a model's code knows nothing of meshes, and another strategy is another set of rules.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from wan_jax.errors import InputError
from wan_jax.parameters import ParameterInfo

MeshAxes = tuple[str, ...]


@dataclass(frozen=True)
class ShardingRules:
    """For each logical axis the mesh axes that it is split over; those that a mesh does not have count for nothing.

    The defaults are data parallelism ("data") and fully sharded data parallelism ("fsdp"), which splits the batch too
    and brings the whole of a parameter together where it is used. Every large parameter has one "embed" axis.
    """

    batch: MeshAxes = ("data", "fsdp")
    embed: MeshAxes = ("fsdp",)
    heads: MeshAxes = ()
    mlp: MeshAxes = ()
    vocab: MeshAxes = ()
    conv_in: MeshAxes = ()
    conv_out: MeshAxes = ("fsdp",)
    layers: MeshAxes = ()

    def spec(self, axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
        """How an array with these logical axes lies on the mesh.

        An axis that does not divide evenly stays whole: those are small (the 3 channels of a frame). Raises InputError
        where two axes of the array would take the same mesh axis.
        """
        parts: list[MeshAxes] = []
        for axis, size in zip(axes, shape, strict=True):
            wanted = () if axis is None else self.mesh_axes(axis)
            present = tuple(name for name in wanted if name in mesh.shape)
            parts.append(present if size % math.prod(mesh.shape[name] for name in present) == 0 else ())
        used = [name for part in parts for name in part]
        if len(set(used)) < len(used):
            raise InputError(f"sharding rules put two axes of {tuple(axes)} on one mesh axis; change one of them")
        return PartitionSpec(*(part or None for part in parts))

    def shardings(self, tree: Mapping[str, ParameterInfo], mesh: Mesh) -> dict[str, NamedSharding]:
        """Where each parameter of an abstract tree lies."""
        return {name: NamedSharding(mesh, self.spec(info.axes, info.shape, mesh)) for name, info in tree.items()}

    def batch_sharding(self, mesh: Mesh, leading: int = 0) -> NamedSharding:
        """Where arrays with a batch axis after `leading` others lie."""
        present = tuple(name for name in self.batch if name in mesh.shape)
        return NamedSharding(mesh, PartitionSpec(*[None] * leading, present or None))

    def batch_parts(self, mesh: Mesh) -> int:
        """In how many parts a batch is split."""
        return math.prod(mesh.shape[name] for name in self.batch if name in mesh.shape)

    def mesh_axes(self, axis: str) -> MeshAxes:
        """Of a logical axis, on a mesh that has them all."""
        fields = {field.name for field in dataclasses.fields(self)}
        if axis not in fields:
            raise ValueError(f"no rule for the logical axis {axis!r}")
        return getattr(self, axis)


def whole(tree: Any) -> Any:
    """The arrays of a tree, brought together on every device; to be traced under jax.set_mesh, else as they are.

    Without it the compiler may prefer to split a product along a parameter's parts, and all activations with it.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.tree.map(lambda array: jax.lax.with_sharding_constraint(array, PartitionSpec()), tree)


def make_mesh(axes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with named axes of the given sizes; one size may be -1, for all devices that are left.

    Raises InputError where the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    known = math.prod(size for size in axes.values() if size != -1)
    sizes = [len(devices) // known if size == -1 else size for size in axes.values()]
    if list(axes.values()).count(-1) > 1 or min(sizes, default=1) < 1 or math.prod(sizes) != len(devices):
        wanted = " x ".join(f"{name} {size}" for name, size in axes.items())
        raise InputError(f"mesh {wanted}: must use all {len(devices)} devices; one size may be -1, for the rest")
    axis_types = (jax.sharding.AxisType.Auto,) * len(axes)
    return Mesh(np.asarray(devices).reshape(sizes), tuple(axes), axis_types=axis_types)
