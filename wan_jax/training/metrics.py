"""Figures of a run: one JSON object a step in metrics.jsonl, and the same for TensorBoard."""

import json
from collections.abc import Mapping
from pathlib import Path

METRICS = "metrics.jsonl"


class MetricsLog:
    """Appends to a run's figures.

    Args:
      folder: of the run.
      step: where the run starts or goes on. Rows of later steps, which a killed run wrote after its last checkpoint,
        are removed, so that every step has one row.
    """

    def __init__(self, folder: Path, step: int = 0):
        from tensorboardX import SummaryWriter

        self.path = folder / METRICS
        kept = [line for line in _lines(self.path) if json.loads(line)["step"] <= step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        temporary.replace(self.path)
        self._file = self.path.open("a")
        # TensorBoard itself drops what older files say of these steps.
        self._summaries = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **figures}) + "\n")
        for name, value in figures.items():
            self._summaries.add_scalar(name, value, step)

    def flush(self) -> None:
        """Hands all that was written to the operating system."""
        self._file.flush()
        self._summaries.flush()

    def close(self) -> None:
        self._file.close()
        self._summaries.close()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The rows of a run so far."""
    return [json.loads(line) for line in _lines(folder / METRICS)]


def _lines(path: Path) -> list[str]:
    """Whole lines; a killed process may leave half of one."""
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
