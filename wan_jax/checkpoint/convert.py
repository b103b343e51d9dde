"""Converts a checkpoint from any layout into ours, the diffusers or the official one: streaming and atomic."""

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from jax.typing import DTypeLike

from wan_jax.checkpoint.checkpoint import Checkpoint, ComponentInfo, describe, open_checkpoint
from wan_jax.checkpoint.components import Component, check_against_model, copy_into
from wan_jax.checkpoint.export import (
    check_diffusers_can_hold,
    check_official_can_hold,
    write_diffusers_component,
    write_diffusers_index,
    write_official_component,
)
from wan_jax.checkpoint.layouts import Naming, Row
from wan_jax.checkpoint.orbax import TOKENIZER, write_manifest, write_orbax
from wan_jax.checkpoint.sources import INCOMPLETE, OFFICIAL_IMAGE_ENCODER, OFFICIAL_TOKENIZER
from wan_jax.checkpoint.tensors import BFLOAT16, Progress, TensorInfo, readable
from wan_jax.errors import InputError
from wan_jax.lora.export import merge_loras
from wan_jax.lora.files import Lora, open_loras

Target = Literal["orbax", "diffusers", "official"]

NAMINGS: dict[Target, Naming] = {"orbax": "ours", "diffusers": "diffusers", "official": "official"}
TOKENIZER_SUFFIXES = (".json", ".model", ".txt", ".jinja")
SPARE_BYTES = 64 << 20  # for headers, metadata and the file system's own needs


@dataclass(frozen=True)
class ConversionSummary:
    """What a conversion wrote. str() is for people."""

    source: str
    destination: str
    layout: Target
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
    to: Target = "orbax",
    progress: Progress | None = None,
    *,
    loras: Sequence[Lora] = (),
) -> ConversionSummary:
    """Converts the checkpoint at `source` (any layout, or one that is open) into a new folder `destination`.

    `dtype` is that of the text encoder and the denoisers, rounded once; None keeps every tensor's stored dtype, and a
    round trip then gives back the same bits. The VAE and the image encoder always keep their own. Tensors are read,
    rearranged and written in groups of about a gigabyte, so that memory does not grow with the model. The folder
    appears complete or not at all; what a killed conversion left behind is removed by the next one to the same place.
    `progress(component, bytes done, bytes in all)` is called after every tensor. `loras` are merged into the experts:
    the sum in float32, rounded once.

    Raises InputError for a source that cannot be opened (see open_checkpoint), a destination that exists, too little
    disk, or a target layout that cannot hold this model.
    """
    start = time.perf_counter()
    if to not in NAMINGS:
        raise InputError(f"unknown target layout {to!r}; choose one of {', '.join(NAMINGS)}")
    wanted = None if dtype is None else np.dtype(dtype)
    if wanted not in (None, BFLOAT16, np.dtype(np.float32)):
        raise InputError(f"dtype {wanted} is no dtype for weights; choose bfloat16 or float32")
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    destination = Path(destination)
    merged = open_loras(loras, checkpoint.config)
    for expert in (expert for expert, active in merged.by_expert.items() if active):
        checkpoint.part(expert)  # raises for an expert that is not there
    keep = ("vae", "image_encoder")
    plans = [
        _Plan(merge_loras(part, merged.by_expert.get(name, ())), NAMINGS[to], None if name in keep else wanted)
        for name, part in checkpoint.parts.items()
    ]
    for plan in plans:
        check_against_model(plan.component.config)
    if to == "diffusers":
        check_diffusers_can_hold(checkpoint.config)
    if to == "official":
        check_official_can_hold(checkpoint.config, checkpoint.components)
    _check_destination(destination, sum(plan.nbytes for plan in plans))
    with _atomic_folder(destination) as folder:
        for plan in plans:
            write = {
                "orbax": lambda folder, name, config, *tensors: write_orbax(folder / name, *tensors),
                "diffusers": write_diffusers_component,
                "official": write_official_component,
            }[to]
            write(folder, plan.component.name, checkpoint.config, plan.tensors, partial(plan.read_many, progress))
        notes = _write_rest(folder, checkpoint, to, plans)
        (folder / INCOMPLETE).unlink()
        _verify(folder, checkpoint, plans)
    components = tuple(describe(plan.component, plan.tensors) for plan in plans)
    seconds = time.perf_counter() - start
    return ConversionSummary(
        str(checkpoint.path), str(destination), to, components, seconds, (*checkpoint.notes, *merged.notes, *notes)
    )


