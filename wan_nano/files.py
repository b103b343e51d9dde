"""The files of a training run: arrays in small pieces, logs. Whole or absent, whoever writes beside us."""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from wan_jax.errors import InputError

SHARD_BYTES = 15 * 2**20
TOKENIZER = "tokenizer"  # a folder


class Log:
    """Lines for people on standard error, the same as JSON in log-STAGE.jsonl: one process writes each."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._start = time.perf_counter()

    def __call__(self, stage: str, **figures: Any) -> None:
        figures = {name: round(x, 5) if isinstance(x, float) else x for name, x in figures.items()}
        line = {"stage": stage, "clock": round(time.perf_counter() - self._start, 1), **figures}
        with (self._folder / f"log-{stage}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        print("  ".join(f"{name} {value}" for name, value in line.items()), file=sys.stderr, flush=True)


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """An .npz that is there whole or not at all."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.npz")
    np.savez(temporary, **arrays)
    temporary.replace(path)


def write_shards(folder: Path, name: str, parameters: Mapping[str, ArrayLike]) -> None:
    """Float32 arrays in name-0.npz, name-1.npz, ... of at most 15 MiB each."""
    shards: list[dict[str, Any]] = [{}]
    size = 0
    for key, value in sorted(parameters.items()):
        array = np.asarray(value, np.float32)
        if shards[-1] and size + array.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][key] = array
        size += array.nbytes
    for index, shard in enumerate(shards):
        write_arrays(folder / f"{name}-{index}.npz", shard)


def find_shards(folder: Path, name: str) -> list[Path]:
    return sorted(folder.glob(f"{name}-*.npz"))


def read_shards(folder: Path, name: str) -> dict[str, np.ndarray]:
    """Raises InputError where there are none."""
    paths = find_shards(folder, name)
    if not paths:
        raise InputError(f"{folder} has no {name}-0.npz; train that stage first")
    arrays: dict[str, np.ndarray] = {}
    for path in paths:
        with np.load(path) as file:
            arrays |= {key: file[key] for key in file.files}
    return arrays


def write_folder(place: Path, write: Callable[[Path], Any]) -> None:
    """A folder that is there whole or not at all, made by `write` unless it exists."""
    if place.exists():
        return
    temporary = place.with_name(f".{place.name}-{os.getpid()}")
    write(temporary)
    try:
        temporary.rename(place)
    except OSError:  # another process was faster, with the same files
        shutil.rmtree(temporary)


def copy_missing(source: Path, destination: Path) -> None:
    """Copies the shards and the tokenizer that the destination lacks: what is there already may be newer."""
    if (source / TOKENIZER).is_dir():
        write_folder(destination / TOKENIZER, lambda folder: shutil.copytree(source / TOKENIZER, folder))
    for path in sorted(source.glob("[!.]*-*.npz")):
        place = destination / path.name
        if not place.exists():
            temporary = place.with_name(f".{place.stem}.{os.getpid()}.npz")
            temporary.write_bytes(path.read_bytes())
            temporary.replace(place)
