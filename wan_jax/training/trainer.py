"""The training loop, for any loss: the step, checkpoints, figures, and what is to be done at intervals."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import PartitionSpec

from wan_jax.errors import InputError
from wan_jax.parallel.placement import SINGLE, Placement
from wan_jax.runtime.compiled import CompiledFunction
from wan_jax.training.checkpoints import Checkpoints
from wan_jax.training.config import TrainerConfig
from wan_jax.training.metrics import MetricsLog
from wan_jax.training.optimizer import learning_rate, make_optimizer
from wan_jax.training.step import Loss, TrainState, init_state, make_step, split_batch


class Batches(Protocol):
    """Where data comes from: an iterator that says where it stands. grain's iterators are of this kind."""

    def __next__(self) -> Any:
        """The next batch: a tree of arrays [B, ...], on the host or on the device."""

    def get_state(self) -> Any:
        """Something that JSON can hold."""

    def set_state(self, state: Any) -> None: ...


class DrawnBatches:
    """Batches that code draws: `stream(step)` begins an iterator at a step, from 0 or where a run goes on."""

    def __init__(self, stream: Callable[[int], Iterator[Any]]):
        self._stream = stream
        self._next = 0
        self._iterator: Iterator[Any] | None = None

    def __next__(self) -> Any:
        if self._iterator is None:
            self._iterator = self._stream(self._next)
        self._next += 1
        return next(self._iterator)

    def get_state(self) -> Any:
        return {"next": self._next}

    def set_state(self, state: Any) -> None:
        self._next, self._iterator = state["next"], None


