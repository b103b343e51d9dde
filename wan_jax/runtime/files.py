"""Files that appear whole or not at all; whether they can be written is known before any work.

A file is written beside its place under a hidden name, and renamed when it is complete. Its writer holds a lock: what
is not locked was left by a run that was killed, and `check_writable` removes it.
"""

import contextlib
import fcntl
import functools
import os
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Iterator

import numpy as np

from wan_jax.errors import InputError, OutputError
from wan_jax.fields import path_of

PREFIX = ".wan-jax-"


@contextlib.contextmanager
def written_whole(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a name beside `path` with the same ending; on success it becomes `path`, else it is removed.

    Raises:
        OutputError: for any OSError.
    """
    with naming_file(path), hidden(path) as temporary:
        yield temporary
        temporary.replace(path)


@contextlib.contextmanager
def naming_file(path: pathlib.Path) -> Iterator[None]:
    """An OSError becomes an OutputError that says what could not be written."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{path} could not be written ({error.strerror or error})") from error


@contextlib.contextmanager
def hidden(path: pathlib.Path, *, is_folder: bool = False) -> Iterator[pathlib.Path]:
    """Makes an empty file, or a folder, beside `path`; what is still there at the end is removed."""
    temporary = path.with_name(f"{PREFIX}{uuid.uuid4().hex[:8]}{path.suffix}")
    temporary.mkdir() if is_folder else temporary.touch(exist_ok=False)
    try:
        with _locked(temporary, wait=True):
            yield temporary
    finally:
        _remove(temporary)


def check_writable(path: str | os.PathLike, *, name: str = "output", endings: tuple[str, ...] = ()) -> pathlib.Path:
    """Raises InputError unless a file can be written to `path`.

    Args:
        path: of the file, which may be there.
        name: what messages call it.
        endings: those that it may have; none for any.
    """
    path = path_of(name, path)
    if endings and path.suffix.lower() not in endings:
        known = f"must end in {endings[0]}" if len(endings) == 1 else f"use one of {', '.join(endings)}"
        raise InputError(f"{name} {path}: unknown ending {path.suffix!r}; {known}")
    try:
        if not path.parent.is_dir():
            raise InputError(f"{name} folder {path.parent} does not exist; make it first")
        if path.is_dir():
            raise InputError(f"{name} {path} is a folder; give the name of a file")
        _clean(path.parent.absolute())
        path.is_symlink()  # whether the name is too long
        with hidden(path):
            pass
    except OSError as error:
        raise InputError(f"{name} {path} cannot be written ({error.strerror}); give another name") from None
    return path


def save_array(path: str | os.PathLike, array: np.ndarray, description: str = "") -> pathlib.Path:
    """Writes one .npy file, complete or not at all; a description follows the array, where NumPy does not look."""
    path = pathlib.Path(path)
    with written_whole(path) as temporary, temporary.open("wb") as file:  # an open file keeps NumPy from renaming it
        np.save(file, array)
        file.write(description.encode())
    return path


def keep_array(beside: pathlib.Path, array: np.ndarray, description: str = "") -> pathlib.Path:
    """Writes one .npy file under a name that no other has: beside a file, or where that fails, wherever it can be."""
    name = f"{beside.stem[:20]}-{uuid.uuid4().hex[:8]}.latents.npy"
    *folders, last = dict.fromkeys([beside.parent, pathlib.Path(tempfile.gettempdir()), pathlib.Path.home()])
    for folder in folders:
        with contextlib.suppress(OutputError):
            return save_array(folder / name, array, description)
    return save_array(last / name, array, description)


@functools.cache
def _clean(folder: pathlib.Path) -> None:
    """Removes what killed runs left in a folder, once."""
    for left in folder.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError), _locked(left):
            _remove(left)


@contextlib.contextmanager
def _locked(path: pathlib.Path, *, wait: bool = False) -> Iterator[None]:
    """Holds a file's or folder's lock; raises OSError where another has it and `wait` is false."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        with contextlib.suppress(OSError) if wait else contextlib.nullcontext():  # file systems without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


def _remove(path: pathlib.Path) -> None:
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
