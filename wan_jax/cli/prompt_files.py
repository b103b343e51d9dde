"""Files of prompts: which videos a run makes.

    prompts.txt     one prompt a line
    prompts.jsonl   one object a line: {"prompt": "a red circle", "seed": 3, "size": "832x480", "guidance": [1, 3.5]}
    prompts.csv     a header of keys, then a row for each video; an empty cell says nothing

The keys are the options that a video can have for itself (`PER_VIDEO`); what a line leaves open is as the run's own
options say. Videos without an "output" are numbered by their place in the file: out-1.mp4, out-2.mp4, ...
"""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from wan_jax.cli.options import OPTIONS, PER_VIDEO, Options
from wan_jax.errors import InputError, unknown_name
from wan_jax.runtime.rows import READERS, Row, read_rows, read_text

FILES = ("output", "save_latents", "save_frames")  # what a video writes


@dataclass(frozen=True)
class Item:
    """One video of a run."""

    options: Options  # its own: a prompt, and where its files go
    where: str = ""  # "prompts.jsonl line 3"; nothing where the prompt is the command's

    @contextlib.contextmanager
    def naming_errors(self) -> Iterator[None]:
        """Says in which line the cause of an InputError is."""
        try:
            yield
        except InputError as error:
            if not self.where:
                raise
            raise InputError(f"{self.where}: {error}") from None


def read_items(options: Options) -> list[Item]:
    """The run's one video, or those of its prompts file.

    Raises:
        InputError: a file that cannot be read, or the line and key of a value that cannot be used.
    """
    if (options.prompt is None) == (options.prompts is None):
        raise InputError("give a prompt, or a file of them with --prompts (one of the two)")
    if options.prompts is None:
        if not options.prompt.strip():
            raise InputError("the prompt is empty; write what the video shows")
        return _distinct([Item(options)])
    path = pathlib.Path(options.prompts)
    ending = path.suffix.lower() or ".txt"
    if ending != ".txt" and ending not in READERS:
        endings = ", ".join((".txt", *READERS))
        raise InputError(f"prompts file {path}: unknown ending {path.suffix!r}; use one of {endings}")
    if not path.is_file():
        raise InputError(f"prompts file {path} does not exist; give a text file with one prompt a line")
    items = []
    rows = _read_lines(path) if ending == ".txt" else read_rows(path, '{"prompt": ...}', _check_keys)
    for number, (where, row) in enumerate(rows, start=1):
        values = _values(where, row)
        numbered = {name: _numbered(value, number) for name in FILES if (value := vars(options)[name])}
        own = dataclasses.replace(options, **{"prompts": None, **numbered, **values})
        items.append(Item(own, where))
        if own.prompt is None or not own.prompt.strip():
            raise InputError(f"{items[-1].where}: no prompt; write what the video shows")
    if not items:
        raise InputError(f"prompts file {path} is empty; write one prompt a line")
    return _distinct(items)


def _distinct(items: list[Item]) -> list[Item]:
    """As many videos of each as there are to be; raises InputError where two write one file."""
    items = [copy for item in items for copy in _copies(item)]
    owners: dict[str, str] = {}
    for item in items:
        for name in FILES:
            if (file := vars(item.options)[name]) is None:
                continue
            owner = owners.setdefault(os.path.realpath(file), f"the {name} of {item.where or 'the video'}")
            if owner != f"the {name} of {item.where or 'the video'}":
                raise InputError(f"{item.where or 'the video'}: {name} {file} is also {owner}; give each its own")
    return items


def _copies(item: Item) -> Iterator[Item]:
    options = item.options
    if options.videos < 1:
        raise InputError(f"videos {options.videos}: give at least 1")
    for index in range(options.videos):
        if options.videos == 1:
            yield item
            return
        own: dict[str, Any] = {name: _numbered(value, index + 1) for name in FILES if (value := vars(options)[name])}
        where = f"{item.where} " if item.where else ""
        yield Item(dataclasses.replace(options, **own, seed=options.seed + index), f"{where}video {index + 1}")


def _numbered(name: str, number: int) -> str:
    path = pathlib.Path(name)
    return str(path.with_name(f"{path.stem}-{number}{path.suffix}"))


def _read_lines(path: pathlib.Path) -> Iterator[Row]:
    for line, prompt in enumerate(read_text(path).split("\n"), start=1):
        if prompt.strip():
            yield f"{path} line {line}", {"prompt": prompt}


def _check_keys(where: str, names: Sequence[str]) -> None:
    for name in names:
        if name not in PER_VIDEO:
            error = unknown_name("key", name, PER_VIDEO)
            if name in OPTIONS:
                error = InputError(f"key {name!r} is one of the whole run; give it as --{name.replace('_', '-')}")
            raise InputError(f"{where}: {error}")


def _values(where: str, row: dict[str, Any]) -> dict[str, Any]:
    """The options of one line; those that say nothing, as an empty cell, are left out."""
    values = {}
    for name, value in row.items():
        value = value.strip() if isinstance(value, str) else value
        if value is not None and (value != "" or name == "prompt"):
            try:
                values[name] = OPTIONS[name].metadata["convert"](name, value)
            except InputError as error:
                raise InputError(f"{where}: {error}") from None
    return values
