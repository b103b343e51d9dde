"""Orbax trees of named arrays, read and written group by group."""

import contextlib
import gc
import logging
import sys
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tensorstore
from orbax.checkpoint import v1 as ocp

from wan_jax.checkpoint.formats.tensors import (
    Box,
    ReadMany,
    TensorInfo,
    TensorStore,
    brief,
    cast,
    raw_bytes,
    split_by_bytes,
)
from wan_jax.errors import InputError, OutputError

ARRAYS = "state"  # Orbax's own folder in a tree: a database of zarr arrays
DESCRIPTION = "/zarr.json"  # of each array

WRITE_BYTES = 1 << 30  # held in memory per call that saves; fewer calls make the final merge of metadata cheaper
READ_BYTES = 512 << 20  # the same per call that loads; a call for each small tensor would take longer than its data
CHUNK_BYTES = 64 << 20  # a process that needs a slice of a parameter reads whole chunks


class OrbaxStore(TensorStore):
    """The Orbax tree of one model. Raises InputError where it cannot be read.

    It is read by tensorstore, as Orbax does itself: Orbax reads parts of arrays only to devices, and its threads print
    tracebacks where a tree is damaged.
    """

    def __init__(self, folder: Path, checksums: Mapping[str, int] | None = None):
        """`checksums` are the CRC-32 of tensors, where known: reads of whole tensors verify them."""
        self.place = str(folder)
        self.checksums = checksums or {}
        database = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder.resolve()}/{ARRAYS}/"}}
        with self._readable("it"):
            keys = tensorstore.KvStore.open(database).result().list().result()
            if not keys:
                raise ValueError("holds no arrays")
            names = [key.decode().removesuffix(DESCRIPTION) for key in keys if key.endswith(DESCRIPTION.encode())]
            places = {name: {"driver": "zarr3", "kvstore": {**database, "path": f"{name}/"}} for name in names}
            opening = {name: tensorstore.open(place, open=True, read=True) for name, place in places.items()}
            self._arrays = {name: future.result() for name, future in opening.items()}
            self.tensors = {
                name: TensorInfo(tuple(array.shape), np.dtype(array.dtype.numpy_dtype), self.place)
                for name, array in self._arrays.items()
            }

    def read(self, name: str, dtype: np.dtype | None = None) -> np.ndarray:
        return next(self.read_many([name], dtype))

    def read_box(self, name: str, box: Box, dtype: np.dtype | None = None) -> np.ndarray:
        """Reads the chunks that the box touches."""
        with self._readable(name):
            return cast(self._arrays[name][box].read().result(), dtype)

    def read_many(self, names: Sequence[str], dtype: np.dtype | None = None) -> Iterator[np.ndarray]:
        for group in split_by_bytes({name: self.tensors[name] for name in names}, READ_BYTES):
            with self._readable(f"{next(iter(group))} or what follows it"):
                reading = [self._arrays[name].read() for name in group]
                arrays = dict(zip(group, [future.result() for future in reading], strict=True))
            del reading
            for name, checksum in crc32(arrays).items() if self.checksums else ():
                if self.checksums.get(name, checksum) != checksum:
                    raise InputError(
                        f"{self.place}: {name} is damaged (its checksum differs); convert or copy it again"
                    )
            for name in group:
                yield cast(arrays.pop(name), dtype)

    @contextlib.contextmanager
    def _readable(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # tensorstore says everything as ValueError, damaged names are another
            problem = f"not a readable Orbax tree: {what} cannot be read ({brief(error)})"
            raise InputError(f"{self.place}: {problem}; convert or copy it again") from None


@contextlib.contextmanager
def _writable(folder: Path) -> Iterator[None]:
    """One error instead of the tracebacks that Orbax's threads print, a hundred where the disk is full."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    before, hook = [logger.level for logger in loggers], sys.unraisablehook
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        sys.unraisablehook = lambda _: None
        yield
    except Exception as error:  # whatever Orbax and tensorstore say
        failure = OutputError(f"{folder} could not be written ({brief(error)})")
        del error
        time.sleep(1)  # until its other writes end, with what they say and the files that they make
        gc.collect()
        raise failure from None
    finally:
        sys.unraisablehook = hook
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def crc32(arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
    """The checksum of each array's bytes, computed by threads."""
    with ThreadPoolExecutor() as threads:
        return dict(zip(arrays, threads.map(lambda array: zlib.crc32(raw_bytes(array)), arrays.values()), strict=True))


def write_orbax(folder: Path, tensors: Mapping[str, TensorInfo], read_many: ReadMany) -> dict[str, int]:
    """Writes one model's tree, group by group; until it is complete it stands under another name.

    Returns the CRC-32 of every tensor.
    """
    checksums: dict[str, int] = {}
    context = ocp.Context()
    context.array.saving.use_compression = False  # weights are noise to a general compressor
    context.array.saving.enable_write_sharding_file = False
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    folder = folder.resolve()
    with context:
        for group in split_by_bytes(tensors, WRITE_BYTES):
            arrays = dict(zip(group, read_many(list(group)), strict=True))
            checksums |= crc32(arrays)
            with _writable(folder):
                ocp.partial.save(folder, arrays)
            del arrays  # before the next group is read
        with _writable(folder):
            ocp.partial.finalize(folder)
    return checksums
