"""Orbax trees of named arrays, read and written group by group."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
from orbax.checkpoint import v1 as ocp

from wan_jax.checkpoint.formats.tensors import Box, ReadMany, TensorInfo, TensorStore, cast, one_line, split_by_bytes
from wan_jax.errors import InputError

ARRAYS = "state"  # Orbax's own folder in a tree

WRITE_BYTES = 1 << 30  # held in memory per call that saves; fewer calls make the final merge of metadata cheaper
READ_BYTES = 512 << 20  # the same per call that loads; a call for each small tensor would take longer than its data
CHUNK_BYTES = 64 << 20  # a process that needs a slice of a parameter reads whole chunks


class OrbaxStore(TensorStore):
    """The Orbax tree of one model. Raises InputError where Orbax cannot read it."""

    def __init__(self, folder: Path):
        self.place = str(folder)
        self._folder = folder.resolve()
        try:
            self._metadata: Mapping[str, Any] = ocp.metadata(self._folder).metadata
            self.tensors = {
                name: TensorInfo(tuple(leaf.shape), np.dtype(leaf.dtype), self.place)
                for name, leaf in self._metadata.items()
            }
        except Exception as error:  # Orbax has no exception of its own for a damaged checkpoint
            raise InputError(f"{self.place}: not a readable Orbax tree ({one_line(error)}); convert it again") from None

    def read(self, name: str, dtype: np.dtype | None = None) -> np.ndarray:
        return next(self.read_many([name], dtype))

    def read_box(self, name: str, box: Box, dtype: np.dtype | None = None) -> np.ndarray:
        """Reads the chunks that the box touches, by tensorstore itself: Orbax reads parts only to devices."""
        place = {"driver": "ocdbt", "base": f"file://{self._folder}/{ARRAYS}/", "path": f"{name}/"}
        try:
            array = tensorstore.open({"driver": "zarr3", "kvstore": place}, open=True, read=True).result()
            return cast(array[box].read().result(), dtype)
        except ValueError as error:  # as tensorstore says everything
            raise InputError(f"{self.place}: {name} cannot be read ({one_line(error)}); convert it again") from None

    def read_many(self, names: Sequence[str], dtype: np.dtype | None = None) -> Iterator[np.ndarray]:
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        for group in split_by_bytes({name: self.tensors[name] for name in names}, READ_BYTES):
            try:
                with context:
                    arrays = ocp.load(self._folder, {name: self._metadata[name] for name in group})
            except Exception as error:
                raise InputError(f"{self.place}: cannot be read ({one_line(error)}); convert it again") from None
            for name in group:
                yield cast(arrays.pop(name), dtype)


def write_orbax(folder: Path, tensors: Mapping[str, TensorInfo], read_many: ReadMany) -> None:
    """Writes one model's tree, group by group; until it is complete it stands under another name."""
    context = ocp.Context()
    context.array.saving.use_compression = False  # weights are noise to a general compressor
    context.array.saving.enable_write_sharding_file = False
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    folder = folder.resolve()
    with context:
        for group in split_by_bytes(tensors, WRITE_BYTES):
            ocp.partial.save(folder, dict(zip(group, read_many(list(group)), strict=True)))
        ocp.partial.finalize(folder)
