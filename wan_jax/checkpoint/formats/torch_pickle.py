"""PyTorch `.pth` files without PyTorch: a restricted unpickler that describes tensors, and a writer.

`torch.save` writes a zip archive (since PyTorch 1.6): `archive/data.pkl` rebuilds tensors from storages, and
`archive/data/<key>` holds the bytes of each storage, uncompressed. A pickle can call any function, so ours resolves a
fixed list of names to inert stand-ins and refuses every other by name; bytes are read when a tensor is asked for.
"""

import os
import pickle
import pickletools
import struct
import weakref
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from wan_jax.checkpoint.formats.tensors import (
    MAX_RANK,
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
)
from wan_jax.errors import InputError
from wan_jax.runtime.files import written_whole

STORAGE_DTYPES = named_dtypes(
    "DoubleStorage=float64 FloatStorage=float32 HalfStorage=float16 BFloat16Storage=bfloat16 LongStorage=int64 "
    "IntStorage=int32 ShortStorage=int16 CharStorage=int8 ByteStorage=uint8 BoolStorage=bool"
)
STORAGE_NAMES = {dtype: name for name, dtype in STORAGE_DTYPES.items()}

MAX_PICKLE_BYTES = 4 << 20  # the pickle of a model is its names and shapes: well under a megabyte
ENCRYPTED = 1  # of a zip member's flags
_WRAPPERS = ("state_dict", "model")  # keys under which training code nests the weights


@dataclass(frozen=True)
class _Storage:
    dtype: np.dtype
    key: str
    size: int  # in elements


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int  # of the first element, in elements
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements

    @property
    def extent(self) -> int:
        """Elements of the storage from the first to the last that the tensor uses."""
        if prod(self.shape) == 0:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))


class _Refused(Exception):
    pass


def _rebuild_tensor(storage, offset, shape, strides, *_: object) -> _Tensor:
    """Stands in for torch._utils._rebuild_tensor_v2. Checked later, with the file's size in sight."""
    return _Tensor(storage, offset, shape, strides)


def _empty_dict() -> dict:
    """Stands in for OrderedDict, which state dicts make empty."""
    return {}


# Every function that a pickle may name, beside the storage types (which become their names: inert strings).
_ALLOWED: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    ("torch", "Size"): lambda sizes: tuple(sizes[: MAX_RANK + 1]),
    ("collections", "OrderedDict"): _empty_dict,
    **{("torch", name): name for name in STORAGE_DTYPES},
}
MAX_ARGUMENTS = 8  # of torch._utils._rebuild_tensor_v2
_LITERALS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE")
_CONSTANTS = {"NEWTRUE": True, "NEWFALSE": False, "NONE": None, "EMPTY_TUPLE": ()}