def show_line(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Every:
    """Work at intervals and after the last step: `call(step, state)` returns figures or None.

    `period` counts steps, or seconds where the run's length does.
    """

    period: float
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
      placement: where batches go; parameters and `frozen` are there already.
      flops: of one step with a batch like this one, for the share of the peak that is reached (MFU).
      peak_flops: per second, of one device: what that share refers to.
      intervals: what else is to be done.
      compiler_options: of the step.
      same_step: a trainer of the same loss, optimizer and shapes, whose compiled step is shared.
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
        placement: Placement = SINGLE,
        flops: Callable[[Any], float] | None = None,
        peak_flops: float | None = None,
        intervals: Sequence[Every] = (),
        compiler_options: Mapping[str, Any] | None = None,
        same_step: "Trainer | None" = None,
        show: Callable[[str], None] | None = show_line,
    ):
        self.config = config
        self.folder = folder
        self._start = time.perf_counter()
        self._earlier_seconds = 0.0
        self._batches = batches
        self._frozen = frozen
        self._placement = placement
        self._flops = flops
        self._peak_flops = None if peak_flops is None else peak_flops * placement.mesh_spec.devices
        self._intervals = intervals
        self._show = show
        # The devices of a CPU share a pool of threads, in which collectives of two steps can wait for each other.
        self._one_at_a_time = not placement.is_single and jax.default_backend() == "cpu"

        optimizer = make_optimizer(config.optimizer)
        replicated = placement.sharding()
        ema = config.ema_decay is not None
        self.state = init_state(parameters, optimizer, seed=config.seed, ema=ema, replicated=replicated)
        self._shapes = jax.tree.map(
            lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding), self.state
        )
        places = jax.tree.map(lambda array: array.sharding, self.state)
        self._step = CompiledFunction(
            make_step(loss, optimizer, config.ema_decay or 0.0),
            donate_argnums=(0,),
            out_shardings=(places, replicated),
            compiler_options=compiler_options,
        )
        if same_step is not None:
            self._step = same_step._step
        self._checkpoints = Checkpoints(
            folder / "checkpoints", keep_last=config.keep_last, keep_every=config.keep_every
        )
        self.step = 0
        if self._checkpoints.latest is not None:
            for array in jax.tree.leaves(self.state):  # there is not room for two
                array.delete()
            loaded = self._checkpoints.load_latest(self._shapes, self._print)
            assert loaded is not None
            self.step, self.state, metadata = loaded
            batches.set_state(metadata["data"])
            self._earlier_seconds = metadata.get("seconds", 0.0)
            self._print(f"continues {folder} after step {self.step}")

    @property
    def averaged(self) -> Any:
        """The moving average of the parameters; the parameters themselves where there is none."""
        return self.state.parameters if self.state.ema is None else self.state.ema

    @property
    def seconds(self) -> float:
        """Since this trainer was made."""
        return time.perf_counter() - self._start

    @property
    def fraction(self) -> float:
        """How much of the learning rate's schedule after the warm-up is over, from 0 to 1."""
        config = self.config
        if config.seconds is None:
            warmup = config.optimizer.warmup_steps
            return max(self.step - warmup, 0) / (config.steps - warmup)
        done = self._earlier_seconds + self.seconds
        left = max(config.seconds - self.seconds, 0.0) + config.later_seconds
        return config.start_fraction + (1 - config.start_fraction) * done / (done + left)

    def run(self) -> TrainState:
        """Trains to the end of the run and returns the state.

        Raises InputError where a batch does not divide, or the loss is no longer finite.
        """
        for _ in self.steps():
            pass
        return self.state

    def steps(self) -> Iterator[int]:
        """As `run`, but yields after each step its number, so that several trainers can take turns on a device."""
        config, clock, metrics = self.config, _Clock(self.step), None
        log = MetricsLog(self.folder, self.step)
        pending: list[_Row] = []
        position = self._position
        # A run of so many seconds makes one step at least.
        last = config.seconds is None and self._over
        try:
            while not last:
                batch = self._place(next(self._batches))
                if self._flops is not None:
                    clock.flops += self._flops(batch)
                rate, previous = learning_rate(config.optimizer, self.step, self.fraction), metrics
                with clock.paused():
                    self._compile(batch)
                self.state, metrics = self._step(self.state, self._frozen, batch, np.float32(rate))
                # The host is one step ahead of the device at most, so that its clock tells the device's time.
                jax.block_until_ready(metrics if self._one_at_a_time else previous)
                self.step += 1
                before, position, last = position, self._position, self._over
                due = [every for every in self._intervals if last or _crossed(every.period, before, position)]
                save = last or _crossed(config.save_every, before, position)
                report = bool(due) or save or _crossed(config.log_every, before, position)
                if report or self.step % config.metrics_every == 0:
                    pending.append(_Row(self.step, rate, metrics))
                figures: dict[str, float] = {}
                if due:
                    jax.block_until_ready(metrics)
                    with clock.paused():
                        for every in due:
                            figures |= every.call(self.step, self.state) or {}
                if report:
                    self._report(log, pending, clock, figures)
                if save:
                    # All figures up to here are in the file, so a run that goes on from here lacks none.
                    metadata = {"data": self._batches.get_state(), "seconds": self._earlier_seconds + self.seconds}
                    with clock.paused():
                        self._checkpoints.save(self.step, self.state, metadata)
                yield self.step
        finally:
            log.close()
            self._checkpoints.close()

    def compile(self, batch: Any) -> None:
        """Compiles the step for batches like this one, which a thread may do while others train."""
        self._compile(self._place(batch))

    def _compile(self, batch: Any) -> None:
        self._step.compile(self._shapes, self._frozen, batch, np.float32(0))

    @property
    def _position(self) -> float:
        """What periods are counted in: steps, or seconds of all calls."""
        return self.step if self.config.seconds is None else self._earlier_seconds + self.seconds

    @property
    def _over(self) -> bool:
        return self.step >= self.config.steps if self.config.seconds is None else self.seconds >= self.config.seconds

    def _place(self, batch: Any) -> Any:
        size = jax.tree.leaves(batch)[0].shape[0]
        accumulation, data = self.config.accumulation, self._placement.mesh_spec.data
        if size % (accumulation * data):
            raise InputError(
                f"a batch of {size} does not split into {accumulation} microbatches on {data} parts of the mesh; "
                f"use a multiple of {accumulation * data}"
            )
        return self._placement.put(split_batch(batch, accumulation), PartitionSpec(None, *self._placement.batch))

    def _report(self, log: MetricsLog, pending: list["_Row"], clock: "_Clock", extra: dict[str, float]) -> None:
        """Writes the pending rows, for which it waits, and a line of progress; `extra` joins the last row."""
        rows = [(row, {name: float(value) for name, value in row.metrics.items()}) for row in pending]
        pending.clear()
        seconds, steps, flops = clock.lap(self.step)
        speed = {"steps_per_second": steps / seconds}
        if self._peak_flops is not None and flops:
            speed["mfu"] = flops / seconds / self._peak_flops
        for row, figures in rows:
            speed_and_extra = {**speed, **extra} if row.step == self.step else {}
            log.write(row.step, {**figures, "learning_rate": row.rate, **speed_and_extra})
            if not np.isfinite(figures["loss"]):
                log.flush()
                raise InputError(
                    f"step {row.step}: the loss is not finite; lower the learning rate, and go on from the last "
                    "checkpoint"
                )
        log.flush()
        loss, rate = np.mean([figures["loss"] for _, figures in rows]), speed["steps_per_second"]
        mfu = f"  MFU {speed['mfu']:.1%}" if "mfu" in speed else ""
        if self.config.seconds is None:
            steps_text, left = f"{self.step}/{self.config.steps}", (self.config.steps - self.step) / rate
        else:
            steps_text, left = f"{self.step}", max(self.config.seconds - self.seconds, 0.0)
        self._print(f"step {steps_text}  loss {loss:.4f}  {rate:.3g} steps/s{mfu}  {_duration(left)} left")

    def _print(self, line: str) -> None:
        if self._show is not None:
            self._show(line)


class _Row(NamedTuple):
    """Figures of a step that may not be computed yet."""

    step: int
    rate: float
    metrics: dict[str, jax.Array]


def _crossed(period: float, before: float, now: float) -> bool:
    """Whether a multiple of the period was reached."""
    return now // period > before // period


class _Clock:
    """Seconds of training alone: neither compiling nor saving nor sampling."""

    def __init__(self, step: int):
        self.flops = 0.0
        self._step = step
        self._start = time.perf_counter()

    def lap(self, step: int) -> tuple[float, int, float]:
        """Seconds, steps and floating-point operations since the last lap."""
        now = time.perf_counter()
        lap = max(now - self._start, 1e-9), step - self._step, self.flops
        self._start, self._step, self.flops = now, step, 0.0
        return lap

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
