"""What all stages of training share: the run with its files, and the loop of one stage."""

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wan_jax.config import WanConfig
from wan_jax.errors import InputError
from wan_jax.runtime import xla_flags
from wan_jax.training.checkpoints import named_leaves
from wan_jax.training.step import Loss, TrainState, init_state, make_step
from wan_nano.data import chunks, train_tokenizer
from wan_nano.digits import digit_atlas
from wan_nano.files import (
    TOKENIZER,
    Log,
    copy_missing,
    find_shards,
    read_shards,
    write_arrays,
    write_folder,
    write_shards,
)
from wan_nano.optimizer import make_optimizer, with_learning_rate
from wan_nano.recipe import Bucket, Recipe
from wan_nano.render import render_batch
from wan_nano.scenes import Scenes

Parameters = dict[str, jax.Array]
Step = Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, jax.Array]]]


@dataclass
class Run:
    """What all stages share."""

    config: WanConfig
    recipe: Recipe
    output: Path  # small files: the tokenizer, averaged weights
    state: Path  # everything
    digits: Path | None
    log: Log
    resume: Path | None = None  # an earlier output, for files that neither output nor state has
    more: float = 0.0  # seconds of the last stage that later calls will add
    fraction_start: float = 0.0  # how much of a stage's schedule is over when it begins
    seed: int = 0
    atlas: jax.Array = field(init=False)

    def __post_init__(self):
        for folder in (self.output, self.state):
            folder.mkdir(parents=True, exist_ok=True)
        copy_missing(self.state, self.output)
        if self.resume is not None:
            copy_missing(self.resume, self.output)
        self.atlas = jnp.asarray(digit_atlas(self.digits))
        self.tokenizer = self.output / TOKENIZER
        write_folder(self.tokenizer, lambda folder: train_tokenizer(folder, self.config.text_encoder.vocab_size))

    def draw(
        self,
        seed: int,
        scenes: Scenes,
        bucket: Bucket,
        window: tuple[int, int, int] | None = None,
        atlas: jax.Array | None = None,
    ) -> jax.Array:
        """Videos of scenes: [N, F, H, W, 3], or windows of them."""
        atlas = self.atlas if atlas is None else atlas
        return render_batch(seed, scenes.as_dict(), atlas, frames=bucket.frames, size=bucket.size, window=window)

    @property
    def text_length(self) -> int:
        return self.config.denoiser.text_length

    def chunks(self, start: int) -> Generator[dict[str, np.ndarray], None, None]:
        return chunks(start, self.tokenizer, self.text_length, self.recipe.workers, self.recipe.chunk)

    def weights(self, name: str) -> Parameters:
        """Averaged weights of an earlier stage; raises InputError where there are none."""
        return {key: jnp.asarray(array) for key, array in read_shards(self.output, name).items()}

    def earlier(self, initial: Parameters, *names: str) -> Parameters:
        """`initial`, with the averaged weights that earlier calls left under these names in its stead.

        Raises InputError where they are of another model.
        """
        found = [name for name in names if find_shards(self.output, name)]
        for name in found:
            parameters = self.weights(name)
            for key, array in parameters.items():
                if key not in initial or initial[key].shape != array.shape:
                    raise InputError(f"{self.output}: {name} is of another model ({key} differs); use another output")
            initial = initial | parameters
        return initial

    def forget(self, name: str) -> None:
        """Removes what an earlier stage left."""
        for folder in (self.output, self.state):
            for path in (*find_shards(folder, name), folder / f"{name}.npz"):
                path.unlink(missing_ok=True)


def rate_factor(step: int, fraction: float, warmup: int = 200) -> float:
    """Of the full learning rate: up in a line over the first steps, level, and down to zero in the last half."""
    return min((step + 1) / warmup, 1.0) * min(1.0, 2 * (1 - fraction) + 0.01)


