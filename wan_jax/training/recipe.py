"""What a training run can be told: frozen dataclasses that hold every default, and recipes whose keys are their fields.

A recipe is a Python file with `get_config()` that takes `train_recipe()` and sets what differs:

    config = train_recipe()
    config.data.folder = "videos"
    config.lora.rank = 32
"""

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ml_collections import ConfigDict, config_dict

from wan_jax.cli.recipes import read_config
from wan_jax.diffusion.params import DTYPES, check_name
from wan_jax.errors import InputError, unknown_name
from wan_jax.models.nn.layers import REMAT_POLICIES
from wan_jax.training.adapters import LoraConfig
from wan_jax.training.denoiser_loss import NoiseConfig
from wan_jax.training.trainer import TrainerConfig

EXPERTS = ("all", "high_noise", "low_noise")
WEIGHTS = ("ema", "raw")


@dataclass(frozen=True)
class DataConfig:
    """What is trained on."""

    folder: str = "videos"
    metadata: str | None = None  # .jsonl or .csv; None: metadata.jsonl or metadata.csv in the folder
    buckets: str = "832x480x33"  # WIDTHxHEIGHTxFRAMES, separated by commas; a video takes the nearest in shape
    batch_size: int = 1  # of a step, all microbatches and devices together
    fps: float | None = None  # None: the model's own
    cache: str | None = None  # folder for latents and texts; None: cache/ in the run's


@dataclass(frozen=True)
class SamplesConfig:
    """Videos made while training goes on."""

    every: int | None = None  # steps between them; None: none are made
    prompts: tuple[str, ...] = ()
    size: str | None = None  # WIDTHxHEIGHT; None: the preset's, as all the rest
    frames: int | None = None
    steps: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class ExportConfig:
    """What the run leaves when it is done."""

    weights: str = "ema"  # "ema": the moving average; "raw": the last step's
    dtype: str = "bfloat16"  # of the checkpoint
    # Of a LoRA: the styles of its files, separated by commas, and whether to write a merged checkpoint too.
    lora_styles: str = "diffusers,comfyui"
    merged: bool = False


@dataclass(frozen=True)
class TrainOptions:
    """One run of `wan-jax train`."""

    checkpoint: str | None = None  # folder or hub id of the model to start from; None: the small model of the package
    output: str = "outputs/train"  # the run's folder; a run that is there goes on
    experts: str = "all"  # "all", or of a model with two: "high_noise" or "low_noise"
    dtype: str = "bfloat16"  # of products; parameters that are trained are float32
    remat: str | None = "attention"  # "layer", "attention" (faster, a little more memory), or None
    mesh: str = "single"  # devices to spread over, such as data2-fsdp4
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
        check_name("export dtype", self.export.dtype, DTYPES)
        check_name("export weights", self.export.weights, WEIGHTS)
        if self.remat is not None:
            check_name("remat", self.remat, tuple(REMAT_POLICIES))
        if self.data.batch_size < 1 or (self.samples.every is not None and self.samples.every < 1):
            raise InputError("data.batch_size and samples.every: must be at least 1")
        if self.samples.every is not None and not self.samples.prompts:
            raise InputError("samples.every is set and samples.prompts is empty; give prompts")


# May differ when a run goes on: they change what is shown and kept, not what is trained.
CHANGEABLE = (
    *("output", "quiet", "export_only", "samples", "export", "data.cache"),
    *("trainer.log_every", "trainer.save_every", "trainer.keep_last", "trainer.keep_every"),
)


def train_recipe() -> ConfigDict:
    """All options of a training run at their defaults; unknown keys are refused, with the nearest known one named."""
    return config_of(TrainOptions())


def load_train_recipe(arguments: Sequence[str], kinds: Sequence[type] = (TrainOptions,)) -> Any:
    """`["--config", "configs/x.py", "--config.trainer.steps=30"]` -> the options of the run.

    They are of that one of `kinds`, dataclasses whose fields have defaults, whose keys the recipe has.

    Raises:
        InputError: no recipe is named, it does not exist, a key is misspelt, or a value has the wrong type.
    """

    def make_one(values: Mapping[str, Any]) -> Any:
        keys = {kind: {item.name for item in dataclasses.fields(kind)} for kind in kinds}
        return make(next((kind for kind in kinds if keys[kind] == set(values)), kinds[0]), values)

    names = [name for kind in kinds for name in flat(dataclasses.asdict(kind()))]
    return read_config("train", arguments, [part for name in names for part in name.split(".")], make_one)


def make(kind: type, values: Mapping[str, Any]) -> Any:
    """A dataclass from nested mappings; raises InputError for an unknown key."""
    fields = {item.name: item for item in dataclasses.fields(kind)}
    arguments = {}
    for name, value in values.items():
        if name not in fields:
            raise unknown_name("key", name, fields)
        section = fields[name].type
        arguments[name] = make(section, value) if dataclasses.is_dataclass(section) else value  # type: ignore[arg-type]
    return kind(**arguments)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"trainer": {"steps": 3}} -> {"trainer.steps": 3}."""
    pairs: dict[str, Any] = {}
    for name, value in values.items():
        pairs |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return pairs


def check_same_run(before: Mapping[str, Any], now: Mapping[str, Any], place: str) -> None:
    """Raises InputError, naming the first, where options of a run that goes on differ in what they train.

    Both are nested mappings; `before` comes from JSON.
    """
    old, new = flat(before), flat(now)
    for name in sorted(old.keys() | new.keys()):
        value = list(new[name]) if isinstance(new.get(name), tuple) else new.get(name)
        if old.get(name) != value and not name.startswith(CHANGEABLE):
            raise InputError(
                f"{place}: {name} was {old.get(name)!r} when this run began and is {value!r} now; "
                "set it back, or choose another output"
            )


def config_of(options: Any) -> ConfigDict:
    """A recipe whose keys are the fields of a dataclass, at its values; unknown keys are refused."""
    config = ConfigDict()
    for item in dataclasses.fields(options):
        value = getattr(options, item.name)
        if dataclasses.is_dataclass(value):
            config[item.name] = config_of(value)
        elif value is None:
            config[item.name] = config_dict.placeholder(_not_none(item.type))
        else:
            config[item.name] = value
    return config.lock()


def _not_none(kind: Any) -> type:
    """`int | None` -> int."""
    (other,) = [option for option in typing.get_args(kind) if option is not types.NoneType]
    return other
