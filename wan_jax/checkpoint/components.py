"""One model of a checkpoint, bound to its stored tensors: every name and shape is verified before any data is read."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from wan_jax.checkpoint.layouts import (
    ModelConfig,
    Naming,
    Row,
    abstract_model,
    expand_layers,
    is_ignored,
    model_rows,
    num_layers,
    other_names,
)
from wan_jax.checkpoint.tensors import WEIGHT_DTYPES, Box, TensorInfo, TensorStore
from wan_jax.errors import InputError


@dataclass(frozen=True)
class Component:
    """A model's table next to the store that holds its tensors."""

    name: str  # "text_encoder", "vae", "image_encoder", "denoiser", "high_noise" or "low_noise"
    config: ModelConfig
    naming: Naming
    store: TensorStore
    stored_names: Mapping[str, tuple[str, ...]]  # our name -> where the store has it; more than one for copies

    @property
    def rows(self) -> list[Row]:
        return expand_layers(model_rows(self.config), num_layers(self.config))

    def info(self, row: Row) -> TensorInfo:
        return self.store.tensors[self.stored_names[row.ours][0]]

    @property
    def nbytes(self) -> int:
        return sum(self.info(row).nbytes for row in self.rows)

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(row.size for row in self.rows)

    def read_ours(self, rows: Sequence[Row], dtype: np.dtype | None = None) -> Iterator[np.ndarray]:
        """Parameters in our layout, in the order of `rows`; `dtype` None keeps the stored ones."""
        for row, tensor in zip(rows, self._read(rows, dtype), strict=True):
            yield tensor if self.naming == "ours" else row.to_ours(tensor)

    def read_box(self, row: Row, box: Box, dtype: np.dtype | None = None) -> np.ndarray:
        """A part of a parameter in our layout; less than all of the stored tensor is read where its layout allows."""
        name, stored = self.stored_names[row.ours][0], row.stored_box(box, self.naming)
        if stored is None:
            return next(self.read_ours([row], dtype))[box]
        tensor = self.store.read_box(name, stored, dtype)
        if self.naming == "ours":
            return tensor
        return replace(row, shape=tensor.shape).to_ours(tensor)

    def read_theirs(self, rows: Sequence[Row], dtype: np.dtype | None = None) -> Iterator[np.ndarray]:
        """The same in PyTorch's layout."""
        for row, tensor in zip(rows, self._read(rows, dtype), strict=True):
            yield row.from_ours(tensor) if self.naming == "ours" else tensor

    def _read(self, rows: Sequence[Row], dtype: np.dtype | None) -> Iterator[np.ndarray]:
        names = [self.stored_names[row.ours] for row in rows]
        for (name, *copies), tensor in zip(
            names, self.store.read_many([name for name, *_ in names], dtype), strict=True
        ):
            for copy in copies:
                if not np.array_equal(self.store.read(copy, dtype).view(np.uint8), tensor.view(np.uint8)):
                    raise InputError(
                        f"{self.store.place}: {name} and {copy} must be equal and differ; remove the wrong one"
                    )
            yield tensor


def bind_component(name: str, config: ModelConfig, naming: Naming, store: TensorStore) -> Component:
    """Matches the model's table with the stored tensors.

    Raises InputError, naming the first few and how many, for tensors that are missing, unexpected, of the wrong shape
    or of a dtype that is no weight's.
    """
    rows = expand_layers(model_rows(config), num_layers(config))
    stored_names = {}
    for row in rows:
        candidates = (row.name(naming), *other_names(row, naming))
        stored_names[row.ours] = tuple(candidate for candidate in candidates if candidate in store.tensors)
    _raise_for(store.place, "missing", [row.name(naming) for row in rows if not stored_names[row.ours]])
    known = {candidate for candidates in stored_names.values() for candidate in candidates}
    unexpected = [name for name in store.tensors if name not in known and not is_ignored(config, name)]
    _raise_for(store.place, "unexpected", unexpected)
    wrong_shapes, wrong_dtypes = [], []
    for row in rows:
        for candidate in stored_names[row.ours]:
            info, shape = store.tensors[candidate], row.stored_shape(naming)
            if info.shape != shape:
                wrong_shapes.append(f"{candidate} has {list(info.shape)} and needs {list(shape)}")
            if info.dtype not in WEIGHT_DTYPES:
                wrong_dtypes.append(f"{candidate} is {info.dtype.name}")
    _raise_for(store.place, "of the wrong shape", wrong_shapes)
    _raise_for(store.place, f"of an unexpected dtype (not {', '.join(d.name for d in WEIGHT_DTYPES)})", wrong_dtypes)
    return Component(name, config, naming, store, stored_names)


