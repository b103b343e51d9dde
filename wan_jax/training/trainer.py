"""The training loop, for any loss: the step, checkpoints, figures, and what is to be done at intervals."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from wan_jax.errors import InputError
from wan_jax.parallel.sharding import ShardingRules
from wan_jax.runtime.compiled import CompiledFunction
from wan_jax.training.checkpoints import Checkpoints
from wan_jax.training.config import TrainerConfig
from wan_jax.training.metrics import MetricsLog
from wan_jax.training.optimizer import learning_rate, make_optimizer
from wan_jax.training.step import Loss, TrainState, init_state, make_step, split_batch


class Batches(Protocol):
    """Where data comes from: an iterator that says where it stands. grain's iterators are of this kind."""

    def __next__(self) -> Any:
        """The next batch: a tree of host arrays [B, ...]."""

    def get_state(self) -> Any:
        """Something that JSON can hold."""

    def set_state(self, state: Any) -> None: ...


class MadeBatches:
    """Batches that a function of the step makes: for data that code draws."""

    def __init__(self, make: Callable[[int], Any], start: int = 0):
        self._make = make
        self._next = start

    def __next__(self) -> Any:
        self._next += 1
        return self._make(self._next - 1)

    def get_state(self) -> Any:
        return {"next": self._next}

    def set_state(self, state: Any) -> None:
        self._next = state["next"]


