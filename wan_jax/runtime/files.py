"""Files that appear whole or not at all."""

import contextlib
import os
import pathlib
import uuid
from collections.abc import Iterator

import numpy as np


@contextlib.contextmanager
def written_whole(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a name beside `path` with the same ending; on success it becomes `path`, else it is removed."""
    temporary = path.with_name(f".{path.stem}-{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_array(path: str | os.PathLike, array: np.ndarray) -> pathlib.Path:
    """Writes one .npy file, complete or not at all."""
    path = pathlib.Path(path)
    with written_whole(path) as temporary, temporary.open("wb") as file:  # an open file keeps NumPy from renaming it
        np.save(file, array)
    return path
