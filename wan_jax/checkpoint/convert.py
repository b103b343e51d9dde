"""Converts a checkpoint from any layout into one that can be written: streaming and atomic."""

import contextlib
import fcntl
import os
import shutil
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from jax.typing import DTypeLike

from wan_jax.checkpoint.api import Checkpoint, ComponentInfo, describe, open_checkpoint
from wan_jax.checkpoint.components import Component, check_against_model
from wan_jax.checkpoint.formats.tensors import BFLOAT16, Progress, TensorInfo, copy_into, readable, visible_files
from wan_jax.checkpoint.layouts import INCOMPLETE, WRITABLE, Layout
from wan_jax.checkpoint.layouts.base import differing_fields
from wan_jax.checkpoint.load import load_tokenizer
from wan_jax.checkpoint.tables.mapping import Naming, ParamMapping
from wan_jax.config import WanConfig
from wan_jax.errors import InputError
from wan_jax.fields import path_of
from wan_jax.runtime.files import check_writable, naming_file

KEEP_DTYPE = ("vae", "image_encoder")  # whose dtype a conversion never changes
TOKENIZER_SUFFIXES = (".json", ".model", ".txt", ".jinja")
SPARE_BYTES = 64 << 20  # for headers, metadata and the file system's own needs


@dataclass(frozen=True)
class ConversionSummary:
    """What a conversion wrote. str() is for people."""

    source: str
    destination: str
    layout: str
    components: tuple[ComponentInfo, ...]
    seconds: float
    notes: tuple[str, ...]

    @property
    def tensors(self) -> int:
        return sum(component.tensors for component in self.components)

    @property
    def nbytes(self) -> int:
        return sum(component.nbytes for component in self.components)

    def __str__(self) -> str:
        return "\n".join(
            [
                *(f"note: {note}" for note in self.notes),
                *map(str, self.components),
                f"wrote {self.destination} ({self.layout}): {self.tensors:,} tensors, {readable(self.nbytes)} "
                f"in {self.seconds:.1f} s",
            ]
        )


def convert(
    source: str | Path | Sequence[str | Path] | Checkpoint,
    destination: str | Path,
    dtype: DTypeLike | None = None,
    to: str = "orbax",
    progress: Progress | None = None,
) -> ConversionSummary:
    """Converts a checkpoint of any layout into a new folder.

    Tensors are read, rearranged and written in groups of about a gigabyte, so that memory does not grow with the model.
    The folder appears complete or not at all; what a killed conversion left behind is removed by the next one to the
    same place.

    Args:
        source: what open_checkpoint takes, or a checkpoint that is open.
        destination: the folder to make.
        dtype: of the text encoder and the denoisers, rounded once; None keeps every tensor's stored dtype, and a round
            trip then gives back the same bits. The VAE and the image encoder always keep their own.
        to: the layout: "orbax" (ours), "diffusers" or "official".
        progress: called as progress(component, bytes done, bytes in all) after every tensor.

    Raises:
        InputError: a source that cannot be opened, a destination that exists, too little disk, or a layout that cannot
            hold this model.
    """
    start = time.perf_counter()
    if to not in WRITABLE:
        raise InputError(f"unknown target layout {to!r}; choose one of {', '.join(WRITABLE)}")
    layout = WRITABLE[to]
    try:
        wanted = None if dtype is None else np.dtype(dtype)
    except TypeError:
        wanted = np.dtype(object)
    if wanted not in (None, BFLOAT16, np.dtype(np.float32)):
        raise InputError(f"dtype {dtype} is no dtype for weights; choose bfloat16 or float32")
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    destination = path_of("destination", destination)
    plans = [
        _Plan(part, layout.naming, None if name in KEEP_DTYPE else wanted) for name, part in checkpoint.parts.items()
    ]
    for plan in plans:
        check_against_model(plan.component.config)
    layout.check_can_hold(checkpoint.config, checkpoint.components)
    notes = _check_tokenizer(checkpoint)
    _check_destination(destination, sum(plan.nbytes for plan in plans))
    components = tuple(describe(plan.component, plan.tensors) for plan in plans)
    contents = {component.name: component.as_json() for component in components}
    with naming_file(destination), _atomic_folder(destination) as folder:
        for plan in plans:
            name, read_many = plan.component.name, partial(plan.read_many, progress)
            contents[name] |= layout.write_component(folder, name, checkpoint.config, plan.tensors, read_many) or {}
        _copy_tokenizer(folder, checkpoint, layout)
        notes += layout.finish(folder, checkpoint.config, contents, checkpoint.tokenizer_folder is not None)
        (folder / INCOMPLETE).unlink()
        written = _verify(folder, checkpoint, plans)
        if lost := differing_fields(checkpoint.config.sampling, written.sampling):
            notes.append(f"the {to} layout has no place for the checkpoint's {', '.join(lost)}: set them at every run")
    seconds = time.perf_counter() - start
    return ConversionSummary(
        str(checkpoint.path), str(destination), to, components, seconds, (*checkpoint.notes, *notes)
    )


