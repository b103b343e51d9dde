"""Where weights wait and where they run: the memory profiles.

    resident   every model stays on the device
    swap       models wait in pinned host memory; each is on the device only while it runs
    stream     as swap, and of a running transformer only two layers at a time are on the device

A profile changes no bit of a result. Models on the host are ordinary models whose arrays have the memory kind
"pinned_host"; the loop over layers fetches those it finds there (`models.layers.scan_layers`).
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

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
    return parameter.startswith("blocks.") and parameter.endswith(".kernel")


class Memory:
    """Moves a pipeline's models as the profile asks.

    Args:
      profile: see above.
      device: where models run; the default device if None.
    """

    def __init__(self, profile: Profile, device: jax.Device | None = None):
        self.profile = profile
        self._device = jax.devices()[0] if device is None else device
        self._prefetched: dict[int, tuple[Any, Any]] = {}  # the model's id -> the copy, the model

    @contextlib.contextmanager
    def on_device(self, model: Model) -> Iterator[Model]:
        """The model ready to run; what was copied for it is freed when the block ends."""
        if not self.profile.idle_on_host:
            yield model
            return
        placed, _ = self._prefetched.pop(id(model), (None, None))
        if placed is None:
            placed = self._place(model)
        try:
            yield placed
        finally:
            self._free(placed, model)

    def prefetch(self, model: nnx.Module) -> bool:
        """Begins to copy a model that will run next, if there is room beside all that was ever in use; says whether."""
        if not self.profile.idle_on_host or id(model) in self._prefetched:
            return False
        moved = sum(
            array.nbytes
            for name, array in named_parameters(model).items()
            if not self.profile.on_host(name, running=True)
        )
        if moved > free_bytes(self._device):
            return False
        self._prefetched[id(model)] = self._place(model), model
        return True

    def drop_prefetched(self) -> None:
        """Frees what was prefetched and never used."""
        while self._prefetched:
            _, (placed, model) = self._prefetched.popitem()
            self._free(placed, model)

    def _place(self, model: Model) -> Model:
        return place(
            model,
            {
                name: single_device(self._device, self.profile.on_host(name, running=True))
                for name in named_parameters(model)
            },
        )

    def _free(self, placed: nnx.Module, model: nnx.Module) -> None:
        kept = {id(leaf) for leaf in jax.tree.leaves(model)}
        for leaf in jax.tree.leaves(placed):
            if id(leaf) not in kept:
                leaf.delete()


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

    By its sharding alone JAX takes any shape on a single device for one in device memory. JAX 0.10 always does:
    `models.layers.on_host` tells.
    """
    array = jax.ShapeDtypeStruct(shape, dtype)
    if sharding.memory_kind == "pinned_host":
        array = jax.eval_shape(lambda array: jax.device_put(array, jax.memory.Space.Host), array)
    return array.update(sharding=sharding)


def free_bytes(device: jax.Device) -> int:
    """Device memory that this process never needed so far; 0 where the backend does not say."""
    statistics = device.memory_stats() or {}
    return max(0, statistics.get("bytes_limit", 0) - statistics.get("peak_bytes_in_use", 0))
