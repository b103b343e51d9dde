"""Progress bars on standard error, for every step that takes long."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class Advance(Protocol):
    """Moves a bar on by `count`, and changes its text if one is given."""

    def __call__(self, count: float = 1, description: str | None = None) -> None: ...


class Bars:
    """One bar per task; nothing at all when `enabled` is false."""

    def __init__(self, enabled: bool = True):
        self.enabled = enabled

    @contextlib.contextmanager
    def task(self, description: str, total: float | None = None) -> Iterator[Advance]:
        """Shows a bar (a spinner where `total` is None) until the block ends; yields the function that advances it."""
        if not self.enabled:
            yield _ignore
            return
        columns = [SpinnerColumn(), TextColumn("{task.description}")]
        if total is not None:
            columns += [BarColumn(), MofNCompleteColumn()]
        with Progress(*columns, TimeElapsedColumn(), console=Console(file=sys.stderr)) as progress:
            bar = progress.add_task(description, total=total)

            def advance(count: float = 1, description: str | None = None) -> None:
                progress.update(bar, advance=count, description=description)

            yield advance
            if total is None:
                progress.update(bar, total=1, completed=1)

    def note(self, message: str) -> None:
        """Prints one line that the user should see."""
        if self.enabled:
            Console(file=sys.stderr).print(f"note: {message}", markup=False, highlight=False, soft_wrap=True)


def _ignore(count: float = 1, description: str | None = None) -> None:
    del count, description