def verify(checkpoint: Checkpoint, progress: Progress | None = None) -> str:
    """Reads every tensor and the tokenizer. Returns what was found to be right, for people.

    Raises InputError for the first value that is not finite, checksum that differs, or tokenizer that does not fit.
    """
    notes = _check_tokenizer(checkpoint)
    tensors = checksums = 0
    for name, part in checkpoint.parts.items():
        done, table = 0, part.table
        for mapping, _ in zip(table, part.read_parameters(table), strict=True):
            done += part.info(mapping).nbytes
            if progress:
                progress(name, done, part.nbytes)
        tensors, checksums = tensors + len(table), checksums + len(part.store.checksums)
    tokenizer = "; ".join(notes) or "the tokenizer fits"
    agree = f"{checksums:,} agree with their checksums" if checksums else "there are no checksums"
    return f"verified: {tensors:,} tensors have finite values; {agree}; {tokenizer}"


class _Plan:
    """One component's tensors as they are to be written."""

    def __init__(self, component: Component, naming: Naming, dtype: np.dtype | None):
        self.component = component
        self.naming = naming
        self.dtype = dtype
        self._mappings: dict[str, ParamMapping] = {mapping.stored_name(naming): mapping for mapping in component.table}
        self.tensors = {
            name: TensorInfo(
                mapping.stored_shape(naming), component.info(mapping).dtype if dtype is None else dtype, ""
            )
            for name, mapping in self._mappings.items()
        }
        self._done = 0

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    def read_many(self, progress: Progress | None, names: Sequence[str]) -> Iterator[np.ndarray]:
        """The tensors under their new names, rearranged and contiguous."""
        mappings = [self._mappings[name] for name in names]
        read = self.component.read_parameters if self.naming == "wan_jax" else self.component.read_torch
        for name, array in zip(names, read(mappings, self.dtype), strict=True):
            if not array.flags.c_contiguous:
                rearranged = np.empty(array.shape, array.dtype)
                copy_into(rearranged, array)
                array = rearranged
            yield array
            self._done += self.tensors[name].nbytes
            if progress:
                progress(self.component.name, self._done, self.nbytes)


def _check_destination(destination: Path, nbytes: int) -> None:
    if os.path.lexists(destination):
        raise InputError(f"{destination}: exists already; choose another name or remove it")
    check_writable(destination, name="destination")
    free, needed = shutil.disk_usage(destination.parent).free, nbytes + SPARE_BYTES
    if free < needed:
        raise InputError(
            f"{destination}: too little disk: the conversion needs {needed:,} bytes and {free:,} are free; make room "
            "or choose another disk"
        )


@contextlib.contextmanager
def _atomic_folder(destination: Path) -> Iterator[Path]:
    """A hidden folder beside the destination that takes its name when the block ends well, and vanishes otherwise.

    A lock tells a running conversion from what a killed one left behind. Until the block removes the file INCOMPLETE,
    nothing opens the folder.
    """
    name = destination.name  # of at most 255 bytes, as the hidden one must be
    name = name if len(os.fsencode(name)) < 240 else f"{name[:50]}-{zlib.crc32(name.encode()):08x}"
    folder = destination.with_name(f".{name}.converting")
    folder.mkdir(exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{destination}: another conversion is writing it; wait or choose another name") from None
        _empty(folder)
        (folder / INCOMPLETE).touch()
        try:
            yield folder
            os.rename(folder, destination)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _empty(folder: Path) -> None:
    for leftover in folder.iterdir():
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def _check_tokenizer(checkpoint: Checkpoint) -> list[str]:
    """Raises InputError for one that is damaged or of another model. Returns notes."""
    if checkpoint.tokenizer_folder is None:
        return [f"{checkpoint.path}: holds no tokenizer, so the copy has none"]
    try:
        load_tokenizer(checkpoint)
    except InputError as error:
        if not isinstance(error.__cause__, ModuleNotFoundError):
            raise
        return [f"copied unread: {error}"]
    return []


def _copy_tokenizer(folder: Path, checkpoint: Checkpoint, layout: Layout) -> None:
    if checkpoint.tokenizer_folder is None:
        return
    target = folder / layout.tokenizer
    target.mkdir(parents=True)
    for file in visible_files(checkpoint.tokenizer_folder, "*"):
        if file.suffix in TOKENIZER_SUFFIXES:
            shutil.copyfile(file, target / file.name)


def _verify(folder: Path, checkpoint: Checkpoint, plans: Sequence[_Plan]) -> WanConfig:
    """Opens the result as a reader would. Returns its config; raises RuntimeError where it differs from the plan."""
    written = open_checkpoint(folder)
    for plan in plans:
        name = plan.component.name
        expected, actual = plan.component.config, written.part(name).config
        stored = written.part(name).store.tensors
        wrong = [
            tensor
            for tensor, info in plan.tensors.items()
            if (stored[tensor].shape, stored[tensor].dtype) != (info.shape, info.dtype)
        ]
        if expected != actual or wrong:
            raise RuntimeError(f"{name} reads back differently: {wrong[:3] or (expected, actual)}")
    if set(written.components) != set(checkpoint.components):
        raise RuntimeError(f"wrote {written.components} of {checkpoint.components}")
    return written.config
