"""Progress bars on standard error, for every step that takes long."""

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)


class Bar:
    """One line of progress."""

    def __init__(
        self,
        progress: Progress | None,
        description: str,
        total: float | None,
        on_progress: Callable[[str], None] = lambda text: None,
    ):
        self._description, self._total, self._done, self._on_progress = description, total, 0.0, on_progress
        self._tell()
        self._progress = progress
        self._task = None if progress is None else progress.add_task(description, total=total)

    def advance(self, count: float = 1, description: str | None = None) -> None:
        """Moves on by `count`, with a new text if one is given."""
        self._done += count
        self._description = description or self._description
        self._tell()
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, advance=count, description=description)

    def reach(self, done: float) -> None:
        """Moves to `done`."""
        self._done = done
        self._tell()
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done)

    def remove(self) -> None:
        """Takes the bar away."""
        if self._progress is not None and self._task is not None:
            self._progress.remove_task(self._task)

    def _tell(self) -> None:
        of = "" if self._total is None else f", {self._done:g} of {self._total:g}"
        self._on_progress(f"{self._description}{of}")


class Bars:
    """Makes the bars; silent when `enabled` is false. `on_progress` is told of every move, shown or not."""

    def __init__(self, enabled: bool = True, on_progress: Callable[[str], None] = lambda text: None):
        self.enabled = enabled
        self._on_progress = on_progress
        self._shown: Progress | None = None  # the terminal has one display; bars within bars are lines of it

    @contextlib.contextmanager
    def task(self, description: str, total: float | None = None) -> Iterator[Bar]:
        """One bar (a spinner where `total` is None). Within another's block it goes when its own ends."""
        within = self._shown is not None
        with self._display([] if total is None else [BarColumn(), MofNCompleteColumn()]) as progress:
            bar = Bar(progress, description, total, self._on_progress)
            yield bar
            if total is None:
                bar.reach(1)
            if within:
                bar.remove()

    @contextlib.contextmanager
    def transfers(self, verb: str) -> Iterator[Callable[[str, int, int], None]]:
        """One bar of bytes for each thing that is moved; yields the function to call with (name, done, total)."""
        with self._display([BarColumn(), DownloadColumn()]) as progress:
            bars: dict[str, Bar] = {}

            def report(name: str, done: int, total: int) -> None:
                if name not in bars:
                    bars[name] = Bar(progress, f"{verb} {name}", total, self._on_progress)
                bars[name].reach(done)

            yield report

    def note(self, message: str) -> None:
        """Prints one line that the user should see."""
        if self.enabled:
            print(f"note: {message}", file=sys.stderr)

    @contextlib.contextmanager
    def _display(self, columns: list[ProgressColumn]) -> Iterator[Progress | None]:
        if not self.enabled:
            yield None
            return
        if self._shown is not None:
            yield self._shown
            return
        text = TextColumn("{task.description}", markup=False)
        with Progress(
            SpinnerColumn(), text, *columns, TimeElapsedColumn(), console=Console(file=sys.stderr)
        ) as progress:
            self._shown = progress
            try:
                yield progress
            finally:
                self._shown = None
