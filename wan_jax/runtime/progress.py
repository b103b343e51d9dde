"""Progress bars on standard error: a listener of a run's events."""

import sys
import threading
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from wan_jax.runtime import events


class Bars:
    """Shows a bar for each stage whose length is known and for each transfer, and prints notes, each once.

    Args:
        enabled: whether anything is shown.
    """

    def __init__(self, enabled: bool = True):
        self.enabled = enabled
        self._lock = threading.Lock()
        self._display: Progress | None = None  # the terminal has one; bars within bars are lines of it
        self._tasks: dict[str, TaskID] = {}  # by stage, or by the name of what is transferred
        self._notes: set[str] = set()

    def __call__(self, event: events.Event) -> None:
        if not self.enabled:
            return
        with self._lock:
            match event:
                case events.Note(message):
                    if message not in self._notes:
                        print(f"note: {message}", file=sys.stderr)
                    self._notes.add(message)
                case events.StageStarted(stage, total) if total is not None:
                    self._open(stage, f"{stage} (compiling)" if stage == "denoise" else stage, total)
                case events.StepDone():
                    self._move("denoise", advance=1, description=f"denoise ({event.expert} expert)")
                case events.FramesDecoded():
                    self._move("decode", completed=event.done)
                case events.Progress():
                    self._move(event.stage, completed=event.done, description=event.description or None)
                case events.Transfer():
                    if event.name not in self._tasks:
                        self._open(event.name, event.name, event.total, in_bytes=True)
                    self._move(event.name, completed=event.done)
                case events.StageDone(stage):
                    self._close(stage)

    @property
    def lines(self) -> list[tuple[str, float]]:
        """What is shown: each bar's text and how far it has come."""
        return [] if self._display is None else [(task.description, task.completed) for task in self._display.tasks]

    def _open(self, key: str, description: str, total: int, in_bytes: bool = False) -> None:
        if self._display is None:
            columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), _Count()
            self._display = Progress(*columns, TimeElapsedColumn(), console=Console(file=sys.stderr))
            self._display.start()
        self._tasks[key] = self._display.add_task(description, total=total, in_bytes=in_bytes)

    def _move(self, key: str, **changes: Any) -> None:
        if self._display is not None and key in self._tasks:
            self._display.update(self._tasks[key], **changes)

    def _close(self, stage: str) -> None:
        """Ends a stage's bars. Within another stage they vanish; else they stay on the terminal."""
        over = {key for key in self._tasks if key == stage or key.startswith(f"{stage} ")}
        if self._display is None or not over:
            return
        for key in over:
            task = self._tasks.pop(key)
            if self._tasks.keys() - over:
                self._display.remove_task(task)
        if not self._tasks:
            self._display.stop()
            self._display = None


class _Count(ProgressColumn):
    """Steps done and in all, or bytes."""

    def __init__(self) -> None:
        super().__init__()
        self._steps, self._bytes = MofNCompleteColumn(), DownloadColumn()

    def render(self, task: Task):
        return (self._bytes if task.fields["in_bytes"] else self._steps).render(task)