class _Plan:
    """One component's tensors as they are to be written."""

    def __init__(self, component: Component, naming: Naming, dtype: np.dtype | None):
        self.component = component
        self.naming = naming
        self.dtype = dtype
        self._rows: dict[str, Row] = {row.name(naming): row for row in component.rows}
        self.tensors = {
            name: TensorInfo(row.stored_shape(naming), component.info(row).dtype if dtype is None else dtype, "")
            for name, row in self._rows.items()
        }
        self._done = 0

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    def read_many(self, progress: Progress | None, names: Sequence[str]) -> Iterator[np.ndarray]:
        """The tensors under their new names, rearranged and contiguous."""
        rows = [self._rows[name] for name in names]
        read = self.component.read_ours if self.naming == "ours" else self.component.read_theirs
        for name, array in zip(names, read(rows, self.dtype), strict=True):
            if not array.flags.c_contiguous:
                rearranged = np.empty(array.shape, array.dtype)
                copy_into(rearranged, array)
                array = rearranged
            yield array
            self._done += self.tensors[name].nbytes
            if progress:
                progress(self.component.name, self._done, self.nbytes)


def _check_destination(destination: Path, nbytes: int) -> None:
    if destination.exists() or destination.is_symlink():
        raise InputError(f"{destination}: exists already; choose another name or remove it")
    parent = destination.parent
    if not parent.is_dir():
        raise InputError(f"{parent}: no such folder; create it first")
    free, needed = shutil.disk_usage(parent).free, nbytes + SPARE_BYTES
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
    folder = destination.with_name(f".{destination.name}.converting")
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


def _write_rest(folder: Path, checkpoint: Checkpoint, to: Target, plans: Sequence[_Plan]) -> tuple[str, ...]:
    """Tokenizer, configs and, last, the file that makes the folder loadable. Returns notes."""
    notes = []
    tokenizer = checkpoint.tokenizer_folder
    if tokenizer is None:
        notes.append(f"{checkpoint.path}: holds no tokenizer, so the copy has none")
    else:
        target = folder / (OFFICIAL_TOKENIZER if to == "official" else TOKENIZER)
        target.mkdir(parents=True)
        for file in sorted(tokenizer.iterdir()):
            if file.is_file() and file.suffix in TOKENIZER_SUFFIXES:
                shutil.copyfile(file, target / file.name)
    if to == "diffusers":
        write_diffusers_index(folder, checkpoint.config, checkpoint.components, tokenizer is not None)
    if to == "official" and "image_encoder" in checkpoint.components:
        notes.append(
            f"{OFFICIAL_IMAGE_ENCODER}: written without CLIP's text tower, which the official code asks for (and does "
            "not use); for that code, put the release's file in its place"
        )
    if to == "orbax":
        contents = {plan.component.name: describe(plan.component, plan.tensors).as_json() for plan in plans}
        write_manifest(folder, checkpoint.config, contents)
    return tuple(notes)


def _verify(folder: Path, checkpoint: Checkpoint, plans: Sequence[_Plan]) -> None:
    """Opens the result as a reader would. Raises RuntimeError where it differs from the plan (a bug)."""
    written = open_checkpoint(folder)
    for plan in plans:
        name = plan.component.name
        expected, actual = plan.component.config, written.part(name).config
        stored: Mapping[str, TensorInfo] = written.part(name).store.tensors
        wrong = [
            tensor
            for tensor, info in plan.tensors.items()
            if (stored[tensor].shape, stored[tensor].dtype) != (info.shape, info.dtype)
        ]
        if expected != actual or wrong:
            raise RuntimeError(f"{name} reads back differently: {wrong[:3] or (expected, actual)}")
    if set(written.components) != set(checkpoint.components):
        raise RuntimeError(f"wrote {written.components} of {checkpoint.components}")
