"""What one run does: the user's choices over the preset's defaults, checked before any work starts."""

import math
import re
from dataclasses import asdict, dataclass
from typing import Any

from wan_jax.config import WanConfig
from wan_jax.diffusion.schedule import Schedule, make_schedule
from wan_jax.errors import InputError, unknown_name

NOISES = ("jax", "torch")
DTYPES = ("bfloat16", "float32")
PROFILE_NAMES = ("auto", "resident", "swap", "stream")  # what the last three mean is in memory.py


@dataclass(frozen=True)
class Settings:
    """One run's resolved choices."""

    size: tuple[int, int]  # width, height in pixels
    frames: int
    fps: int
    steps: int
    guidance: tuple[float, float]  # low-noise expert, high-noise expert
    shift: float
    solver: str
    schedule: str
    seed: int
    noise: str
    negative_prompt: str

    @classmethod
    def resolve(
        cls,
        config: WanConfig,
        *,
        negative_prompt: str | None = None,
        size: tuple[int, int] | None = None,
        frames: int | None = None,
        steps: int | None = None,
        guidance: float | tuple[float, float] | None = None,
        shift: float | None = None,
        solver: str | None = None,
        schedule: str | None = None,
        seed: int = 0,
        noise: str = "jax",
    ) -> "Settings":
        """Takes the preset's value for every None; raises InputError naming the first choice that cannot be used."""
        preset = config.sampling
        low, high = _pair(preset.guidance if guidance is None else guidance)
        settings = cls(
            size=_integers("size", preset.size if size is None else size),
            frames=_integer("frames", preset.frames if frames is None else frames),
            fps=preset.fps,
            steps=_integer("steps", preset.steps if steps is None else steps),
            guidance=(low, high),
            shift=float(preset.shift if shift is None else shift),
            solver=preset.solver if solver is None else solver,
            schedule=preset.schedule if schedule is None else schedule,
            seed=_integer("seed", seed),
            noise=noise,
            negative_prompt=preset.negative_prompt if negative_prompt is None else negative_prompt,
        )
        settings._check(config)
        return settings

    def _check(self, config: WanConfig) -> None:
        for axis, pixels, multiple in zip(("width", "height"), self.size, config.size_multiple[::-1], strict=True):
            if pixels <= 0 or pixels % multiple:
                raise InputError(
                    f"size {self.size[0]}x{self.size[1]}: the {axis} must be a multiple of {multiple}; "
                    f"use {_nearest_multiple(pixels, multiple)}"
                )
        stride = config.vae.temporal_stride
        if self.frames < 1 or (self.frames - 1) % stride:
            below = max(1, (self.frames - 1) // stride * stride + 1)
            raise InputError(f"frames {self.frames}: must be {stride}n + 1; use {below} or {below + stride}")
        if not all(map(math.isfinite, self.guidance)):
            raise InputError(f"guidance {self.guidance}: must be finite numbers")
        if self.seed < 0:
            raise InputError(f"seed {self.seed}: must not be negative")
        check_name("noise", self.noise, NOISES)
        self.make_schedule()

    def make_schedule(self) -> Schedule:
        """The run's sigmas and timesteps; raises InputError for unknown names, steps or shift out of range."""
        return make_schedule(self.schedule, self.solver, self.steps, self.shift)

    def latents_shape(self, config: WanConfig) -> tuple[int, int, int, int]:
        """(C, F', h, w) of one video's latents."""
        width, height = self.size
        stride = config.vae.spatial_stride
        return (
            config.vae.z_dim,
            (self.frames - 1) // config.vae.temporal_stride + 1,
            height // stride,
            width // stride,
        )

    def check_latents(self, shape: tuple[int, ...], config: WanConfig, batch: int) -> None:
        """Raises InputError unless `shape` is that of one video's latents, or of a batch of them."""
        needed = self.latents_shape(config)
        if tuple(shape) not in (needed, (batch, *needed)):
            raise InputError(
                f"latents have shape {tuple(shape)}; {self.size[0]}x{self.size[1]} with {self.frames} frames "
                f"needs {needed}"
            )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def check_name(what: str, name: str, known: tuple[str, ...]) -> None:
    """Raises InputError, suggesting the nearest known name, unless `name` is known."""
    if name not in known:
        raise unknown_name(what, name, known)


def parse_size(text: str) -> tuple[int, int]:
    """ "1280x720" or "1280*720" -> (1280, 720), width first."""
    match = re.fullmatch(r"\s*(\d+)\s*[xX*]\s*(\d+)\s*", text)
    if not match:
        raise InputError(f"size {text!r}: write WIDTHxHEIGHT, for example 1280x720")
    return int(match[1]), int(match[2])


def parse_guidance(text: str) -> float | tuple[float, float]:
    """ "3.5" -> 3.5; "3,4" -> (3.0, 4.0), the low-noise expert's first."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) == 1:
        return numbers[0]
    if len(numbers) == 2:
        return numbers[0], numbers[1]
    raise InputError(f"guidance {text!r}: write one number, or LOW,HIGH for the low-noise and the high-noise expert")


def _pair(guidance: float | tuple[float, float]) -> tuple[float, float]:
    if isinstance(guidance, (int, float)):
        return float(guidance), float(guidance)
    if len(guidance) != 2:
        raise InputError(f"guidance {guidance}: give one number, or a pair (low-noise expert, high-noise expert)")
    low, high = guidance
    return float(low), float(high)


def _integer(what: str, value: Any) -> int:
    if isinstance(value, bool) or int(value) != value:
        raise InputError(f"{what} {value!r}: must be a whole number")
    return int(value)


def _integers(what: str, values: Any) -> tuple[int, int]:
    if len(values) != 2:
        raise InputError(f"{what} {values!r}: give (width, height)")
    width, height = (_integer(what, value) for value in values)
    return width, height


def _nearest_multiple(pixels: int, multiple: int) -> str:
    below = pixels // multiple * multiple
    return f"{below} or {below + multiple}" if below > 0 else str(multiple)
