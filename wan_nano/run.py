"""One training run of the nano model: its options and files, and the trainers of its stages."""

import itertools
import json
import shutil
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wan_jax.config import WanConfig
from wan_jax.errors import InputError
from wan_jax.parallel.placement import SINGLE
from wan_jax.presets import get_preset
from wan_jax.runtime import xla_flags
from wan_jax.training.config import OptimizerConfig, TrainerConfig
from wan_jax.training.metrics import read_metrics
from wan_jax.training.step import Loss, TrainState
from wan_jax.training.trainer import Batches, Every, Trainer, show_line
from wan_nano.data import chunks, train_tokenizer
from wan_nano.digits import digit_atlas
from wan_nano.files import TOKENIZER, copy_missing, load_weights, save_weights, weights_file, write_folder
from wan_nano.recipe import Bucket, NanoOptions
from wan_nano.render import render_batch
from wan_nano.scenes import Scenes

Parameters = dict[str, jax.Array]
STAGES_LOG = "stages.jsonl"  # one line for each stage that a call trained


@dataclass
class NanoRun:
    """What the stages share."""

    options: NanoOptions
    config: WanConfig = field(default_factory=lambda: get_preset("nano"))
    later_seconds: float = 0.0  # that later calls will add to the stage

    def __post_init__(self):
        self.output = Path(self.options.output)
        self.state = self.output / "state" if self.options.state is None else Path(self.options.state)
        self.output.mkdir(parents=True, exist_ok=True)
        if self.options.resume is not None:
            copy_missing(Path(self.options.resume), self.output)
        self.atlas = jnp.asarray(digit_atlas(self.options.digits))
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
        """Draws videos of scenes, [N, F, H, W, 3], or windows of them."""
        atlas = self.atlas if atlas is None else atlas
        return render_batch(seed, scenes.as_dict(), atlas, frames=bucket.frames, size=bucket.size, window=window)

    def chunks(self, start: int) -> Generator[dict[str, np.ndarray], None, None]:
        """Scenes with captions, without end; see `data.chunks`."""
        options = self.options
        return chunks(start, self.tokenizer, self.config.denoiser.text_length, options.workers, options.chunk)

    def weights(self, name: str) -> Parameters:
        """Averaged weights of an earlier stage; raises InputError where there are none."""
        return {key: jnp.asarray(array) for key, array in load_weights(self.output, name).items()}

    def initial(self, parameters: Parameters, *names: str) -> Parameters:
        """The parameters, replaced by the averaged weights that earlier calls left under these names.

        Raises InputError where those are of another model.
        """
        for name in names:
            if weights_file(self.output, name).exists():
                earlier = self.weights(name)
                for key, array in earlier.items():
                    if key not in parameters or parameters[key].shape != array.shape:
                        raise InputError(f"{self.output}: {name} is of another model ({key}); use another output")
                parameters = parameters | earlier
        return parameters

    def forget(self, name: str) -> None:
        """Removes what an earlier stage left."""
        weights_file(self.output, name).unlink(missing_ok=True)
        shutil.rmtree(self.state / name, ignore_errors=True)

    def trainer(
        self,
        stage: str,
        loss: Loss,
        parameters: Parameters,
        batches: Batches,
        export: Callable[[Parameters], Mapping[str, Parameters]],
        *,
        seconds: float,
        rate: float,
        optimizer: str,
        ema_decay: float = 0.999,
        frozen: Any = None,
        same_step: Trainer | None = None,
    ) -> Trainer:
        """Makes the trainer of a stage, which goes on from the stage's state if there is one.

        `export` makes of the averaged parameters what goes into the output, by file name.
        """
        config = TrainerConfig(
            seconds=seconds,
            later_seconds=self.later_seconds,
            start_fraction=self.options.fraction_start,
            seed=self.options.seed,
            ema_decay=ema_decay,
            metrics_every=self.options.metrics_every,
            log_every=10,
            save_every=100,
            keep_last=1,
            optimizer=OptimizerConfig(
                optimizer, rate, schedule="wsd", warmup_steps=199, final_fraction=0.01, beta_2=0.98
            ),
        )

        def save(step: int, state: TrainState) -> None:
            for name, arrays in export(state.ema).items():
                save_weights(self.output, name, arrays)

        return Trainer(
            loss,
            SINGLE.put(parameters),
            batches,
            config,
            self.state / stage,
            frozen=frozen,
            intervals=[Every(config.save_every, save)],
            # Trying Triton for each of Muon's many small products would take minutes.
            compiler_options=xla_flags.CUBLASLT_OPTIONS if jax.default_backend() == "gpu" else None,
            same_step=same_step,
            show=lambda line: show_line(f"{stage}: {line}"),
        )

    def train(self, trainers: Mapping[str, Trainer], evaluate: Callable[[Trainer], dict[str, float]] | None = None):
        """Trains stages side by side, in turns, and records what they took and reached."""
        before = {stage: trainer.step for stage, trainer in trainers.items()}
        for _ in itertools.zip_longest(*(trainer.steps() for trainer in trainers.values())):
            pass
        for stage, trainer in trainers.items():
            figures = {**read_metrics(trainer.folder)[-1], **({} if evaluate is None else evaluate(trainer))}
            taken = {"steps": trainer.step - before[stage], "seconds": trainer.seconds}
            row = {"stage": stage, **{name: float(f"{value:.5g}") for name, value in (taken | figures).items()}}
            with (self.output / STAGES_LOG).open("a") as file:
                file.write(json.dumps(row) + "\n")
            show_line("  ".join(f"{name} {value}" for name, value in row.items()))
