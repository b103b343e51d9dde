"""What a piece of work tells while it runs, and how it is told to stop.

    def show(event):
        if isinstance(event, StepDone):
            print(event.step, event.total)

    token = CancelToken()
    pipe("a red circle", on_event=show, cancel=token)  # token.cancel(), from any thread, ends it with Cancelled

Progress bars, the watchdog, a server and tests are listeners: functions of one event. Every piece of work takes a
`Run`, which holds all that belongs to one run alone.
"""

import contextlib
import copy
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from wan_jax.errors import Cancelled, InputError
from wan_jax.runtime.compiled import CompiledFunction
from wan_jax.runtime.devices import is_out_of_memory, out_of_memory


@dataclass(frozen=True)
class Note:
    """Something harmless that the user should know."""

    message: str


@dataclass(frozen=True)
class StageStarted:
    """A stage begins: "load", "text", "image", "encode", "denoise", "decode", "save", "videos", ..."""

    stage: str
    total: int | None = None  # steps, frames or files that will be reported done; None where that is not known


@dataclass(frozen=True)
class StageDone:
    """The stage is over, also where it failed."""

    stage: str
    seconds: float  # without compiling


@dataclass(frozen=True)
class Progress:
    """A stage without an event of its own has come further."""

    stage: str
    done: int
    description: str = ""


@dataclass(frozen=True)
class Transfer:
    """Weights on their way: how many bytes of `name` are done."""

    name: str  # "load text_encoder"
    done: int
    total: int


@dataclass(frozen=True)
class StepDone:
    """A denoising step is done."""

    step: int  # counted from 1
    total: int
    expert: str  # "high_noise", "low_noise" or "denoiser"
    seconds: float  # without compiling
    compile_seconds: float = 0.0  # before this step; 0 if nothing was compiled
    videos: tuple[int, ...] = (0,)  # which videos of the batch made the step
    # A small uint8 picture [F', h, w, 3] of each video as the model predicts it now: [B, F', h, w, 3].
    preview: Callable[[], np.ndarray] | None = field(default=None, repr=False, compare=False)
    # The solver's state on the host, from which a run can go on (`pipe(..., state=...)`).
    state: Callable[[], Any] | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return f"step {self.step} of {self.total} ({self.expert} expert)"


@dataclass(frozen=True, eq=False)
class FramesDecoded:
    """Frames have left the device."""

    frames: np.ndarray = field(repr=False)  # uint8 [n, H, W, 3]
    done: int = 0  # frames decoded so far, these included
    total: int = 0
    video: int = 0  # which video of the batch


Event = Note | StageStarted | StageDone | Progress | Transfer | StepDone | FramesDecoded
Listener = Callable[[Event], None]


class CancelToken:
    """Asks a run to stop, from any thread. It does so after the step or the frames at hand, and raises `Cancelled`."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def cancel(self) -> None:
        self._event.set()

    @property
    def cancelled(self) -> bool:
        return self._event.is_set()


class Run:
    """One piece of work: its listener, its cancel token and its wall times.

    Events of one run reach the listener one at a time. Without a listener notes are warnings.

    Attributes:
        seconds: wall time by stage, without compiling, which is counted as "compile".
        advice: says what to do where memory is out; set by the work that knows.
    """

    def __init__(self, on_event: Listener | None = None, cancel: CancelToken | None = None):
        if not isinstance(cancel, CancelToken | None):
            raise InputError(f"cancel {cancel!r:.60}: give a CancelToken")
        self.seconds: dict[str, float] = {}
        self.advice: Callable[[], str] = lambda: (
            "take profile stream, a smaller size, fewer frames or a mesh; see wan-jax plan"
        )
        self._on_event = on_event
        self._warns = on_event is None
        self._cancel = cancel
        self._lock = threading.RLock()

    def emit(self, event: Event) -> None:
        if self._on_event is not None:
            with self._lock:
                self._on_event(event)

    def listened_to(self, listener: Listener) -> "Run":
        """The same run with one more listener."""
        other = copy.copy(self)
        other._on_event = listeners(self._on_event, listener)
        return other

    def note(self, message: str) -> None:
        """Tells the user something harmless."""
        if self._warns:
            warnings.warn(message, stacklevel=_levels_to_caller())
        self.emit(Note(message))

    def progress(self, stage: str, done: int, description: str = "") -> None:
        """Says how far a stage has come."""
        self.emit(Progress(stage, done, description))

    def check(self) -> None:
        """Raises Cancelled if the token asks for it."""
        if self._cancel is not None and self._cancel.cancelled:
            raise Cancelled("the run was cancelled")

    def add_seconds(self, stage: str, seconds: float) -> None:
        with self._lock:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[None]:
        """Reports a stage and counts its seconds, without those of compiling.

        Raises:
            InputError: memory is out; says what to do.
        """
        self.check()
        self.emit(StageStarted(name, total))
        start, compiled = time.perf_counter(), self.seconds.get("compile", 0.0)
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise InputError(f"{name}: {out_of_memory(error)}; {self.advice()}") from error
        finally:
            seconds = time.perf_counter() - start - (self.seconds.get("compile", 0.0) - compiled)
            self.add_seconds(name, seconds)
            self.emit(StageDone(name, seconds))

    @contextlib.contextmanager
    def transfers(self, verb: str) -> Iterator[Callable[[str, int, int], None]]:
        """A stage that moves weights; yields the function that reports (name, bytes done, bytes in all)."""
        with self.stage(verb):
            yield lambda name, done, total: self.emit(Transfer(f"{verb} {name}", done, total))

    def call(self, function: CompiledFunction, *args: Any) -> Any:
        """Calls a function without waiting for its end; counts the time to compile it."""
        start = time.perf_counter()
        if function.compile(*args):
            self.add_seconds("compile", time.perf_counter() - start)
        return function(*args)


def listeners(*functions: Listener | None) -> Listener | None:
    """One listener that tells all of those that there are; None for none."""
    told = [function for function in functions if function is not None]
    for function in told:
        if not callable(function):
            raise InputError(f"on_event {function!r:.60}: give a function of one event")

    def tell(event: Event) -> None:
        for function in told:
            function(event)

    return tell if told else None


def _levels_to_caller() -> int:
    """The stack level, for `warnings.warn` in the caller of this function, of the first frame outside of wan_jax."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in (
        "wan_jax",
        "contextlib",
    ):
        level, frame = level + 1, frame.f_back
    return level
