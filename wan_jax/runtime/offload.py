"""Where weights wait and where they run: the memory profiles.

    resident   every model stays on the device
    swap       models wait in pinned host memory; each is on the device only while it runs
    stream     as swap, and of a running transformer only two layers at a time are on the device

A profile changes no bit of a result. Models on the host are ordinary models whose arrays have the memory kind
"pinned_host"; the loop over layers fetches those it finds there (`models.nn.stacked_layers.scan_layers`).
"""

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import jax
from flax import nnx
from jax.sharding import Sharding, SingleDeviceSharding

from wan_jax.parameters import dotted, named_parameters

Model = TypeVar("Model", bound=nnx.Module)


@dataclass(frozen=True)
class Profile:
    """One way to keep the weights."""

    name: str
    idle_on_host: bool  # models that do not run wait on the host
    layers_on_host: bool  # and so do the layers of the transformer that runs

    def on_host(self, parameter: str, running: bool) -> bool:
        """Whether a parameter ("blocks.feed_forward.up.kernel") is on the host while its model runs, or waits."""
        if running:
            return self.layers_on_host and streams(parameter)
        return self.idle_on_host


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("resident", idle_on_host=False, layers_on_host=False),
        Profile("swap", idle_on_host=True, layers_on_host=False),
        Profile("stream", idle_on_host=True, layers_on_host=True),
    )
}


RESIDENT = PROFILES["resident"]


def streams(parameter: str) -> bool:
    """Whether `stream` keeps a parameter on the host: the stacked kernels, 99.9 % of a transformer.

    The small vectors beside them stay on the device: copies cost a fixed time each.
    """
    return parameter.startswith("blocks.") and parameter.endswith((".kernel", ".kernel.values"))


@dataclass
class _Copy:
    """A model that is ready to run."""

    model: nnx.Module  # that it was made of
    placed: nnx.Module
    users: int = 0  # blocks that run it now; 0: it was prefetched

    def free(self) -> None:
        kept = {id(leaf) for leaf in jax.tree.leaves(self.model)}
        for leaf in jax.tree.leaves(self.placed):
            if id(leaf) not in kept:
                leaf.delete()


class Memory:
    """Moves a pipeline's models as the profile asks. Threads that run one model at the same time share its copy.

    Args:
      profile: see above.
      device: where models run; the default device if None.
    """

    def __init__(self, profile: Profile, device: jax.Device | None = None):
        self.profile = profile
        self._device = jax.devices()[0] if device is None else device
        self._copies: dict[int, _Copy] = {}  # by the model's id
        self._lock = threading.Lock()

    @property
    def copies(self) -> list[nnx.Module]:
        """The copies that exist now."""
        return [copy.placed for copy in self._copies.values()]

    @contextlib.contextmanager
    def on_device(self, model: Model) -> Iterator[Model]:
        """The model ready to run. Its copy is freed when the last block that runs it ends."""
        if not self.profile.idle_on_host:
            yield model
            return
        with self._lock:
            copy = self._copies.get(id(model)) or self._copy(model)
            copy.users += 1
        try:
            yield cast(Model, copy.placed)
        finally:
            with self._lock:
                copy.users -= 1
                if copy.users == 0:
                    self._copies.pop(id(model)).free()

    def prefetch(self, model: nnx.Module) -> bool:
        """Begins to copy a model that will run next, if there is room beside all that was ever in use; says whether."""
        with self._lock:
            if not self.profile.idle_on_host or id(model) in self._copies:
                return False
            parameters = named_parameters(model).items()
            moved = sum(array.nbytes for name, array in parameters if not self.profile.on_host(name, running=True))
            if moved > free_bytes(self._device):
                return False
            self._copy(model)
            return True

    def drop_prefetched(self) -> None:
        """Frees what was prefetched and is not in use. A run that still wants it copies it again."""
        with self._lock:
            for key in [key for key, copy in self._copies.items() if copy.users == 0]:
                self._copies.pop(key).free()

    def _copy(self, model: nnx.Module) -> _Copy:
        shardings = {
            name: single_device(self._device, self.profile.on_host(name, running=True))
            for name in named_parameters(model)
        }
        copy = self._copies[id(model)] = _Copy(model, place(model, shardings))
        return copy


def place(model: Model, shardings: Mapping[str, Sharding]) -> Model:
    """The model with each array where its name's sharding says; arrays that are there already are shared."""
    graphdef, state = nnx.split(model)
    leaves = []
    for path, variable in state.flat_state():
        array, target = variable.get_value(), shardings[dotted(path)]
        leaves.append((path, variable if array.sharding == target else variable.replace(jax.device_put(array, target))))
    return nnx.merge(graphdef, nnx.State.from_flat_path(leaves))


def single_device(device: jax.Device, on_host: bool = False) -> Sharding:
    """The sharding of an array on the device, or in the host memory that the device can copy from by itself."""
    return SingleDeviceSharding(device, memory_kind="pinned_host" if on_host else device.default_memory().kind)


def abstract_array(shape: tuple[int, ...], dtype: Any, sharding: Sharding) -> jax.ShapeDtypeStruct:
    """A shape that traces as the array will, in host memory or on the device.

    By its sharding alone JAX takes any shape on a single device for one in device memory; `on_host` tells.
    """
    array = jax.ShapeDtypeStruct(shape, dtype)
    if sharding.memory_kind == "pinned_host":
        array = jax.eval_shape(lambda array: jax.device_put(array, jax.memory.Space.Host), array)
    return array.update(sharding=sharding)


def free_bytes(device: jax.Device) -> int:
    """Device memory that this process never needed so far; 0 where the backend does not say."""
    statistics = device.memory_stats() or {}
    return max(0, statistics.get("bytes_limit", 0) - statistics.get("peak_bytes_in_use", 0))


def to_device(array: jax.Array) -> jax.Array:
    return jax.device_put(array, jax.memory.Space.Device) if on_host(array) else array


def on_host(array: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Whether an array, or what is traced in its place, lies in host memory."""
    return jax.typeof(array).memory_space == jax.memory.Space.Host
