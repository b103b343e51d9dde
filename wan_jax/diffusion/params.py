"""What one run does: the user's choices over the preset's defaults, checked before any work starts."""

import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from typing import Any, TypeVar

from wan_jax.config import WanConfig
from wan_jax.diffusion.experts import as_pair, by_expert
from wan_jax.diffusion.schedule import Schedule, make_schedule
from wan_jax.errors import InputError, unknown_name

NOISES = ("jax", "torch")
DTYPES = ("bfloat16", "float32")
PROFILE_NAMES = ("auto", "resident", "swap", "stream")  # what the last three mean is in memory.py

T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """One run's resolved choices."""

    size: tuple[int, int]  # width, height in pixels
    frames: int
    fps: int
    steps: int | tuple[int, int]  # a pair, here and below: low-noise expert, high-noise expert
    guidance: tuple[float, float]
    shift: float
    boundary: float | None
    solver: str | tuple[str, str]
    schedule: str | tuple[str, str]
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
        steps: int | tuple[int, int] | None = None,
        guidance: float | tuple[float, float] | None = None,
        shift: float | None = None,
        solver: str | tuple[str, str] | None = None,
        schedule: str | tuple[str, str] | None = None,
        seed: int = 0,
        noise: str = "jax",
    ) -> "Settings":
        """Takes the preset's value for every None; raises InputError naming the first choice that cannot be used."""
        preset = config.sampling
        low, high = as_pair(_choice("guidance", preset.guidance if guidance is None else guidance, _number))
        settings = cls(
            size=_integers("size", preset.size if size is None else size),
            frames=_integer("frames", preset.frames if frames is None else frames),
            fps=preset.fps,
            steps=_choice("steps", preset.steps if steps is None else steps, _integer),
            guidance=(low, high),
            shift=_number("shift", preset.shift if shift is None else shift),
            boundary=preset.boundary,
            solver=_same(_choice("solver", preset.solver if solver is None else solver, _name)),
            schedule=_same(_choice("schedule", preset.schedule if schedule is None else schedule, _name)),
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
        if self.seed < 0:
            raise InputError(f"seed {self.seed}: must not be negative")
        check_name("noise", self.noise, NOISES)
        if not all(map(math.isfinite, self.guidance)):
            raise InputError(f"guidance {self.guidance}: must be finite numbers")
        by_expert("guidance", self.guidance, config.experts)
        by_expert("solver", self.solver, config.experts)
        by_expert("schedule", self.schedule, config.experts)
        if isinstance(self.steps, tuple) and self.boundary is None:
            low, high = self.steps
            raise InputError(f"steps {low},{high} are for two experts but the model has one; give one number")
        self.make_schedule()

    def make_schedule(self) -> Schedule:
        """The run's sigmas and timesteps; raises InputError for unknown names, steps or shift out of range."""
        return make_schedule(self.schedule, self.solver, self.steps, self.shift, self.boundary)

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
    return _parse("guidance", text, float, "number")


def parse_steps(text: str) -> int | tuple[int, int]:
    """ "40" -> 40; "4,2" -> (4, 2), the low-noise expert's first."""
    return _parse("steps", text, int, "whole number")


def parse_names(what: str, text: str) -> str | tuple[str, str]:
    """ "unipc" -> "unipc"; "euler,unipc" -> ("euler", "unipc"), the low-noise expert's first."""
    return _parse(what, text, str.strip, "name")


def _parse(what: str, text: str, convert: Callable[[str], T], kind: str) -> T | tuple[T, T]:
    try:
        values = [convert(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) == 1:
        return values[0]
    if len(values) == 2:
        return values[0], values[1]
    raise InputError(f"{what} {text!r}: write one {kind}, or LOW,HIGH for the low-noise and the high-noise expert")


def _choice(what: str, value: Any, convert: Callable[[str, Any], T]) -> T | tuple[T, T]:
    """One value, or a pair of them, converted."""
    if not isinstance(value, (tuple, list)):
        return convert(what, value)
    if len(value) != 2:
        raise InputError(f"{what} {value}: give one value, or a pair (low-noise expert, high-noise expert)")
    low, high = value
    return convert(what, low), convert(what, high)


def _same(choice: Any) -> Any:
    """A pair of equal names is that name."""
    return choice[0] if isinstance(choice, tuple) and choice[0] == choice[1] else choice


def _name(what: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InputError(f"{what} {value!r}: must be a name")
    return value


def _number(what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InputError(f"{what} {value!r}: must be a number")
    return float(value)


def _integer(what: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (Integral, float)) or not float(value).is_integer():
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
