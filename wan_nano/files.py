"""Files that the stages of a run and later runs share: averaged weights by component, and the tokenizer.

Each is whole or absent, whatever other processes write into the same folder.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from wan_jax.errors import InputError
from wan_jax.runtime.files import written_whole

TOKENIZER = "tokenizer"  # a folder


def weights_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.npz"


def save_weights(folder: Path, name: str, parameters: Mapping[str, ArrayLike]) -> None:
    """Writes float32 arrays."""
    arrays: dict[str, Any] = {key: np.asarray(value, np.float32) for key, value in parameters.items()}
    with written_whole(weights_file(folder, name)) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def load_weights(folder: Path, name: str) -> dict[str, np.ndarray]:
    """Reads what `save_weights` wrote; raises InputError where there is nothing."""
    path = weights_file(folder, name)
    if not path.exists():
        raise InputError(f"{path} does not exist; train that stage first")
    with np.load(path) as file:
        return {key: file[key] for key in file.files}


def write_folder(place: Path, write: Callable[[Path], Any]) -> None:
    """Makes a folder by `write` unless it exists."""
    if place.exists():
        return
    temporary = place.with_name(f".{place.name}-{os.getpid()}")
    write(temporary)
    try:
        temporary.rename(place)
    except OSError:  # another process was faster, with the same files
        shutil.rmtree(temporary)


def copy_missing(source: Path, destination: Path) -> None:
    """Copies the weights and the tokenizer that the destination lacks: what is there already may be newer."""
    if (source / TOKENIZER).is_dir():
        write_folder(destination / TOKENIZER, lambda folder: shutil.copytree(source / TOKENIZER, folder))
    for path in sorted(source.glob("[!.]*.npz")):
        place = destination / path.name
        if not place.exists():
            with written_whole(place) as temporary:
                temporary.write_bytes(path.read_bytes())
