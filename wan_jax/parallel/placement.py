"""Where the arrays of a run are, and functions that run on all of its devices at once.

A `Placement` is a mesh, on which parameters are split as `sharding.RULES` says, and the offload profile. One device is
the trivial case: nothing is split, and functions run as they are.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from wan_jax.config import DenoiserConfig, TextEncoderConfig
from wan_jax.parallel.collectives import CFG, DATA, PIPELINE, TENSOR
from wan_jax.parallel.mesh_spec import ONE_DEVICE, MeshSpec
from wan_jax.parallel.sequence import TOKEN_AXES
from wan_jax.parallel.sharding import parameter_spec
from wan_jax.parameters import ParameterInfo
from wan_jax.runtime.offload import RESIDENT, Profile, single_device

REPLICATED = P()  # every device has all of an array
_NO_DEVICES = ONE_DEVICE.abstract_mesh()


@dataclass(frozen=True)
class Placement:
    """Where arrays are. `SINGLE` is JAX's default device alone; see `over` for a mesh.

    Hashable, so that compiled functions can depend on it. The offload profile takes no part in comparisons: it moves
    arrays and changes no function.

    Attributes:
      mesh_spec: the size of each mesh axis.
      mesh: the devices; an abstract mesh has shapes alone, except for a single device, where it stands for the default.
      offload: where weights wait (runtime/offload.py); on a mesh they are always resident.
    """

    mesh_spec: MeshSpec = ONE_DEVICE
    mesh: Mesh | AbstractMesh = _NO_DEVICES
    offload: Profile = field(default=RESIDENT, compare=False)

    @classmethod
    def over(cls, mesh_spec: MeshSpec, devices: Sequence[jax.Device] | None = None) -> "Placement":
        """A placement on the first devices that the mesh needs. Raises InputError if there are fewer."""
        if mesh_spec.devices == 1 and devices is None:
            return SINGLE
        return cls(mesh_spec, mesh_spec.make_mesh(devices))

    @classmethod
    def planned(cls, mesh_spec: MeshSpec) -> "Placement":
        """A placement without devices: it knows the shapes of parts."""
        return cls(mesh_spec, mesh_spec.abstract_mesh())

    @property
    def is_single(self) -> bool:
        """Whether there is one device."""
        return self.mesh_spec.devices == 1

    @property
    def devices(self) -> list[jax.Device]:
        """All devices, in the mesh's order."""
        if isinstance(self.mesh, Mesh):
            return self.mesh.devices.flatten().tolist()
        assert self.is_single
        return jax.devices()[:1]

    def by_expert(self, names: Sequence[str]) -> "dict[str, Placement]":
        """Where each expert runs: on all devices, or with "experts2" each on its own half of them."""
        if self.mesh_spec.experts == 1:
            return dict.fromkeys(names, self)
        each = replace(self.mesh_spec, experts=1)
        return {
            name: Placement.over(each, self.devices[index * each.devices :][: each.devices])
            for index, name in enumerate(names)
        }

    def for_text(self, config: TextEncoderConfig) -> "Placement":
        """The same devices for the text encoder: tensor parallelism over as many as divide it, and copies of that."""
        if self.is_single:
            return self
        parts = math.gcd(self.mesh_spec.devices, config.num_heads, config.ffn_dim, config.vocab_size)
        mesh_spec = MeshSpec(data=self.mesh_spec.devices // parts, tensor=parts)
        if isinstance(self.mesh, AbstractMesh):
            return Placement.planned(mesh_spec)
        return Placement.over(mesh_spec, self.devices)

    # Specs of activations. [B, C, F, h, w] and everything else whose first axis is the batch:
    batch = P(DATA)
    # Keys and values of all layers, [layers, B, T, heads, head_dim].
    context = P(PIPELINE, DATA, None, TENSOR)
    # One video for each device along these axes: tokens [1, S, dim] on their way through the stages, and a velocity.
    stages = P((DATA, CFG, PIPELINE), TOKEN_AXES)
    evaluation = P((DATA, CFG))

    def batch_specs(self, tree: Any) -> Any:
        """Specs of arrays that have one row for each video, or one for all of them."""
        return jax.tree.map(lambda x: self.batch if np.ndim(x) and len(x) > 1 else REPLICATED, tree)

    def sharding(self, spec: P = REPLICATED) -> Sharding:
        """The sharding of arrays with this spec, in device memory."""
        return single_device(self.devices[0]) if self.is_single else NamedSharding(self.mesh, spec)

    def parameter_sharding(self, axes: Sequence[str | None]) -> Sharding:
        """The sharding of a parameter, while its model waits."""
        if self.is_single:
            return single_device(self.devices[0], on_host=self.offload.idle_on_host)
        return NamedSharding(self.mesh, parameter_spec(axes))

    def parameter_shardings(self, tree: Mapping[str, ParameterInfo]) -> dict[str, Sharding]:
        """The same of a transformer's parameters, by name: what `Checkpoint.load` takes."""
        return {name: self.parameter_sharding(info.axes) for name, info in tree.items()}

    def model_shardings(self, config: Any, tree: Mapping[str, ParameterInfo]) -> dict[str, Sharding]:
        """The same of any model, whose abstract tree is `tree`; only transformers are split."""
        if isinstance(config, TextEncoderConfig):
            return self.for_text(config).parameter_shardings(tree)
        if isinstance(config, DenoiserConfig):
            return self.parameter_shardings(tree)
        return dict.fromkeys(tree, self.parameter_sharding(()))

    def abstract(self, shape: tuple[int, ...], spec: P) -> jax.ShapeDtypeStruct:
        """The shape and sharding of a float32 array."""
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=self.sharding(spec))

    def put(self, tree: Any, specs: Any = REPLICATED) -> Any:
        """Puts arrays on the devices; `specs` is one for all, or a tree of them. By default each device has all."""
        if self.is_single:
            # Arrays for the default device stay uncommitted, as jnp.asarray leaves them.
            return jax.device_put(tree, self.devices[0] if isinstance(self.mesh, Mesh) else None)
        specs = jax.tree.map(lambda _: specs, tree) if isinstance(specs, P) else specs
        return jax.tree.map(lambda array, spec: put(array, NamedSharding(self.mesh, spec)), tree, specs)

    def put_batch(self, tree: Any) -> Any:
        """Puts arrays whose first axis is the batch."""
        return self.put(tree, self.batch)

    def gather(self, array: jax.Array) -> np.ndarray:
        """The whole array, on the host of every process."""
        return np.asarray(array if self.is_single else jax.device_put(array, self.sharding()))

    def run(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """`function` as every device runs it on its part of the arguments; on one device, `function` itself."""
        if self.is_single:
            return function
        # Kernels do not say along which axes their results differ, so nothing can be checked.
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


SINGLE = Placement()


def put(array: ArrayLike, sharding: Sharding) -> jax.Array:
    """Puts an array that every process has; each process makes the parts of its own devices."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, host.__getitem__)
