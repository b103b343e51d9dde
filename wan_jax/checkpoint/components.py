"""One model of a checkpoint, bound to its stored tensors: every name and shape is verified before any data is read."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from wan_jax.checkpoint.formats.tensors import (
    WEIGHT_DTYPES,
    Box,
    TensorInfo,
    TensorStore,
    check_finite_weights,
    copy_into,
)
from wan_jax.checkpoint.tables import expanded_table, is_ignored, max_repeats, num_layers, parameter_table
from wan_jax.checkpoint.tables.mapping import Naming, ParamMapping
from wan_jax.config import ModelConfig
from wan_jax.errors import InputError
from wan_jax.models.build import abstract_model


@dataclass(frozen=True)
class Component:
    """A model's table next to the store that holds its tensors."""

    name: str  # "text_encoder", "vae", "image_encoder", "denoiser", "high_noise" or "low_noise"
    config: ModelConfig
    naming: Naming
    store: TensorStore
    stored_names: Mapping[str, tuple[str, ...]]  # name -> where the store has it; several for copies

    @property
    def table(self) -> list[ParamMapping]:
        """Every parameter, layer by layer."""
        return expanded_table(self.config)

    def info(self, mapping: ParamMapping) -> TensorInfo:
        return self.store.tensors[self.stored_names[mapping.name][0]]

    @property
    def nbytes(self) -> int:
        return sum(self.info(mapping).nbytes for mapping in self.table)

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(mapping.size for mapping in self.table)

    def read_parameters(self, mappings: Sequence[ParamMapping], dtype: np.dtype | None = None) -> Iterator[np.ndarray]:
        """Parameters in our layout, in the order of `mappings`; `dtype` None keeps the stored ones."""
        for mapping, tensor in zip(mappings, self._read(mappings, dtype), strict=True):
            yield tensor if self.naming == "wan_jax" else mapping.from_torch(tensor)

    def read_box(self, mapping: ParamMapping, box: Box, dtype: np.dtype | None = None) -> np.ndarray:
        """A part of a parameter in our layout; less than all of the stored tensor is read where its layout allows."""
        name, stored = self.stored_names[mapping.name][0], mapping.stored_box(box, self.naming)
        if stored is None:
            return next(self.read_parameters([mapping], dtype))[box]
        tensor = self.store.read_box(name, stored, dtype)
        check_finite_weights(name, tensor, self.store.place)
        if self.naming == "wan_jax":
            return tensor
        return replace(mapping, torch_shape=tensor.shape).from_torch(tensor)

    def read_torch(self, mappings: Sequence[ParamMapping], dtype: np.dtype | None = None) -> Iterator[np.ndarray]:
        """The same in PyTorch's layout."""
        for mapping, tensor in zip(mappings, self._read(mappings, dtype), strict=True):
            yield mapping.to_torch(tensor) if self.naming == "wan_jax" else tensor

    def read_stacked(
        self, dtype: np.dtype, boxes: Mapping[str, Box | None], progress: Callable[[int], None] = lambda done: None
    ) -> Iterator[tuple[str, np.ndarray]]:
        """The parameters, stacked as in the model's abstract tree, in fresh host memory: all, or the part in its box.

        `progress` receives the number of stored bytes that are done, read or not needed.
        """
        table, layers = parameter_table(self.config), num_layers(self.config)
        targets = [(m, [m.at(layer) for layer in range(layers)] if m.per_layer else [m]) for m in table]
        # One stream for all: stores that read small tensors in groups would lose that between parameters.
        parameters = self.read_parameters(
            [part for mapping, parts in targets if boxes[mapping.stacked_name] is None for part in parts], dtype
        )
        done = 0
        for mapping, parts in targets:
            box = boxes[mapping.stacked_name]
            shape = stacked_shape(mapping, layers) if box is None else tuple(axis.stop - axis.start for axis in box)
            host = np.empty(shape, dtype)
            first = 0 if box is None or not mapping.per_layer else box[0].start
            for index, part in enumerate(parts):
                if not mapping.per_layer or first <= index < first + len(host):
                    if box is None:
                        tensor = next(parameters)
                    else:
                        tensor = self.read_box(part, box[1:] if mapping.per_layer else box, dtype)
                    copy_into(host[index - first] if mapping.per_layer else host, tensor)
                done += self.info(part).nbytes
                progress(done)
            yield mapping.stacked_name, host

    def _read(self, mappings: Sequence[ParamMapping], dtype: np.dtype | None) -> Iterator[np.ndarray]:
        names = [self.stored_names[mapping.name] for mapping in mappings]
        for (name, *copies), tensor in zip(
            names, self.store.read_many([name for name, *_ in names], dtype), strict=True
        ):
            for copy in copies:
                if not np.array_equal(self.store.read(copy, dtype).view(np.uint8), tensor.view(np.uint8)):
                    raise InputError(
                        f"{self.store.place}: {name} and {copy} must be equal and differ; remove the wrong one"
                    )
            check_finite_weights(name, tensor, self.store.place)
            yield tensor


