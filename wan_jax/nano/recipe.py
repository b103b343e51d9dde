"""How the nano model is trained: every number, in one place."""

from dataclasses import dataclass

from wan_jax.errors import InputError, unknown_name
from wan_jax.nano.data import CHUNK
from wan_jax.nano.optimizer import OPTIMIZERS
from wan_jax.settings import DTYPES, check_name

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
class Recipe:
    """How the nano model is trained. The defaults are for one H200."""

    compute: str = "bfloat16"
    attention: str | None = None
    workers: int = 12
    chunk: int = CHUNK
    text_batch: int = 1024
    text_rate: float = 1e-3
    text_optimizer: str = "adamw"  # or "muon", as of the other stages
    text_capacity: int = 40 * CHUNK  # scenes whose captions are kept
    vae_batch: int = 32
    vae_rate: float = 6e-4
    vae_optimizer: str = "adamw"
    vae_window: tuple[int, int, int] = (17, 64, 64)
    vae_whole_part: float = 0.3  # of the time at the end: whole videos
    vae_whole_batch: int = 8
    decoder_rate: float = 3e-4  # the rest is the VAE's
    decoder_optimizer: str = "adamw"
    decoder_noise: float = 1.0  # on what it decodes, of the deviation that the encoder gives; the VAE learns with 1
    expert_rate: float = 8e-4
    expert_optimizer: str = "adamw"
    fill: int = 64  # videos rendered and encoded at once
    fill_every: int = 8  # steps between that
    buckets: tuple[Bucket, ...] = (
        Bucket(33, (96, 96), 256, 96 * 1024, 0.82),
        Bucket(33, (128, 96), 192, 12 * 1024, 0.06),
        Bucket(17, (96, 128), 256, 12 * 1024, 0.06),
        Bucket(49, (96, 96), 160, 12 * 1024, 0.06),
    )
    first_fill: int = 8 * 1024  # videos in a pool before it is learnt from

    def __post_init__(self):
        check_name("compute dtype", self.compute, DTYPES)
        for stage in ("text", "vae", "decoder", "expert"):
            check_name(f"{stage}_optimizer", getattr(self, f"{stage}_optimizer"), OPTIMIZERS)


SMALL = Recipe(
    compute="float32",
    workers=0,
    chunk=256,
    text_batch=64,
    text_capacity=4096,
    vae_batch=4,
    vae_window=(5, 32, 32),
    vae_whole_part=0.0,
    fill=4,
    fill_every=4,
    buckets=(Bucket(33, (96, 96), 8, 512, 1.0),),
    first_fill=32,
)


def parse_stages(text: str) -> dict[str, float]:
    """ "text=60,vae=400" -> seconds by stage; raises InputError."""
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