class Stage:
    """The loop of one stage: steps until its time is over, figures, and its state on disk.

    Args:
      run: what the stages share.
      name: of the stage and of its files.
      parameters: to start from, unless there is a state.
      rate: the full learning rate.
      optimizer: "adamw" or "muon".
      seconds: for this call, compiling included.
      export: makes of the averaged parameters what goes into the output, by file name.
    """

    def __init__(
        self,
        run: Run,
        name: str,
        parameters: Parameters,
        rate: float,
        optimizer: str,
        seconds: float,
        export: Callable[[Parameters], dict[str, Parameters]],
        ema_decay: float,
    ):
        self._run, self._name, self._rate, self._export = run, name, rate, export
        self._optimizer = make_optimizer(optimizer, rate)
        self._ema_decay = ema_decay
        self._start = time.perf_counter()
        self._seconds = seconds
        self._earlier = 0.0
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        parameters = {key: jax.device_put(value, place) for key, value in parameters.items()}
        self.state = init_state(parameters, self._optimizer, seed=run.seed, ema=True, replicated=place)
        path = run.state / f"{name}.npz"
        if path.exists():
            self._restore(path)
        self._first = self.step = self._logged_number = int(self.state.step)
        if self.step:
            run.log(name, continues_after_step=self.step, seconds=self._earlier)
        self._logged = self._saved = float("nan")  # set by the first step
        self._figures: dict[str, jax.Array] = {}

    def _restore(self, path: Path) -> None:
        leaves = named_leaves(self.state)
        with np.load(path) as file:
            differing = {
                name for name, leaf in leaves.items() if name not in file.files or file[name].shape != leaf.shape
            }
            if differing:
                raise InputError(
                    f"{path} is of another model or optimizer ({min(differing)} differs); choose another state"
                )
            self._earlier = float(file["seconds"])
            self.state = jax.tree.unflatten(
                jax.tree.structure(self.state), [jnp.asarray(file[leaf]) for leaf in leaves]
            )

    @property
    def fraction(self) -> float:
        """How much of all the time of this stage is over."""
        spent = time.perf_counter() - self._start
        left = max(self._seconds - spent, 0.0) + self._run.more
        done = self._earlier + spent
        over = done / (done + left) if done + left > 0 else 1.0
        return self._run.fraction_start + (1 - self._run.fraction_start) * over

    @property
    def goes_on(self) -> bool:
        """Until the time is over, and for one step at least."""
        return time.perf_counter() < self._start + self._seconds or self.step == self._first

    def make_step(self, loss: Loss) -> Step:
        # Trying Triton for each of Muon's many small products would take minutes.
        options = xla_flags.CUBLASLT_OPTIONS if jax.default_backend() == "gpu" else None
        step = make_step(loss, self._optimizer, self._ema_decay)

        def one(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
            return step(state, frozen, batch, 1.0)  # the rate is in the optimizer's state

        return jax.jit(one, donate_argnums=(0,), compiler_options=options)

    def loop(self, one_step: Callable[[TrainState, int], tuple[TrainState, dict[str, jax.Array]]]) -> TrainState:
        """Calls one_step(state, step) until the time is over; returns the last state, which is saved."""
        while self.goes_on:
            self.take(one_step)
        return self.finish()

    def take(self, one_step: Callable[[TrainState, int], tuple[TrainState, dict[str, jax.Array]]]) -> None:
        """One step; every now and then a line of the log, and the state to disk."""
        now, fraction = time.perf_counter(), self.fraction
        if self.step == self._first:
            self._logged = self._saved = now
        rate = self._rate * rate_factor(self.step, fraction)
        state = replace(self.state, optimizer=with_learning_rate(self.state.optimizer, rate))
        self.state, self._figures = one_step(state, self.step)
        self.step += 1
        # The device is at most a few steps behind, so that the time is kept.
        if self.step % 4 == 0:
            jax.block_until_ready(self._figures["loss"])
        if now - self._logged > 10:
            values = {name: float(value) for name, value in self._figures.items()}
            speed = (self.step - self._logged_number) / (time.perf_counter() - self._logged)
            self._run.log(self._name, step=self.step, fraction=fraction, steps_per_second=speed, **values)
            if not np.isfinite(values["loss"]):
                raise RuntimeError(f"stage {self._name}: the loss is not finite at step {self.step}")
            self._logged, self._logged_number = time.perf_counter(), self.step
        if now - self._saved > 100:
            self.save()
            self._saved = time.perf_counter()

    def finish(self) -> TrainState:
        figures = {name: float(value) for name, value in self._figures.items()}
        self._run.log(self._name, step=self.step, done=True, **figures)
        self.save()
        return self.state

    def save(self) -> None:
        seconds = self._earlier + time.perf_counter() - self._start
        arrays: dict[str, Any] = {name: np.asarray(leaf) for name, leaf in named_leaves(self.state).items()}
        write_arrays(self._run.state / f"{self._name}.npz", {"seconds": np.float64(seconds), **arrays})
        for name, parameters in self._export(self.state.ema).items():
            for folder in (self._run.output, self._run.state):
                write_shards(folder, name, parameters)
