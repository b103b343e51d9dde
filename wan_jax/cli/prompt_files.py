"""Files of prompts: which videos a run makes.

    prompts.txt     one prompt a line
    prompts.jsonl   one object a line: {"prompt": "a red circle", "seed": 3, "size": "832x480", "guidance": [1, 3.5]}
    prompts.csv     a header of keys, then a row for each video; an empty cell says nothing

The keys are the options that a video can have for itself (`PER_VIDEO`); what a line leaves open is as the run's own
options say. Videos without an "output" are numbered by their place in the file: out-1.mp4, out-2.mp4, ...
"""

import contextlib
import csv
import dataclasses
import io
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from wan_jax.cli.options import OPTIONS, PER_VIDEO, Options
from wan_jax.errors import InputError, unknown_name

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
        items = [Item(options)]
        if not options.prompt.strip():
            raise InputError("the prompt is empty; write what the video shows")
        _check_distinct(items)
        return items
    path = pathlib.Path(options.prompts)
    reader = READERS.get(path.suffix.lower() or ".txt")
    if reader is None:
        raise InputError(f"prompts file {path}: unknown ending {path.suffix!r}; use one of {', '.join(READERS)}")
    if not path.is_file():
        raise InputError(f"prompts file {path} does not exist; give a text file with one prompt a line")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"prompts file {path} is not UTF-8 text; save it as UTF-8") from None
    items = []
    for number, (line, values) in enumerate(reader(str(path), text), start=1):
        numbered = {name: _numbered(value, number) for name in FILES if (value := vars(options)[name])}
        own = dataclasses.replace(options, **{"prompts": None, **numbered, **values})
        items.append(Item(own, _where(str(path), line)))
        if own.prompt is None or not own.prompt.strip():
            raise InputError(f"{items[-1].where}: no prompt; write what the video shows")
    if not items:
        raise InputError(f"prompts file {path} is empty; write one prompt a line")
    _check_distinct(items)
    return items


def _check_distinct(items: list[Item]) -> None:
    owners: dict[str, str] = {}
    for item in items:
        for name in FILES:
            if (file := vars(item.options)[name]) is None:
                continue
            owner = owners.setdefault(os.path.realpath(file), f"the {name} of {item.where or 'the video'}")
            if owner != f"the {name} of {item.where or 'the video'}":
                raise InputError(f"{item.where or 'the video'}: {name} {file} is also {owner}; give each its own")


def _numbered(name: str, number: int) -> str:
    path = pathlib.Path(name)
    return str(path.with_name(f"{path.stem}-{number}{path.suffix}"))


def _where(path: str, line: int) -> str:
    return f"{path} line {line}"


def _read_text(path: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    del path
    for line, prompt in enumerate(text.split("\n"), start=1):
        if prompt.strip():
            yield line, {"prompt": prompt.strip()}


def _read_json_lines(path: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for line, entry in enumerate(text.split("\n"), start=1):
        if not entry.strip():
            continue
        try:
            pairs = json.loads(entry, object_pairs_hook=_Pairs)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{_where(path, line)}: not JSON ({error})") from None
        if not isinstance(pairs, _Pairs):
            raise InputError(f'{_where(path, line)}: not an object; write {{"prompt": ...}}')
        names = [name for name, _ in pairs]
        if doubled := [name for name in names if names.count(name) > 1]:
            raise InputError(f"{_where(path, line)}: key {doubled[0]!r} is there twice")
        values = {name: dict(value) if isinstance(value, _Pairs) else value for name, value in pairs}
        yield line, _values(_where(path, line), values)


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as it is written."""


def _read_csv(path: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    while True:
        line = rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise InputError(f"{_where(path, line)}: not CSV ({error})") from None
        if row is None:
            return
        if not any(cell.strip() for cell in row):
            continue
        if header is None:
            header = [name.strip() for name in row]
            _values(_where(path, line), dict.fromkeys(header))
            if doubled := [name for name in header if header.count(name) > 1]:
                raise InputError(f"{_where(path, line)}: key {doubled[0]!r} is there twice")
            continue
        if len(row) != len(header):
            raise InputError(f"{_where(path, line)}: {len(row)} cells; the header has {len(header)} keys")
        cells = {name: cell.strip() or None for name, cell in zip(header, row, strict=True)}
        yield line, _values(_where(path, line), cells)


READERS: dict[str, Callable[[str, str], Iterator[tuple[int, dict[str, Any]]]]] = {
    ".txt": _read_text,
    ".jsonl": _read_json_lines,
    ".csv": _read_csv,
}


def _values(where: str, entry: dict[str, Any]) -> dict[str, Any]:
    """The options of one line; those that say nothing are left out."""
    values = {}
    for name, value in entry.items():
        if name not in PER_VIDEO:
            error = unknown_name("key", name, PER_VIDEO)
            if name in OPTIONS:
                error = InputError(f"key {name!r} is one of the whole run; give it as --{name.replace('_', '-')}")
            raise InputError(f"{where}: {error}")
        if value is not None:
            try:
                values[name] = OPTIONS[name].metadata["convert"](name, value)
            except InputError as error:
                raise InputError(f"{where}: {error}") from None
    return values
