"""The options of a training run, as frozen dataclasses that hold every default; recipes set what differs."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from wan_jax.diffusion.params import DTYPES, check_name
from wan_jax.errors import InputError, unknown_name
from wan_jax.fields import rate
from wan_jax.lora.export import Style
from wan_jax.models.nn.stacked_layers import REMAT_POLICIES

# What numbers may be; NaN is nothing of these.
KINDS: dict[str, Callable[[float], bool]] = {
    "at least 1": lambda x: 1 <= x < math.inf,
    "at least 0": lambda x: 0 <= x < math.inf,
    "above 0": lambda x: 0 < x < math.inf,
    "between 0 and 1": lambda x: 0 <= x <= 1,
    "at least 0 and below 1": lambda x: 0 <= x < 1,
    "above 0 and below 1": lambda x: 0 < x < 1,
    "finite": math.isfinite,
}


def check_numbers(options: Any, **kinds: str) -> None:
    """Raises InputError unless the fields of a dataclass that have a value are of these kinds."""
    for name, kind in kinds.items():
        value = vars(options)[name]
        if value is not None and (isinstance(value, bool) or not KINDS[kind](value)):
            raise InputError(f"{name} {value}: must be {kind}")


EXPERTS = ("all", "high_noise", "low_noise")
WEIGHTS = ("ema", "raw")
DISTRIBUTIONS = ("uniform", "logit-normal")
OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "constant", "wsd")


@dataclass(frozen=True)
class OptimizerConfig:
    """How parameters follow their gradients."""

    name: str = "adamw"  # or "muon": for the kernels inside a model, with AdamW for the rest
    learning_rate: float = 1e-4
    # After the warm-up: "cosine", "constant", or "wsd" (warmup-stable-decay), which falls in a line from half-time.
    schedule: str = "cosine"
    warmup_steps: int = 100
    final_fraction: float = 0.1  # of the learning rate, at the end of "cosine" and "wsd"
    beta_1: float = 0.9  # of AdamW
    beta_2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 1.0  # gradients longer than this, over all parameters, are shortened to it

    def __post_init__(self):
        check_name("optimizer", self.name, OPTIMIZERS)
        check_name("learning rate schedule", self.schedule, SCHEDULES)
        check_numbers(self, learning_rate="above 0", warmup_steps="at least 0", final_fraction="between 0 and 1")
        check_numbers(self, beta_1="at least 0 and below 1", beta_2="at least 0 and below 1", eps="above 0")
        check_numbers(self, weight_decay="at least 0", clip_norm="above 0")


@dataclass(frozen=True)
class TrainerConfig:
    """How long, how, and what is kept."""

    steps: int = 1000
    # Length in seconds, compiling included, instead of steps. `log_every` and `save_every` are then seconds, too.
    seconds: float | None = None
    later_seconds: float = 0.0  # that later calls will train: the schedule counts them
    start_fraction: float = 0.0  # of the schedule that is over when a run of `seconds` begins
    accumulation: int = 1  # microbatches of a step, one after the other
    seed: int = 0
    ema_decay: float | None = 0.999  # None: no moving average
    metrics_every: int = 1  # steps between rows of figures
    log_every: int = 10  # steps between progress lines
    save_every: int = 500  # steps between checkpoints; there is one at the end in any case
    keep_last: int = 2  # checkpoints kept
    keep_every: int | None = None  # steps between checkpoints that are kept for good
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self):
        counts = ("steps", "accumulation", "metrics_every", "log_every", "save_every", "keep_last", "keep_every")
        check_numbers(self, **dict.fromkeys(counts, "at least 1"), seed="at least 0", ema_decay="between 0 and 1")
        check_numbers(self, seconds="at least 0", later_seconds="at least 0", start_fraction="between 0 and 1")
        if self.seed >= 2**32:
            raise InputError(f"seed {self.seed}: must be below 2**32")
        if self.seconds is None and self.optimizer.warmup_steps >= self.steps:
            raise InputError(
                f"warmup_steps {self.optimizer.warmup_steps}: must be less than the {self.steps} steps of the run"
            )


@dataclass(frozen=True)
class NoiseConfig:
    """Which noise levels are trained, and how often the caption is left out."""

    distribution: str = "uniform"  # of sigma before the shift: "uniform" or "logit-normal"
    logit_mean: float = 0.0  # of "logit-normal"
    logit_std: float = 1.0
    shift: float | None = None  # None: the model's own
    caption_dropout: float = 0.1  # share of examples with the empty prompt, which guidance needs
    high_noise_share: float | None = None  # of a batch, where both experts train; None: as the sigmas fall

    def __post_init__(self):
        if self.distribution not in DISTRIBUTIONS:
            raise unknown_name("distribution of noise levels", self.distribution, DISTRIBUTIONS)
        check_numbers(
            self, logit_mean="finite", logit_std="above 0", shift="above 0", caption_dropout="between 0 and 1"
        )
        check_numbers(self, high_noise_share="above 0 and below 1")


@dataclass(frozen=True)
class LoraConfig:
    """What is trained beside a frozen model (Hu et al., arXiv 2106.09685)."""

    rank: int = 0  # 0: no adapters, the model itself is trained
    alpha: float | None = None  # the change is scaled by alpha / rank; None: rank
    # Patterns (as of files) of the names of Linears, separated by commas.
    targets: str = "blocks.*attention.*,blocks.feed_forward.*"

    def __post_init__(self):
        check_numbers(self, rank="at least 0", alpha="above 0")

    @property
    def scale(self) -> float | None:
        """alpha / rank; None where there is no LoRA."""
        if self.rank == 0:
            return None
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclass(frozen=True)
class DataConfig:
    """What is trained on."""

    folder: str = "videos"
    metadata: str | None = None  # .jsonl or .csv; None: metadata.jsonl or metadata.csv in the folder
    buckets: str = "832x480x33"  # WIDTHxHEIGHTxFRAMES, separated by commas; a video takes the nearest in shape
    batch_size: int = 1  # of a step, all microbatches and devices together
    fps: float | None = None  # None: the model's own
    cache: str | None = None  # folder for latents and texts; None: cache/ in the run's

    def __post_init__(self):
        check_numbers(self, batch_size="at least 1")
        if self.fps is not None:
            rate("fps", self.fps)


@dataclass(frozen=True)
class SamplesConfig:
    """Videos made while training goes on."""

    every: int | None = None  # steps between them; None: none are made
    prompts: tuple[str, ...] = ()
    size: str | None = None  # WIDTHxHEIGHT; None: the preset's, as all the rest
    frames: int | None = None
    steps: int | None = None
    seed: int = 0

    def __post_init__(self):
        check_numbers(self, every="at least 1")
        if self.every is not None and not self.prompts:
            raise InputError("samples.every is set and samples.prompts is empty; give prompts")
        if not all(isinstance(prompt, str) and prompt.strip() for prompt in self.prompts):
            raise InputError(f"samples.prompts {self.prompts}: must be texts")


@dataclass(frozen=True)
class ExportConfig:
    """What the run leaves when it is done."""

    weights: str = "ema"  # "ema": the moving average; "raw": the last step's
    dtype: str = "bfloat16"  # of the checkpoint
    # Of a LoRA: the styles of its files, separated by commas, and whether to write a merged checkpoint too.
    lora_styles: str = "diffusers,comfyui"
    merged: bool = False

    def __post_init__(self):
        check_name("export weights", self.weights, WEIGHTS)
        check_name("export dtype", self.dtype, DTYPES)
        for style in self.styles:
            check_name("style of LoRA files", style, get_args(Style))

    @property
    def styles(self) -> list[str]:
        return [style.strip() for style in self.lora_styles.split(",")]


@dataclass(frozen=True)
class TrainOptions:
    """One run of `wan-jax train`."""

    checkpoint: str | None = None  # folder or hub id of the model to start from; None: the small model of the package
    output: str = "outputs/train"  # the run's folder; a run that is there goes on
    experts: str = "all"  # "all", or of a model with two: "high_noise" or "low_noise"
    dtype: str = "bfloat16"  # of products; parameters that are trained are float32
    remat: str | None = "attention"  # "layer", "attention" (faster, a little more memory), or None
    mesh: str = "single"  # devices to train on, such as data2-fsdp4; any axes but cfg and experts
    export_only: bool = False  # do not train: export the last checkpoint
    quiet: bool = False
    data: DataConfig = field(default_factory=DataConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    export: ExportConfig = field(default_factory=ExportConfig)

    def __post_init__(self):
        check_name("experts", self.experts, EXPERTS)
        check_name("dtype", self.dtype, DTYPES)
        if self.remat is not None:
            check_name("remat", self.remat, tuple(REMAT_POLICIES))
        if self.data.batch_size % self.trainer.accumulation:
            parts = f"accumulation {self.trainer.accumulation}"
            raise InputError(f"batch_size {self.data.batch_size} does not split into {parts}; use a multiple of it")


# May differ when a run goes on: they change where it runs and what is shown and kept, not what is trained.
CHANGEABLE = (
    *("output", "quiet", "export_only", "mesh", "samples", "export", "data.cache"),
    *("trainer.log_every", "trainer.save_every", "trainer.keep_last", "trainer.keep_every"),
)


def check_same_run(before: Mapping[str, Any], now: Mapping[str, Any], place: str) -> None:
    """Raises InputError, naming the first, where options of a run that goes on differ in what they train.

    Both are nested mappings; `before` comes from JSON. An option that it lacks is newer than it: it had its default.
    """
    old, new = flat(dataclasses.asdict(TrainOptions())) | flat(before), flat(now)
    for name in sorted(old.keys() | new.keys()):
        value = list(new[name]) if isinstance(new.get(name), tuple) else new.get(name)
        if old.get(name) != value and not name.startswith(CHANGEABLE):
            raise InputError(
                f"{place}: {name} was {old.get(name)!r} when this run began and is {value!r} now; "
                "set it back, or choose another output"
            )


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"trainer": {"steps": 3}} -> {"trainer.steps": 3}."""
    pairs: dict[str, Any] = {}
    for name, value in values.items():
        pairs |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return pairs
