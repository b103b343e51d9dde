"""What every kind of weight file has in common: named tensors described by a header and read one at a time."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from wan_jax.errors import InputError, one_line

# (component, bytes done, bytes in all), called after every tensor. An exception in it aborts the work cleanly.
Progress = Callable[[str, int, int], None]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT8_DTYPES = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))
WEIGHT_DTYPES = (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16)


@dataclass(frozen=True)
class TensorInfo:
    """A stored tensor: known from the file's header, without reading it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    file: str  # the file that holds it, for messages

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


# A part of a tensor: from where to where, along each axis.
Box = tuple[slice, ...]


class TensorStore:
    """Named tensors that are read one at a time."""

    place: str  # the file or folder, for messages
    tensors: Mapping[str, TensorInfo]  # what it holds, by stored name
    checksums: Mapping[str, int] = MappingProxyType({})  # those that reads of whole tensors verify

    def read(self, name: str, dtype: np.dtype | None = None) -> np.ndarray:
        """The tensor in `dtype` (None: as described), rounded at most once."""
        raise NotImplementedError

    def read_box(self, name: str, box: Box, dtype: np.dtype | None = None) -> np.ndarray:
        """A part of the tensor. Stores that can read less than all of it do."""
        return self.read(name, dtype)[box]

    def read_many(self, names: Sequence[str], dtype: np.dtype | None = None) -> Iterator[np.ndarray]:
        """The tensors in the order of `names`; stores that read faster in groups hold a small group at a time."""
        for name in names:
            yield self.read(name, dtype)


# What a writer reads from: the tensors of the given names, in that order.
ReadMany = Callable[[Sequence[str]], Iterator[np.ndarray]]


def named_dtypes(table: str) -> dict[str, np.dtype]:
    """A format's names of dtypes, from "name=dtype" with spaces between."""
    return {name: np.dtype(dtype) for name, dtype in (entry.split("=") for entry in table.split())}


MAX_RANK = 64  # NumPy's
MAX_NUMBER = 2**48  # larger sizes and offsets are damage, and their products slow


def are_sizes(numbers: object) -> bool:
    """Whether what a file says is a list of sizes or offsets: whole numbers of a usual magnitude."""
    return (
        isinstance(numbers, list | tuple)
        and len(numbers) <= MAX_RANK
        and all(type(number) is int and 0 <= number <= MAX_NUMBER for number in numbers)
    )


def strict_json(content: bytes) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError for anything else, also for duplicate keys and NaN or Infinity."""

    def refuse(text: str) -> None:
        raise ValueError(f"{text} is no JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            raise ValueError("a key is there twice")
        return result

    try:
        result = json.loads(content.decode(), parse_constant=refuse, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(result, dict):
        raise ValueError("not a JSON object")
    return result


def brief(error: Exception) -> str:
    """What an error of a library says, in one line of bounded length."""
    return f"{type(error).__name__}: {one_line(error)[:200]}"


def visible_files(folder: Path, pattern: str) -> list[Path]:
    """The files that match, sorted; not hidden ones, such as macOS's "._NAME" beside every NAME on foreign disks."""
    return sorted(path for path in folder.glob(pattern) if path.is_file() and not path.name.startswith("."))


def split_by_bytes(tensors: Mapping[str, TensorInfo], limit: int) -> list[dict[str, TensorInfo]]:
    """Splits the tensors, in order, into groups of at most `limit` bytes (a larger tensor gets its own)."""
    groups: list[dict[str, TensorInfo]] = [{}]
    filled = 0
    for name, info in tensors.items():
        if groups[-1] and filled + info.nbytes > limit:
            groups.append({})
            filled = 0
        groups[-1][name] = info
        filled += info.nbytes
    return groups


def check_description(name: str, array: np.ndarray, info: TensorInfo) -> None:
    """Raises ValueError where a tensor to be written differs from what its file's header says (a bug)."""
    if array.shape != info.shape or array.dtype != info.dtype:
        raise ValueError(f"{name} is {array.dtype} {array.shape}, the header says {info.dtype} {info.shape}")


def raw_bytes(array: np.ndarray) -> memoryview:
    """The array's bytes in C order, without a copy where it is contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def cast(array: np.ndarray, dtype: np.dtype | None) -> np.ndarray:
    """`array` in `dtype` (round to nearest even); the same object where nothing changes."""
    return array if dtype is None or array.dtype == dtype else array.astype(dtype)


def check_finite_weights(name: str, array: np.ndarray, place: str) -> None:
    """Raises InputError for weights that are NaN or infinite. `array` is float of 16 bits or more.

    Their bits are the largest: two maxima of integers are several times faster than isfinite, which bfloat16 lacks.
    """
    signed, unsigned = f"i{array.dtype.itemsize}", f"u{array.dtype.itemsize}"
    infinities = np.asarray([np.inf, -np.inf], array.dtype)
    if array.size and (
        array.view(signed).max() >= infinities.view(signed)[0]
        or array.view(unsigned).max() >= infinities.view(unsigned)[1]
    ):
        raise InputError(f"{place}: {name} has values that are NaN or infinite; is the file damaged? copy it again")


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


def open_for_reading(path: Path) -> int:
    """A file's descriptor. Raises InputError."""
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({brief(error)})") from None


def read_exactly(descriptor: int, offset: int, nbytes: int, place: str) -> np.ndarray:
    """Reads `nbytes` at `offset` into fresh memory (uint8 [nbytes])."""
    buffer = np.empty(nbytes, np.uint8)
    read_into(descriptor, offset, buffer, place)
    return buffer


def read_into(descriptor: int, offset: int, buffer: np.ndarray, place: str) -> None:
    """Fills `buffer` (uint8, contiguous) with what is at `offset`.

    pread and not mmap: mapped pages count as resident memory until the kernel takes them back.
    """
    view = buffer.data
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(descriptor, [view[done:]], offset + done)  # at most 2 GiB a call
        except OSError as error:
            raise InputError(f"{place}: cannot be read ({brief(error)}); copy the file again") from None
        if count == 0:
            raise InputError(f"{place}: ends {len(buffer) - done} bytes early while being read; copy the file again")
        done += count


def readable(nbytes: int) -> str:
    """A number of bytes for people: "28.58 GB", "3.10 MB"."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"