def bind_component(component: str, config: ModelConfig, naming: Naming, store: TensorStore) -> Component:
    """Matches the model's table with the stored tensors.

    Raises InputError, naming the first few and how many, for tensors that are missing, unexpected, of the wrong shape
    or of a dtype that is no weight's.
    """
    if max_repeats(config) > len(store.tensors):  # before a table of any length is made
        raise InputError(
            f"{store.place}: {len(store.tensors)} tensors are too few for {max_repeats(config)} layers; is this "
            "the whole file, and of the model that its config describes?"
        )
    table = expanded_table(config)
    candidates = {mapping.name: mapping.stored_names(naming) for mapping in table}
    present = {name: tuple(c for c in candidates[name] if c in store.tensors) for name in candidates}
    _raise_for(store.place, "missing", [candidates[name][0] for name in candidates if not present[name]])
    known = {name for group in present.values() for name in group}
    unexpected = [name for name in store.tensors if name not in known and not is_ignored(config, name)]
    _raise_for(store.place, "unexpected", unexpected)
    wrong_shapes, wrong_dtypes = [], []
    for mapping in table:
        needed = mapping.stored_shape(naming)
        for name in present[mapping.name]:
            info = store.tensors[name]
            if info.shape != needed:
                wrong_shapes.append(f"{name} has {list(info.shape)} and needs {list(needed)}")
            if info.dtype not in WEIGHT_DTYPES:
                wrong_dtypes.append(f"{name} is {info.dtype.name}")
    _raise_for(store.place, "of the wrong shape", wrong_shapes)
    _raise_for(store.place, f"of an unexpected dtype (not {', '.join(d.name for d in WEIGHT_DTYPES)})", wrong_dtypes)
    return Component(component, config, naming, store, present)


def _raise_for(place: str, problem: str, names: Sequence[str], shown: int = 3) -> None:
    if names:
        rest = f" and {len(names) - shown} more" if len(names) > shown else ""
        tensors = "tensor is" if len(names) == 1 else "tensors are"
        raise InputError(
            f"{place}: {len(names)} {tensors} {problem}: {', '.join(names[:shown])}{rest}; "
            "is this the whole file, and of the model that its config describes?"
        )


Shardings = jax.sharding.Sharding | Mapping[str, jax.sharding.Sharding] | None


def load_component(
    component: Component,
    dtype: np.dtype,
    sharding: Shardings = None,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, jax.Array]:
    """The component's parameters on device, keyed and stacked as in the model's abstract tree.

    Of one (stacked) parameter at a time the part for this process's devices is read and assembled in host memory: that
    is the host peak beside the result. `sharding` is one for all, or one per name. `progress` receives the number of
    stored bytes that are done, read or not needed.
    """
    check_against_model(component.config)
    layers = num_layers(component.config)
    shapes = {m.stacked_name: stacked_shape(m, layers) for m in parameter_table(component.config)}
    boxes = {name: local_box(_sharding_of(sharding, name), shape) for name, shape in shapes.items()}
    loaded = {}
    for name, host in component.read_stacked(dtype, boxes, progress):
        # Without waiting, transfers queue up and hold several host buffers.
        loaded[name] = place_box(host, boxes[name], shapes[name], _sharding_of(sharding, name)).block_until_ready()
        del host  # else two would live while the next is read
    return loaded


def stacked_shape(mapping: ParamMapping, layers: int) -> tuple[int, ...]:
    return (layers, *mapping.shape) if mapping.per_layer else mapping.shape


def _sharding_of(shardings: Shardings, name: str) -> jax.sharding.Sharding | None:
    return shardings[name] if isinstance(shardings, Mapping) else shardings


def local_box(sharding: jax.sharding.Sharding | None, shape: tuple[int, ...]) -> Box | None:
    """The smallest box that has all that this process's devices have of an array; None where that is all of it."""
    if sharding is None or not shape:
        return None
    indices = sharding.addressable_devices_indices_map(shape).values()
    bounds = [[part.indices(size)[:2] for part, size in zip(index, shape, strict=True)] for index in indices if index]
    box = tuple(
        slice(min(start for start, _ in axis), max(stop for _, stop in axis)) for axis in zip(*bounds, strict=True)
    )
    is_whole = all((part.start, part.stop) == (0, size) for part, size in zip(box, shape, strict=True))
    return None if is_whole else box


def place_box(
    host: np.ndarray, box: Box | None, shape: tuple[int, ...], sharding: jax.sharding.Sharding | None
) -> jax.Array:
    """An array of that shape, of which this process has `box`."""
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(host, sharding)
    starts = [0] * len(shape) if box is None else [part.start for part in box]

    def part(index: Any) -> np.ndarray:
        bounds = [axis.indices(size)[:2] for axis, size in zip(index, shape, strict=True)]
        return host[tuple(slice(begin - at, end - at) for (begin, end), at in zip(bounds, starts, strict=True))]

    return jax.make_array_from_callback(shape, sharding, part)


@functools.cache
def check_against_model(config: ModelConfig) -> None:
    """Raises ValueError where a table and the model's abstract tree disagree (a bug in one of the two)."""
    check_table(parameter_table(config), config)


def check_table(table: Sequence[ParamMapping], config: ModelConfig) -> None:
    in_table = {mapping.stacked_name: stacked_shape(mapping, num_layers(config)) for mapping in table}
    in_model = {name: info.shape for name, info in abstract_model(config).items()}
    names = sorted(in_table.keys() | in_model.keys())
    differing = [name for name in names if in_table.get(name) != in_model.get(name)]
    if differing:
        name = differing[0]
        raise ValueError(
            f"{len(differing)} names or shapes differ between the table and the model, first {name}: "
            f"{in_table.get(name)} in the table, {in_model.get(name)} in the model"
        )
