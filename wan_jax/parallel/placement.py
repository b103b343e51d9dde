"""A strategy on real devices: where every array of a run lies, and functions that run on all of them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from wan_jax.config import DenoiserConfig, TextEncoderConfig
from wan_jax.parallel import collectives
from wan_jax.parallel.collectives import CFG, DATA, FSDP, PIPELINE, TENSOR
from wan_jax.parallel.mesh_spec import MeshSpec
from wan_jax.parallel.sequence import TOKEN_AXES
from wan_jax.parallel.sharding import ShardingRules
from wan_jax.parameters import ParameterInfo

# Of every strategy; axes that it does not have count for nothing. What tensor parallelism splits, the models sum up
# again (`collectives.TENSOR_AXES`).
RULES = ShardingRules(
    batch=(DATA,), embed=(FSDP,), heads=(TENSOR,), mlp=(TENSOR,), vocab=(TENSOR,), conv_out=(), layers=(PIPELINE,)
)


@dataclass(frozen=True)
class Placement:
    """The arrays of a run and their places on a mesh; hashable, so that compiled functions can depend on it."""

    strategy: MeshSpec
    mesh: Mesh | AbstractMesh

    @classmethod
    def over(cls, strategy: MeshSpec, devices: Any = None) -> "Placement":
        """Raises InputError if there are fewer devices than the strategy needs."""
        return cls(strategy, strategy.make_mesh(devices))

    def by_expert(self, names: Sequence[str]) -> dict[str, "Placement"]:
        """Where each expert runs: on all devices, or with `experts2` each on its own part of them."""
        if self.strategy.experts == 1:
            return dict.fromkeys(names, self)
        each = replace(self.strategy, experts=1)
        return {
            name: Placement.over(each, self.devices[index * each.devices :][: each.devices])
            for index, name in enumerate(names)
        }

    @classmethod
    def planned(cls, strategy: MeshSpec) -> "Placement":
        """Without devices: it says how large parts are, and nothing can be put anywhere."""
        return cls(strategy, strategy.abstract_mesh())

    def for_text(self, config: TextEncoderConfig) -> "Placement":
        """The same devices for the text encoder: tensor parallelism over as many as divide it, and copies of that."""
        parts = math.gcd(self.strategy.devices, config.num_heads, config.ffn_dim, config.vocab_size)
        strategy = MeshSpec(data=self.strategy.devices // parts, tensor=parts)
        return (
            Placement.planned(strategy)
            if isinstance(self.mesh, AbstractMesh)
            else Placement.over(strategy, self.devices)
        )

    def parameter_spec(self, axes: tuple[str | None, ...]) -> P:
        """Of a parameter with these logical axes, "layers" first where layers are stacked.

        Vectors stay whole over "fsdp": gathering them would cost more than they take.
        """
        is_vector = len([axis for axis in axes if axis != "layers"]) == 1

        def place(axis: str | None) -> str | None:
            names = () if axis is None or (axis == "embed" and is_vector) else RULES.mesh_axes(axis)
            return names[0] if names else None

        return P(*map(place, axes))

    def shardings(self, tree: Mapping[str, ParameterInfo]) -> dict[str, NamedSharding]:
        """Where a transformer's parameters lie, by name: what `Checkpoint.load` takes."""
        return {name: NamedSharding(self.mesh, self.parameter_spec(info.axes)) for name, info in tree.items()}

    def places(self, config: Any, tree: Mapping[str, ParameterInfo]) -> dict[str, NamedSharding]:
        """Where the parameters of any model lie; `tree` is its abstract tree."""
        if isinstance(config, DenoiserConfig):
            return self.shardings(tree)
        if isinstance(config, TextEncoderConfig):
            return self.for_text(config).shardings(tree)
        return dict.fromkeys(tree, self.replicated)

    def state_specs(self, state: nnx.State) -> Any:
        """The specs of a transformer's state, as `nnx.split` gives it, for `shard_map`."""

        return jax.tree.map(lambda variable: self.parameter_spec(_axes(variable)), state, is_leaf=_is_variable)

    # [B, C, F, h, w] and all else with a prompt's axis first.
    batch = P(*RULES.batch)
    # Keys and values of all layers, [layers, B, T, heads, head_dim].
    context = P(PIPELINE, DATA, None, TENSOR)
    # One video for each device along these axes: tokens [1, S, dim] on their way through the stages, and a velocity.
    stages = P((DATA, CFG, PIPELINE), TOKEN_AXES)
    evaluation = P((DATA, CFG))

    @property
    def devices(self) -> list[jax.Device]:
        """All of them, in the mesh's order."""
        assert isinstance(self.mesh, Mesh)
        return self.mesh.devices.flatten().tolist()

    @property
    def replicated(self) -> NamedSharding:
        """Where arrays lie that every device has whole."""
        return NamedSharding(self.mesh, P())

    def abstract(self, shape: tuple[int, ...], spec: P) -> jax.ShapeDtypeStruct:
        """A float32 array on the mesh, without its numbers."""
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(self.mesh, spec))

    def adapter_place(self, axes: tuple[str | None, ...]) -> NamedSharding:
        """Where an array of a LoRA with these logical axes lies: beside its kernel's part."""
        return NamedSharding(self.mesh, self.parameter_spec(axes))

    def put_batch(self, arrays: Any) -> Any:
        """Puts arrays with a prompt's axis first where the denoise loop wants them."""
        sharding = NamedSharding(self.mesh, self.batch)
        return jax.tree.map(lambda array: put(array, sharding), arrays)

    def put_whole(self, tree: Any) -> Any:
        """Puts arrays on every device."""
        return jax.tree.map(lambda array: put(array, self.replicated), tree)

    def put_known(self, conditioning: Any) -> Any:
        """Puts what is known of the frames: with its prompts, where there is one for each, or on every device."""
        return jax.tree.map(
            lambda x: self.put_batch(x) if np.ndim(x) and len(x) > 1 else self.put_whole(x), conditioning
        )

    def fetch(self, array: jax.Array) -> np.ndarray:
        """The whole array, on the host of every process."""
        return np.asarray(jax.device_put(array, self.replicated))

    def shard_map(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """`function` as every device runs it, on its own part of the arguments."""
        # Kernels do not say along which axes their results differ, so nothing can be checked.
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def put(array: ArrayLike, sharding: NamedSharding) -> jax.Array:
    """Puts an array, which every process has, where the sharding says; each process makes its own devices' parts."""
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, host.__getitem__)


def gather_outside_layers(state: nnx.State) -> nnx.State:
    """What lies outside the layers, brought together from its parts; `scan_layers` does so with each layer."""

    def gather(variable: nnx.Variable) -> nnx.Variable:
        axes = _axes(variable)
        if "layers" in axes:
            return variable
        return variable.replace(collectives.gather_weight(variable.get_value(), axes))

    return jax.tree.map(gather, state, is_leaf=_is_variable)


def _axes(variable: nnx.Variable) -> tuple[str | None, ...]:
    axes = tuple(variable.get_metadata()["axes"])
    return ("layers", *axes) if len(axes) < len(variable.get_value().shape) else axes


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)
