"""Knobs: fields of dataclasses that say what they are and how they are read from text; all else derives from that.

steps: int = knob(integer, "number of denoising steps", metavar="N")
"""

import inspect
import os
import pathlib
import re
import secrets
from collections.abc import Callable
from dataclasses import Field, field, fields
from fractions import Fraction
from numbers import Integral, Real
from typing import Any

from wan_jax.config import PerExpert
from wan_jax.errors import InputError

Convert = Callable[[str, Any], Any]  # (the field's name, a value or a text of it) -> the value; raises InputError


def text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InputError(f"{name} {value!r:.80}: must be text")
    return value


def words(name: str, value: Any) -> str:
    """Text that can be written into files; a command line may have bytes that cannot."""
    try:
        text(name, value).encode()
    except UnicodeEncodeError:
        raise InputError(f"{name} {value!r:.80}: is not UTF-8 text") from None
    return value


def seed_number(name: str, value: Any) -> int:
    """A whole number of 64 bits, or "random", which draws one."""
    number = secrets.randbits(32) if isinstance(value, str) and value == "random" else integer(name, value)
    if not 0 <= number < 2**64:
        raise InputError(f"{name} {value!r:.80}: must be from 0 to 2**64 - 1, or random")
    return number


def integer(name: str, value: Any) -> int:
    parsed = _parsed(value, int)
    is_whole = isinstance(parsed, Integral) or (isinstance(parsed, float) and parsed.is_integer())
    if isinstance(parsed, bool) or not is_whole:
        raise InputError(f"{name} {value!r:.80}: must be a whole number")
    return int(parsed)


def number(name: str, value: Any) -> float:
    parsed = _parsed(value, float)
    try:
        if isinstance(parsed, bool) or not isinstance(parsed, Real):
            raise TypeError
        return float(parsed)
    except (TypeError, OverflowError):
        raise InputError(f"{name} {value!r:.80}: must be a number") from None


def rate(name: str, value: Any) -> float:
    """Frames per second, whole where they can be: 24, 12.5, "30000/1001"."""
    try:
        fps = Fraction(value if isinstance(value, (str, Fraction)) else number(name, value))
    except (ValueError, OverflowError, ZeroDivisionError):
        raise InputError(f"{name} {value!r:.80}: must be a number, or a fraction like 30000/1001") from None
    if not Fraction(1, 100) <= fps <= 1000:
        raise InputError(f"{name} {value}: must be at least 1/100 and at most 1000")
    return int(fps) if fps.denominator == 1 else float(fps)


def path_of(name: str, value: Any) -> pathlib.Path:
    """A file's name as a path."""
    if not isinstance(value, (str, os.PathLike)) or "\0" in os.fsdecode(value):
        raise InputError(f"{name} {value!r:.80}: must be the name of a file")
    return pathlib.Path(words(name, os.fsdecode(value)))


def file_name(name: str, value: Any) -> str:
    """The same, as it was written."""
    path_of(name, value)
    return os.fspath(value)


def switch(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"{name} {value!r:.80}: must be true or false")
    return value


def texts(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, (tuple, list)):
        raise InputError(f"{name} {value!r:.80}: must be a list of texts")
    return tuple(text(name, each) for each in value)


def width_height(name: str, value: Any) -> tuple[int, int]:
    """ "1280x720", "1280*720" or (1280, 720), width first."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+)\s*[xX*]\s*(\d+)\s*", value)
        if not match:
            raise InputError(f"{name} {value!r:.80}: write WIDTHxHEIGHT, for example 1280x720")
        value = match.groups()
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise InputError(f"{name} {value!r:.80}: give (width, height)")
    width, height = (integer(name, side) for side in value)
    return width, height


def anything(name: str, value: Any) -> Any:
    """What `SamplingParams.resolve` reads: a file's name, or what was in it."""
    del name
    return value


def per_expert(convert: Convert) -> Convert:
    """A value for both experts, a pair (low, high), a PerExpert, or the text "LOW,HIGH"."""
    kind = "whole number" if convert is integer else "number" if convert is number else "name"

    def convert_each(name: str, value: Any) -> Any:
        parts = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
        if not isinstance(parts, (tuple, list)):
            return convert(name, value)
        try:
            values = [convert(name, part) for part in parts] if len(parts) in (1, 2) else []
        except InputError:
            if not isinstance(value, str):
                raise
            values = []
        if not values:
            write = f"write one {kind}, or LOW,HIGH" if isinstance(value, str) else "give one value, or a pair"
            raise InputError(f"{name} {value!r:.80}: {write} for the low-noise and the high-noise expert")
        return values[0] if len(values) == 1 else PerExpert(*values)

    return convert_each


# The type of a field's value in a recipe; text for all others.
KINDS: dict[Convert, type] = {integer: int, seed_number: int, number: float, rate: float, switch: bool, texts: tuple}


def knob(
    convert: Convert,
    description: str,
    *,
    default: Any = None,
    metavar: str | None = None,
    both_experts: bool = False,
    per_video: bool = True,
    per_row: bool = False,
) -> Any:
    """A field of a request.

    Args:
        convert: one of the functions above.
        description: for the help of the command line and of Python.
        default: None takes the preset's value, if there is one.
        metavar: of the command line.
        both_experts: whether a value may be one for each expert.
        per_video: whether a file of prompts may give it for each video.
        per_row: whether a call may give a sequence with one value for each video.
    """
    metadata = {
        "kind": str if both_experts else KINDS.get(convert, str),
        "convert": per_expert(convert) if both_experts else convert,
        "help": description,
        "metavar": metavar,
        "per_expert": both_experts,
        "per_video": per_video,
        "per_row": per_row,
    }
    return field(default=default, metadata=metadata)


def knobs(kind: Any) -> list[Field]:
    """The knobs of a dataclass, in order."""
    return [each for each in fields(kind) if "convert" in each.metadata]


def convert_fields(values: Any) -> None:
    """Converts the knobs of a (frozen) dataclass that has just been made; None is a field left out."""
    for each in knobs(values):
        value = vars(values)[each.name]
        value = each.default if value is None else each.metadata["convert"](each.name, value)
        object.__setattr__(values, each.name, value)


def documented(kind: Any) -> Callable[[Any], Any]:
    """Decorates a function whose `**params` are the knobs of a dataclass: signature and docstring name them."""

    def decorate(function: Any) -> Any:
        signature = inspect.signature(function)
        parameters = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
        added = [each for each in knobs(kind) if each.name not in signature.parameters]
        parameters += [
            inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=each.type)
            for each in added
        ]
        function.__signature__ = signature.replace(parameters=parameters)
        lines = [f"{each.name}: {each.metadata['help']}." for each in added]
        indent, _, _ = function.__doc__.partition("**params")[0].rpartition("\n")[2].partition("*")
        function.__doc__ = function.__doc__.replace(f"**params: see {kind.__name__}.", f"\n{indent}".join(lines))
        return function

    return decorate


def _parsed(value: Any, kind: Callable[[str], Any]) -> Any:
    try:
        return kind(value) if isinstance(value, str) else value
    except ValueError:
        return value
