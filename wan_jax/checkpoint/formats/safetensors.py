"""Safetensors files: a reader that keeps resident memory at one tensor, and a writer that streams.

The format (huggingface/safetensors): 8 bytes little-endian header length, a JSON header with the dtype, shape and
byte range of each tensor, then the data. Large models are split into several files, listed by an index.json.
"""

import json
import os
import re
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from wan_jax.checkpoint.formats.tensors import (
    Box,
    ReadMany,
    TensorInfo,
    TensorStore,
    are_sizes,
    brief,
    cast,
    check_description,
    named_dtypes,
    open_for_reading,
    raw_bytes,
    read_exactly,
    read_into,
    split_by_bytes,
    strict_json,
    visible_files,
)
from wan_jax.errors import InputError
from wan_jax.runtime.files import written_whole

DTYPES = named_dtypes(
    "F64=float64 F32=float32 F16=float16 BF16=bfloat16 F8_E4M3=float8_e4m3fn F8_E5M2=float8_e5m2 "
    "I64=int64 I32=int32 I16=int16 I8=int8 U64=uint64 U32=uint32 U16=uint16 U8=uint8 BOOL=bool"
)
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
SHARD_BYTES = 5_000_000_000  # what diffusers and transformers write by default

_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")


class SafetensorsFile(TensorStore):
    """One file. Opening reads and checks the header; `read` reads one tensor. `metadata` holds the header's own texts.

    Raises InputError for a file that is truncated or whose header is not valid.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.place = str(path)
        self._descriptor = open_for_reading(path)
        weakref.finalize(self, os.close, self._descriptor)
        self.tensors, self._offsets = self._read_header()

    def read(self, name: str, dtype: np.dtype | None = None) -> np.ndarray:
        info = self.tensors[name]
        data = read_exactly(self._descriptor, self._offsets[name], info.nbytes, self.place)
        return cast(data.view(info.dtype).reshape(info.shape), dtype)

    def read_box(self, name: str, box: Box, dtype: np.dtype | None = None) -> np.ndarray:
        """Reads the rows of the box along the first axis, which are contiguous."""
        info = self.tensors[name]
        rows, *rest = box
        row_bytes = info.nbytes // info.shape[0]
        start = self._offsets[name] + rows.start * row_bytes
        data = read_exactly(self._descriptor, start, (rows.stop - rows.start) * row_bytes, self.place)
        return cast(data.view(info.dtype).reshape(-1, *info.shape[1:])[:, *rest], dtype)

    def read_into(self, name: str, target: np.ndarray) -> None:
        """Reads one tensor into a contiguous array of its dtype and as many elements, without a copy."""
        read_into(self._descriptor, self._offsets[name], target.reshape(-1).view(np.uint8), self.place)

    def _read_header(self) -> tuple[dict[str, TensorInfo], dict[str, int]]:
        file_bytes = os.fstat(self._descriptor).st_size
        if file_bytes < 8:
            raise InputError(f"{self.place}: has {file_bytes} bytes, too few for a safetensors file; copy it again")
        header_bytes = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise InputError(f"{self.place}: not a safetensors file (its header would have {header_bytes} bytes)")
        if 8 + header_bytes > file_bytes:
            raise InputError(
                f"{self.place}: truncated: its header alone needs {8 + header_bytes} bytes, the file has {file_bytes}; "
                "copy it again"
            )
        try:
            header = strict_json(read_exactly(self._descriptor, 8, header_bytes, self.place).tobytes())
            self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
            entries: dict[str, tuple[str, tuple[int, ...], int, int]] = {
                name: (entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"]) for name, entry in header.items()
            }
            for dtype, shape, *offsets in entries.values():
                if not (isinstance(dtype, str) and are_sizes(shape) and are_sizes(offsets) and len(offsets) == 2):
                    raise ValueError(f"{dtype!r}, {shape!r}, {offsets!r} describe no tensor")
            if not all(isinstance(value, str) for value in dict(self.metadata).values()):
                raise ValueError("its metadata are not texts")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f"{self.place}: its safetensors header is damaged ({brief(error)}); copy it again"
            ) from None

        tensors: dict[str, TensorInfo] = {}
        positions: dict[str, int] = {}
        expected = 0
        for name, (dtype, shape, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
            if dtype not in DTYPES:
                raise InputError(f"{self.place}: {name} has unexpected dtype {dtype}; supported: {', '.join(DTYPES)}")
            info = TensorInfo(shape, DTYPES[dtype], self.place)
            if begin != expected or end - begin != info.nbytes:
                raise InputError(
                    f"{self.place}: its safetensors header is damaged ({name}: shape {list(shape)} of {dtype} in bytes "
                    f"{begin} to {end}); copy it again"
                )
            expected = end
            tensors[name], positions[name] = info, 8 + header_bytes + begin
        needed = 8 + header_bytes + expected
        if needed != file_bytes:
            problem = "truncated" if file_bytes < needed else "too long"
            raise InputError(
                f"{self.place}: {problem}: its header says {needed} bytes, the file has {file_bytes}; copy it again"
            )
        return tensors, positions


class SafetensorsFiles(TensorStore):
    """Several files that together hold one model. Raises InputError for a tensor in two of them."""

    def __init__(self, paths: Sequence[Path], place: str):
        self.place = place
        tensors: dict[str, TensorInfo] = {}
        self._files: dict[str, SafetensorsFile] = {}
        for path in paths:
            file = SafetensorsFile(path)
            twice = sorted(file.tensors.keys() & tensors.keys())
            if twice:
                raise InputError(
                    f"{twice[0]} is twice in {place}: in {Path(tensors[twice[0]].file).name} and in {path.name}"
                    f"{f' (and {len(twice) - 1} more tensors)' if len(twice) > 1 else ''}; remove one of the files"
                )
            tensors |= file.tensors
            self._files |= dict.fromkeys(file.tensors, file)
        self.tensors = tensors

    def read(self, name: str, dtype: np.dtype | None = None) -> np.ndarray:
        return self._files[name].read(name, dtype)

    def read_box(self, name: str, box: Box, dtype: np.dtype | None = None) -> np.ndarray:
        return self._files[name].read_box(name, box, dtype)


def open_safetensors_folder(
    folder: Path, stems: Sequence[str] = ("diffusion_pytorch_model", "model")
) -> SafetensorsFiles:
    """Opens the model in a folder: one file, shards with an index.json, or numbered shards without one.

    Where a folder holds several variants, the plain names of `stems` win. Raises InputError for a missing shard.
    """
    for stem in stems:
        if (index := folder / f"{stem}.safetensors.index.json").is_file():
            return _open_indexed(index)
        if (single := folder / f"{stem}.safetensors").is_file():
            return SafetensorsFiles([single], str(folder))
    if indices := visible_files(folder, "*.safetensors.index.json"):
        return _open_indexed(indices[0])
    paths = visible_files(folder, "*.safetensors")
    if not paths:
        raise InputError(f"{folder}: holds no .safetensors file; is the download complete?")
    check_shards_complete(paths)
    return SafetensorsFiles(paths, str(folder))


def check_shards_complete(paths: Sequence[Path]) -> None:
    """Raises InputError naming the missing ones where files are numbered like `model-00001-of-00003.safetensors`."""
    for path in paths:
        if match := _NUMBERED.fullmatch(path.name):
            stem, count = match["stem"], match["count"]
            wanted = [f"{stem}-{number:05d}-of-{count}.safetensors" for number in range(1, int(count) + 1)]
            _check_present(path.parent, wanted)


def _check_present(folder: Path, names: Sequence[str]) -> None:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"{folder}: shard {missing[0]} is missing"
            f"{f' (and {len(missing) - 1} more)' if len(missing) > 1 else ''}; download it again"
        )


def _open_indexed(index: Path) -> SafetensorsFiles:
    try:
        names = sorted(set(strict_json(index.read_bytes())["weight_map"].values()))
        bad = [name for name in names if Path(name).name != name]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{index}: not a valid index of shards ({brief(error)}); download it again") from None
    if bad:
        raise InputError(f"{index}: names the file {bad[0]!r} outside its folder; download it again")
    _check_present(index.parent, names)
    return SafetensorsFiles([index.parent / name for name in names], str(index.parent))


def write_safetensors(
    folder: Path,
    stem: str,
    tensors: Mapping[str, TensorInfo],
    read_many: ReadMany,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a model in the HuggingFace style: `stem.safetensors`, or numbered shards with an index.json."""
    shards = split_by_bytes(tensors, shard_bytes)
    if len(shards) == 1:
        write_safetensors_file(folder / f"{stem}.safetensors", shards[0], read_many)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors_file(folder / name, shard, read_many)
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": sum(info.nbytes for info in tensors.values())}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def write_safetensors_file(
    path: Path, tensors: Mapping[str, TensorInfo], read_many: ReadMany, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes one file under a temporary name, header first, then tensor by tensor, and renames it."""
    # The widest dtypes first: readers view the data in place, which needs aligned offsets.
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}  # transformers wants a format
    offset = 0
    for name, info in ordered.items():
        header[name] = {
            "dtype": DTYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.nbytes],
        }
        offset += info.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with written_whole(path) as partial, open(partial, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, array in zip(ordered, read_many(list(ordered)), strict=True):
            check_description(name, array, ordered[name])
            file.write(raw_bytes(array))
