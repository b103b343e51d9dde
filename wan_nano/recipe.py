"""How the nano model is trained: every number, in one place, and recipes whose keys are these fields.

config = nano_recipe()
config.vae_rate = 1e-3
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wan_jax.diffusion.params import DTYPES, check_name
from wan_jax.errors import InputError, unknown_name
from wan_jax.presets import get_preset
from wan_jax.training.config import OPTIMIZERS
from wan_nano.data import CHUNK

if TYPE_CHECKING:
    from ml_collections import ConfigDict

STAGES = ("text", "vae", "experts", "decoder")


@dataclass(frozen=True)
class Bucket:
    """Videos of one size that the experts learn, and how often."""

    frames: int
    size: tuple[int, int]
    batch: int
    capacity: int  # latents kept
    part: float  # of the steps


@dataclass(frozen=True)
class NanoOptions:
    """One run of the training: what to train, for how long, how, and where its files are. Numbers are for one H200."""

    output: str = "outputs/train_nano"  # tokenizer, averaged weights, stages.jsonl
    state: str | None = None  # folder with what goes on exactly, by stage; None: state/ in the output
    resume: str | None = None  # an earlier output, for files that this one lacks
    stages: str = "text=60,vae=400,experts=800"  # and how many seconds each
    experts: str = "all"  # which of them the stage "experts" trains: "all", "high_noise" or "low_noise"
    more: float = 0.0  # seconds that later calls will add to the last stage
    fraction_start: float = 0.0  # how much of a stage's schedule is over when it begins
    digits: str | None = None  # an .npz of digits instead of scikit-learn's
    seed: int = 0
    compute: str = "bfloat16"
    attention: str | None = "cudnn"  # None: the fastest that runs
    unroll: bool = True  # no loop over an expert's layers: less memory traffic, a longer compilation
    workers: int = 12
    chunk: int = CHUNK
    text_batch: int = 1024
    text_rate: float = 1e-3
    text_optimizer: str = "adamw"  # or "muon", as of the other stages
    text_capacity: int = 40 * CHUNK  # scenes whose captions are kept
    vae_batch: int = 3
    vae_rate: float = 1e-3
    vae_optimizer: str = "adamw"
    # Frames, width, height of the part that is drawn: a decoder that learned from fewer frames drifts after them.
    vae_window: tuple[int, int, int] = (33, 96, 96)
    decoder_rate: float = 5e-4  # the rest is the VAE's
    decoder_optimizer: str = "adamw"
    decoder_noise: float = 1.0  # on what it decodes, of the deviation that the encoder gives; the VAE learns with 1
    expert_rate: float = 2e-3
    expert_optimizer: str = "muon"
    fill: int = 64  # videos rendered and encoded at once
    fill_every: int = 8  # steps between that
    buckets: tuple[Bucket, ...] = (
        Bucket(33, (96, 96), 256, 96 * 1024, 0.91),
        Bucket(33, (128, 96), 192, 12 * 1024, 0.03),
        Bucket(17, (96, 128), 256, 12 * 1024, 0.03),
        Bucket(49, (96, 96), 160, 12 * 1024, 0.03),
    )
    first_fill: int = 8 * 1024  # videos in a replay buffer before it is learnt from
    metrics_every: int = 10  # steps between rows of figures

    def __post_init__(self):
        # A recipe's overrides are plain tuples.
        buckets = tuple(one if isinstance(one, Bucket) else Bucket(*one) for one in self.buckets)
        object.__setattr__(self, "buckets", buckets)
        check_name("compute dtype", self.compute, DTYPES)
        for stage in ("text", "vae", "decoder", "expert"):
            check_name(f"{stage}_optimizer", getattr(self, f"{stage}_optimizer"), OPTIMIZERS)
        parse_stages(self.stages)
        check_name("experts", self.experts, ("all", *get_preset("nano").experts))
        if not 0 <= self.fraction_start <= 1:
            raise InputError(f"fraction_start {self.fraction_start}: must be from 0 to 1")


# What differs on a CPU.
SMALL: dict[str, Any] = {
    "compute": "float32",
    "attention": None,
    "unroll": False,
    "workers": 0,
    "chunk": 256,
    "text_batch": 64,
    "text_capacity": 4096,
    "vae_batch": 4,
    "vae_window": (5, 32, 32),
    "fill": 4,
    "fill_every": 4,
    "buckets": (Bucket(33, (96, 96), 8, 512, 1.0),),
    "first_fill": 32,
    "metrics_every": 1,
}


def parse_stages(text: str) -> dict[str, float]:
    """Returns the seconds by stage of "text=60,vae=400"; raises InputError."""
    stages = {}
    for part in text.split(","):
        name, _, seconds = part.partition("=")
        if name not in STAGES:
            raise unknown_name("stage", name, STAGES)
        try:
            stages[name] = float(seconds)
        except ValueError:
            raise InputError(f"stage {part!r}: write NAME=SECONDS, for example vae=400") from None
    return stages


def nano_recipe(*, small: bool = False) -> "ConfigDict":
    """Returns all options at their defaults, or with what differs on a CPU; a misspelt key raises."""
    from wan_jax.cli.train import recipe_of

    return recipe_of(NanoOptions(**SMALL if small else {}))
