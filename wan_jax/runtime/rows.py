"""Files of rows, JSON Lines or CSV, read strictly: nothing of them is guessed, mended or left out."""

import codecs
import csv
import io
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from wan_jax.errors import InputError

# How files of other encodings begin; the longer ones first.
MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32"}
MARKS |= {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}

CheckKeys = Callable[[str, Sequence[str]], None]
Row = tuple[str, dict[str, Any]]  # where it is: "prompts.csv line 3", and its values


def read_text(path: pathlib.Path) -> str:
    """The text of a UTF-8 file; raises InputError for one that cannot be read, naming its encoding."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None
    encoding = next((name for mark, name in MARKS.items() if data.startswith(mark)), None)
    if encoding is None and b"\0" in data:
        encoding = "UTF-16 or no text"
    if encoding is None:
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            encoding = f"Windows-1252 or another (byte {data[error.start]:#x} in line {line})"
    raise InputError(f"{path} is not UTF-8 text but {encoding}; save it as UTF-8")


def read_rows(path: pathlib.Path, example: str, check_keys: CheckKeys = lambda place, keys: None) -> Iterator[Row]:
    """Yields the rows of a .jsonl or .csv file, and where each is.

    Lines of JSON are objects; the first row of CSV holds the keys, and cells that are empty are empty texts. Empty
    lines are left out.

    Args:
        path: the file.
        example: of a line of JSON, for messages.
        check_keys: called with the place and the keys of each object, or of the first row of CSV.

    Raises:
        InputError: the place of what is not JSON or CSV, of a key that is there twice, or of a missing or surplus cell.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: unknown ending {path.suffix!r}; use {' or '.join(READERS)}")

    def check(place: str, keys: Sequence[str]) -> None:
        if doubled := [key for key in keys if keys.count(key) > 1]:
            raise InputError(f"{place}: key {doubled[0]!r} is there twice")
        check_keys(place, keys)

    return reader(str(path), read_text(path), check, example)


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as it is written."""


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


def _read_json_lines(path: str, text: str, check: CheckKeys, example: str) -> Iterator[Row]:
    for line, entry in enumerate(text.split("\n"), start=1):
        if not entry.strip():
            continue
        place = f"{path} line {line}"
        try:
            pairs = json.loads(entry, object_pairs_hook=_Pairs, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{place}: not JSON ({error})") from None
        if not isinstance(pairs, _Pairs):
            raise InputError(f"{place}: not an object; write {example}")
        check(place, [key for key, _ in pairs])
        yield place, {key: dict(value) if isinstance(value, _Pairs) else value for key, value in pairs}


def _read_csv(path: str, text: str, check: CheckKeys, example: str) -> Iterator[Row]:
    del example
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    while True:
        place = f"{path} line {rows.line_num + 1}"
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise InputError(f"{place}: not CSV ({error})") from None
        if row is None:
            return
        if not any(cell.strip() for cell in row):
            continue
        if header is None:
            header = [key.strip() for key in row]
            check(place, header)
        elif len(row) != len(header):
            raise InputError(f"{place}: {len(row)} cells; the header has {len(header)} keys")
        else:
            yield place, dict(zip(header, row, strict=True))


READERS = {".jsonl": _read_json_lines, ".csv": _read_csv}