def show_line(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Every:
    """Something to do every so many steps and after the last: `call(step, state)`; it returns figures or None."""

    steps: int
    call: Callable[[int, TrainState], dict[str, float] | None]


class Trainer:
    """Trains parameters in a folder; a run that was killed goes on from its last checkpoint.

    Args:
      loss: see `step.Loss`.
      parameters: a tree of float32 arrays, where they are to stay; the run takes them over.
      batches: where data comes from.
      config: see TrainerConfig.
      folder: of the run: checkpoints/, metrics.jsonl, tensorboard/.
      frozen: a tree of arrays that the loss reads.
      mesh: devices to spread batches over; None for one device. Parameters and `frozen` lie on it already.
      rules: where the batch axis goes.
      flops: of one step with a batch like this one, for the share of the peak that is reached (MFU).
      peak_flops: per second, of one device: what that share refers to.
      intervals: what else is to be done.
      show: prints one line; None is silent.
    """

    def __init__(
        self,
        loss: Loss,
        parameters: Any,
        batches: Batches,
        config: TrainerConfig,
        folder: Path,
        *,
        frozen: Any = None,
        mesh: Mesh | None = None,
        rules: ShardingRules | None = None,
        flops: Callable[[Any], float] | None = None,
        peak_flops: float | None = None,
        intervals: Sequence[Every] = (),
        show: Callable[[str], None] | None = show_line,
    ):
        rules = ShardingRules() if rules is None else rules
        one_device = SingleDeviceSharding(jax.devices()[0])
        self.config = config
        self.folder = folder
        self._batches = batches
        self._frozen = frozen
        self._mesh = mesh
        self._flops = flops
        self._peak_flops = None if peak_flops is None else peak_flops * (1 if mesh is None else mesh.size)
        self._intervals = intervals
        self._show = show
        self._batch_sharding = one_device if mesh is None else rules.batch_sharding(mesh, leading=1)
        self._microbatch_multiple = 1 if mesh is None else rules.batch_parts(mesh)

        # The devices of a CPU share a pool of threads, in which collectives of two steps can wait for each other.
        self._one_at_a_time = mesh is not None and jax.default_backend() == "cpu"

        optimizer = make_optimizer(config.optimizer, config.steps)
        self._learning_rate = learning_rate(config.optimizer, config.steps)
        replicated = one_device if mesh is None else NamedSharding(mesh, PartitionSpec())
        ema = config.ema_decay is not None
        self.state = init_state(parameters, optimizer, seed=config.seed, ema=ema, replicated=replicated)
        places = jax.tree.map(lambda array: array.sharding, self.state)
        step = make_step(loss, optimizer, config.ema_decay or 0.0)
        self._step = CompiledFunction(step, donate_argnums=(0,), out_shardings=(places, replicated))
        self._checkpoints = Checkpoints(
            folder / "checkpoints", keep_last=config.keep_last, keep_every=config.keep_every
        )
        if (latest := self._checkpoints.latest) is not None:
            shapes = jax.tree.map(
                lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding), self.state
            )
            for array in jax.tree.leaves(self.state):  # there is not room for two
                array.delete()
            self.state, data = self._checkpoints.load(latest, shapes)
            batches.set_state(data)
            self._print(f"continues {folder} after step {latest}")
        self.step = latest or 0

    @property
    def averaged(self) -> Any:
        """The moving average of the parameters; the parameters themselves where there is none."""
        return self.state.parameters if self.state.ema is None else self.state.ema

    def run(self) -> TrainState:
        """Trains to the last step and returns the state.

        Raises InputError where a batch does not divide, or the loss is no longer finite.
        """
        log = MetricsLog(self.folder, self.step)
        pending: list[tuple[int, dict[str, jax.Array]]] = []
        clock = _Clock()
        try:
            while self.step < self.config.steps:
                batch = self._split(next(self._batches))
                if self._flops is not None:
                    clock.flops += self._flops(batch)
                batch = jax.device_put(batch, self._batch_sharding)
                arguments = self.state, self._frozen, batch
                with clock.paused(), self._mesh_context():
                    self._step.compile(*arguments)
                self.state, metrics = self._step(*arguments)
                if self._one_at_a_time:
                    jax.block_until_ready(self.state)
                self.step += 1
                pending.append((self.step, metrics))
                save = self.step % self.config.save_every == 0
                due = list(self._due())
                last = self.step == self.config.steps
                extra: dict[str, float] = {}
                if due:
                    jax.block_until_ready(metrics)
                    with clock.paused():
                        for interval in due:
                            extra |= interval.call(self.step, self.state) or {}
                if self.step % self.config.log_every == 0 or save or due or last:
                    self._report(log, pending, clock, extra)
                if save or last:
                    # All figures up to here are in the file, so a run that goes on from here lacks none.
                    with clock.paused():
                        self._checkpoints.save(self.step, self.state, self._batches.get_state())
        finally:
            log.close()
            self._checkpoints.close()
        return self.state

    def _mesh_context(self) -> contextlib.AbstractContextManager:
        """What the step is traced under, so that models can say what lies where."""
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def _split(self, batch: Any) -> Any:
        size = jax.tree.leaves(batch)[0].shape[0]
        multiple = self.config.accumulation * self._microbatch_multiple
        if size % multiple:
            raise InputError(
                f"a batch of {size} does not split into {self.config.accumulation} microbatches on "
                f"{self._microbatch_multiple} parts of the mesh; use a multiple of {multiple}"
            )
        return split_batch(batch, self.config.accumulation)

    def _due(self) -> Iterator[Every]:
        for interval in self._intervals:
            if self.step % interval.steps == 0 or self.step == self.config.steps:
                yield interval

    def _report(
        self, log: MetricsLog, pending: list[tuple[int, dict[str, jax.Array]]], clock: "_Clock", extra: dict[str, float]
    ) -> None:
        """Writes the figures of the steps since the last report, which it waits for, and a line of progress.

        `extra` joins the last step's.
        """
        rows = [(step, {name: float(value) for name, value in metrics.items()}) for step, metrics in pending]
        pending.clear()
        seconds, flops = clock.lap()
        rate = len(rows) / seconds
        speed = {"steps_per_second": rate}
        if self._peak_flops is not None and flops:
            speed["mfu"] = flops / seconds / self._peak_flops
        for step, figures in rows:
            more = {**speed, **extra} if step == rows[-1][0] else {}
            log.write(step, {**figures, "learning_rate": float(self._learning_rate(step - 1)), **more})
            if not np.isfinite(figures["loss"]):
                log.flush()
                raise InputError(
                    f"step {step}: the loss is not finite; lower the learning rate, and go on from the last checkpoint"
                )
        log.flush()
        losses = np.mean([figures["loss"] for _, figures in rows])
        mfu = f"  MFU {speed['mfu']:.1%}" if "mfu" in speed else ""
        left = _duration((self.config.steps - self.step) / rate)
        self._print(f"step {self.step}/{self.config.steps}  loss {losses:.4f}  {rate:.3g} steps/s{mfu}  {left} left")

    def _print(self, line: str) -> None:
        if self._show is not None:
            self._show(line)


class _Clock:
    """Seconds of training alone: neither compiling nor saving nor sampling."""

    def __init__(self):
        self.flops = 0.0
        self._start = time.perf_counter()

    def lap(self) -> tuple[float, float]:
        """Seconds and floating-point operations since the last lap."""
        now = time.perf_counter()
        seconds, flops = max(now - self._start, 1e-9), self.flops
        self._start, self.flops = now, 0.0
        return seconds, flops

    def paused(self) -> "_Clock":
        return self

    def __enter__(self) -> None:
        self._stopped = time.perf_counter()

    def __exit__(self, *_: Any) -> None:
        self._start += time.perf_counter() - self._stopped


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