def _unpickle(pickled: bytes) -> Any:
    """What the pickle of a state dict describes, of protocol 2 or later.

    Python's own unpickler lets a few bytes take gigabytes (an index of its memo, a length) or hours (the hash of a
    nested tuple). This one knows the opcodes that state dicts need; time and memory are in proportion to the pickle.

    Raises _Refused for a call of anything but _ALLOWED, and any exception for a damaged pickle.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def pop(count: int | None = None) -> list[Any]:
        """The last `count` values; None: all after the last mark."""
        start = marks.pop() if count is None else len(stack) - count
        if start < (marks[-1] if marks else 0):
            raise ValueError("takes values that are not there")
        values = stack[start:]
        del stack[start:]
        return values

    argument: Any
    for opcode, argument, _ in pickletools.genops(pickled):
        name = opcode.name
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(pop(None if name == "TUPLE" else int(name[-1]))))
        elif name in ("SETITEM", "SETITEMS"):
            pairs = pop(2 if name == "SETITEM" else None)
            if not all(isinstance(key, str | int) for key in pairs[::2]):  # a nested tuple's hash may take for ever
                raise _Refused("a dictionary of the pickle has an unusual key")
            stack[-1] |= dict(zip(pairs[::2], pairs[1::2], strict=True))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            path = argument.split(" ") if name == "GLOBAL" else pop(2)
            called = ".".join(path)  # before the tuple is hashed: this needs texts
            if tuple(path) not in _ALLOWED:
                raise _Refused(f"the pickle wants to call {called}")
            stack.append(_ALLOWED[tuple(path)])
        elif name == "REDUCE":
            function, arguments = pop(2)
            if len(arguments) > MAX_ARGUMENTS:
                raise _Refused("the pickle gives a function too many arguments")
            stack.append(function(*arguments))
        elif name == "BUILD":  # attributes, such as the versions of a state dict's modules: of no meaning for weights
            pop(1)
            if not isinstance(stack[-1], dict):
                raise _Refused(f"the pickle changes a {type(stack[-1]).__name__} that it has made")
        elif name == "BINPERSID":
            kind, storage_type, key, _device, size = pop(1)[0]
            if (isinstance(kind, str) and kind) != "storage" or not isinstance(storage_type, str):
                raise _Refused("the pickle holds something else than a storage")
            stack.append(_Storage(STORAGE_DTYPES[storage_type], key, size))
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise _Refused(f"the pickle has an opcode {name}, which no state dict needs")
    return stack.pop()  # genops has seen STOP


class TorchPickleFile(TensorStore):
    """One `.pth` or `.pt` file with a flat state dict, or one nested under "state_dict" or "model".

    Opening reads the pickle and the zip directory only. Raises InputError for anything that is not plain tensors.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.place = str(path)
        self._descriptor = open_for_reading(path)
        weakref.finalize(self, os.close, self._descriptor)
        self._members, pickled = self._read_directory()
        self._tensors = self._describe(pickled)
        self.tensors = {
            name: TensorInfo(tensor.shape, tensor.storage.dtype, self.place) for name, tensor in self._tensors.items()
        }

    def read(self, name: str, dtype: np.dtype | None = None) -> np.ndarray:
        tensor = self._tensors[name]
        itemsize = tensor.storage.dtype.itemsize
        offset = self._members[tensor.storage.key][0] + tensor.offset * itemsize
        flat = read_exactly(self._descriptor, offset, tensor.extent * itemsize, self.place).view(tensor.storage.dtype)
        strides = tuple(stride * itemsize for stride in tensor.strides)
        array = np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)
        return cast(np.ascontiguousarray(array).reshape(tensor.shape), dtype)

    def _read_directory(self) -> tuple[dict[str, tuple[int, int]], bytes]:
        """Offset and size in bytes of every storage by key, and the pickle."""
        if os.pread(self._descriptor, 4, 0) != b"PK\x03\x04":
            raise InputError(
                f"{self.place}: not a zip archive of torch.save: damaged, or older than PyTorch 1.6; load and save it "
                "in PyTorch, or use a safetensors version"
            )
        members = {}
        try:
            with zipfile.ZipFile(self.path) as archive:
                entries = archive.infolist()
                pickles = [entry.filename for entry in entries if entry.filename.endswith("/data.pkl")]
                folder = pickles[0].removesuffix("data.pkl") if len(pickles) == 1 else ""
                for entry in entries:
                    if not folder or not entry.filename.startswith(folder):
                        continue
                    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & ENCRYPTED:
                        raise _Refused(f"{entry.filename} is compressed or encrypted; unpack and torch.save it again")
                    key = entry.filename.removeprefix(folder)
                    if key in members:
                        raise _Refused(f"{entry.filename} is twice in the archive; save it again")
                    members[key] = (self._data_offset(entry.header_offset), entry.file_size)
                if members.get("data.pkl", (0, MAX_PICKLE_BYTES + 1))[1] > MAX_PICKLE_BYTES:
                    raise _Refused("not an archive of torch.save: it has no usable data.pkl")
                pickled = archive.read(f"{folder}data.pkl")
            offset, nbytes = members.get("byteorder", (0, 0))
            if nbytes and os.pread(self._descriptor, min(nbytes, 6), offset) != b"little":
                raise _Refused("written on a big-endian machine; save it again on a usual one")
        except _Refused as refused:
            raise InputError(f"{self.place}: {refused}") from None
        except Exception as error:  # a damaged archive raises almost anything
            raise InputError(
                f"{self.place}: truncated or damaged zip archive ({brief(error)}); copy it again"
            ) from None
        return {
            key.removeprefix("data/"): member for key, member in members.items() if key.startswith("data/")
        }, pickled

    def _data_offset(self, header_offset: int) -> int:
        """Where a member's bytes begin: after its local header, whose lengths differ from the directory's."""
        header = os.pread(self._descriptor, 30, header_offset)
        name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
        return header_offset + 30 + name_bytes + extra_bytes

    def _describe(self, pickled: bytes) -> dict[str, _Tensor]:
        try:
            content = _unpickle(pickled)
        except _Refused as refused:
            raise InputError(f"{self.place}: refused: {refused}; weights need no code: use another file") from None
        except Exception as error:  # a damaged pickle raises almost anything
            raise InputError(f"{self.place}: its pickle is damaged ({brief(error)}); copy it again") from None
        if isinstance(content, dict):
            for key in _WRAPPERS:
                rest = [value for name, value in content.items() if name != key]
                if isinstance(content.get(key), dict) and all(isinstance(v, str | int | float | None) for v in rest):
                    content = content[key]
                    break
        if not isinstance(content, dict):
            raise InputError(f"{self.place}: holds a {type(content).__name__}, not a state dict of tensors")
        return {name: self._check(name, tensor) for name, tensor in content.items()}

    def _check(self, name: object, tensor: object) -> _Tensor:
        """Validates what the pickle says about one entry: everything that `read` relies on."""
        if not isinstance(name, str) or not isinstance(tensor, _Tensor):
            raise InputError(f"{self.place}: refused: entry {name} is no tensor; save only the state dict")
        storage, offset, shape, strides = tensor.storage, tensor.offset, tensor.shape, tensor.strides
        file_bytes = os.fstat(self._descriptor).st_size
        usual = isinstance(storage, _Storage) and isinstance(shape, tuple) and isinstance(strides, tuple)
        if usual:
            usual = are_sizes((storage.size, offset)) and are_sizes(shape) and are_sizes(strides)
            usual = usual and len(shape) == len(strides) and isinstance(storage.key, str)
        if not usual:
            raise InputError(f"{self.place}: refused: {name} has an unusual description; save it again")
        if offset + tensor.extent > storage.size:
            raise InputError(f"{self.place}: refused: {name} reaches beyond its storage; save it again")
        if storage.key not in self._members:
            raise InputError(f"{self.place}: the data of {name} is missing; copy it again")
        start, nbytes = self._members[storage.key]
        if nbytes < storage.size * storage.dtype.itemsize or start + nbytes > file_bytes:
            raise InputError(f"{self.place}: the data of {name} is truncated; copy it again")
        if prod(shape) * storage.dtype.itemsize > file_bytes:  # strides of 0 repeat a few bytes for ever
            raise InputError(f"{self.place}: refused: {name} is larger than the file; save it again")
        return tensor


