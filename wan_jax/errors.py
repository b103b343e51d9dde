"""The exceptions that callers meet: bad input, and a run that was cancelled."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator

MAX_MESSAGE = 2000  # characters


class InputError(ValueError):
    """Something the user gave cannot be used: one line that names the thing and says what to do.

    The command line prints the message and exits with code 2; any other exception is a bug in wan_jax.
    """

    def __init__(self, message: object):
        # It may quote what a file says, of any length and with any character.
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(message)[: MAX_MESSAGE + 1])
        super().__init__(text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]}...")


class OutputError(OSError):
    """A file could not be written, though it was checked before: a full disk. One line; the exit code is 1."""


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP, which the command line takes as Ctrl-C; the exit code says which."""


class Cancelled(Exception):
    """A run ended because its caller asked for it (runtime/events.py: CancelToken)."""


def check_finite(is_finite: object, what: str) -> None:
    """Raises InputError, saying which stage made `what`, unless all of it is finite."""
    if not is_finite:
        raise InputError(f"{what} are not finite: the weights are damaged, or need float32")


@contextlib.contextmanager
def located(place: object) -> Iterator[None]:
    """An InputError that does not name the place gets it in front: checks of values know no file."""
    try:
        yield
    except InputError as error:
        raise error if str(place) in str(error) else InputError(f"{place}: {error}") from None
    except ArithmeticError:
        raise InputError(f"{place}: has sizes that no model of Wan has; download it again") from None


def one_line(error: BaseException, text: str | None = None) -> str:
    """What an exception says (or a text in its place), with the notes on it, in one line."""
    return " ".join("; ".join([text or str(error), *vars(error).get("__notes__", ())]).split())


def unknown_name(kind: str, name: object, known: Iterable[str]) -> InputError:
    """The error for a `name` that is not among the `known` ones; it suggests the nearest."""
    known = list(known)
    (nearest,) = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)
    return InputError(f"unknown {kind} {name!r}; did you mean {nearest!r}? (known: {', '.join(known)})")