def _raise_for(place: str, problem: str, names: Sequence[str], shown: int = 3) -> None:
    if names:
        more = f" and {len(names) - shown} more" if len(names) > shown else ""
        tensors = "tensor is" if len(names) == 1 else "tensors are"
        raise InputError(
            f"{place}: {len(names)} {tensors} {problem}: {', '.join(names[:shown])}{more}; "
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
    stored bytes that are done, read or not needed here.
    """
    check_against_model(component.config)
    layers = num_layers(component.config)
    targets = [
        (row, [row.at(layer) for layer in range(layers)] if row.per_layer else [row])
        for row in model_rows(component.config)
    ]
    shapes = {row.stacked_name: (layers, *row.our_shape) if row.per_layer else row.our_shape for row, _ in targets}
    boxes = {name: local_box(_sharding_of(sharding, name), shape) for name, shape in shapes.items()}
    # One stream for all: stores that read small tensors in groups would lose that between parameters.
    whole = [part for row, parts in targets if boxes[row.stacked_name] is None for part in parts]
    parameters = component.read_ours(whole, dtype)
    loaded = {}
    done = 0
    for row, parts in targets:
        name, box = row.stacked_name, boxes[row.stacked_name]
        shape = shapes[name] if box is None else tuple(part.stop - part.start for part in box)
        host = np.empty(shape, dtype)
        first = 0 if box is None or not row.per_layer else box[0].start
        for index, part in enumerate(parts):
            if not row.per_layer or first <= index < first + len(host):
                if box is None:
                    tensor = next(parameters)
                else:
                    tensor = component.read_box(part, box[1:] if row.per_layer else box, dtype)
                copy_into(host[index - first] if row.per_layer else host, tensor)
            done += component.info(part).nbytes
            progress(done)
        # Without waiting, transfers queue up and hold several host buffers.
        loaded[name] = place_box(host, box, shapes[name], _sharding_of(sharding, name)).block_until_ready()
    return loaded


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


def copy_into(target: np.ndarray, source: np.ndarray) -> None:
    """target[...] = source for arrays of one shape and dtype, bit by bit."""
    integer = np.dtype(f"u{target.dtype.itemsize}")  # NumPy copies dtypes that it does not know item by item
    target, source = target.view(integer), source.view(integer)
    if source.ndim < 2 or source.flags.c_contiguous:
        np.copyto(target, source)
        return
    # A transposed source: strips that fit the cache are about five times faster than one copy.
    strip = 32
    for start in range(0, target.shape[-1], strip):
        np.copyto(target[..., start : start + strip], source[..., start : start + strip])


@functools.cache
def check_against_model(config: ModelConfig) -> None:
    """Raises ValueError where a table and the model's abstract tree disagree (a bug in one of the two)."""
    table = {}
    for row in model_rows(config):
        table[row.stacked_name] = (num_layers(config), *row.our_shape) if row.per_layer else row.our_shape
    model = {name: info.shape for name, info in abstract_model(config).items()}
    differing = sorted(name for name in table.keys() | model.keys() if table.get(name) != model.get(name))
    if differing:
        name = differing[0]
        raise ValueError(
            f"{len(differing)} names or shapes differ between the table and the model, first {name}: "
            f"{table.get(name)} in the table, {model.get(name)} in the model"
        )