_ALIGNMENT = 64  # PyTorch aligns storages to this, so that it can map them


def write_torch_pickle(path: Path, tensors: Mapping[str, TensorInfo], read_many: ReadMany) -> None:
    """Writes a state dict as `torch.save` does; `torch.load(path, weights_only=True)` reads it.

    Tensor by tensor, under a temporary name that is then changed.
    """
    with written_whole(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        archive.writestr(zipfile.ZipInfo("archive/data.pkl"), _pickle_state_dict(tensors))
        archive.writestr(zipfile.ZipInfo("archive/byteorder"), b"little")
        for key, (name, array) in enumerate(zip(tensors, read_many(list(tensors)), strict=True)):
            check_description(name, array, tensors[name])
            member = zipfile.ZipInfo(f"archive/data/{key}")
            # Room for the 64-bit sizes is always kept, so that the padding is known before.
            header_end = archive.fp.tell() + 30 + len(member.filename) + 20 + 4  # type: ignore[union-attr]
            padding = -header_end % _ALIGNMENT
            member.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
            with archive.open(member, "w", force_zip64=True) as file:
                file.write(raw_bytes(array))
        archive.writestr(zipfile.ZipInfo("archive/version"), b"3\n")


def _pickle_state_dict(tensors: Mapping[str, TensorInfo]) -> bytes:
    """The pickle of an OrderedDict of tensors, opcode by opcode: naming PyTorch's functions needs no PyTorch."""
    empty_ordered_dict = _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    parts = [pickle.PROTO + b"\x02", empty_ordered_dict, pickle.MARK]
    for key, (name, info) in enumerate(tensors.items()):
        strides = [prod(info.shape[axis + 1 :]) for axis in range(len(info.shape))]
        parts += [
            _string(name),
            _global("torch._utils", "_rebuild_tensor_v2"),
            pickle.MARK,
            # The storage: ("storage", type, key, device, number of elements).
            pickle.MARK,
            _string("storage"),
            _global("torch", STORAGE_NAMES[info.dtype]),
            _string(str(key)),
            _string("cpu"),
            _integer(info.size),
            pickle.TUPLE + pickle.BINPERSID,
            _integer(0),  # offset
            _integers(info.shape),
            _integers(strides),
            pickle.NEWFALSE,  # requires_grad
            empty_ordered_dict,  # backward hooks
            pickle.TUPLE + pickle.REDUCE,
        ]
    return b"".join([*parts, pickle.SETITEMS, pickle.STOP])


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _string(text: str) -> bytes:
    encoded = text.encode()
    return pickle.BINUNICODE + len(encoded).to_bytes(4, "little") + encoded


def _integer(number: int) -> bytes:
    encoded = number.to_bytes(8, "little", signed=True)
    return pickle.LONG1 + len(encoded).to_bytes(1, "little") + encoded


def _integers(numbers) -> bytes:
    return pickle.MARK + b"".join(map(_integer, numbers)) + pickle.TUPLE
