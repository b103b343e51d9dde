"""Noise levels and timesteps of a sampling run, as host arrays.

Flow matching: x_sigma = (1 - sigma) * x_0 + sigma * noise, with sigma falling from about 1 to 0. The original programs
differ in the end points of the grid before the shift, and in what they show the model as the timestep; a model's
results follow the program it is compared with, so one's sigmas never go with another's timesteps.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral

import numpy as np

from wan_jax.errors import InputError, unknown_name

TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True, eq=False)
class Schedule:
    """The grid of one run of n steps; step i goes from sigmas[i] to sigmas[i + 1]."""

    sigmas: np.ndarray  # [n + 1] float32, strictly falling, the last is 0
    timesteps: np.ndarray  # [n] float32, what the model sees: about 1000 * sigma

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)


def make_schedule(kind: str, solver: str, steps: int, shift: float) -> Schedule:
    """Makes the grid that program `kind` uses with `solver`.

    Args:
        kind: "official" (Wan-Video/Wan2.2), "diffusers", or "lightx2v" (the 4-step distilled models; Euler only).
        solver: "unipc", "dpm++" or "euler".
        steps: number of steps n, at least 1.
        shift: s > 0 in sigma' = s * sigma / (1 + (s - 1) * sigma); larger means more steps at high noise.

    Raises:
        InputError: an unknown name, steps or shift out of range, or steps too fine for float32.
    """
    if kind not in GRIDS:
        raise unknown_name("schedule", kind, GRIDS)
    if solver not in GRIDS[kind]:
        raise unknown_name(f"solver for schedule {kind!r}:", solver, GRIDS[kind])
    if not isinstance(steps, Integral) or steps < 1:
        raise InputError(f"steps is {steps!r}; give a whole number of at least 1")
    if not (math.isfinite(shift) and shift > 0):
        raise InputError(f"shift is {shift}; give a number above 0 (presets have 5 to 12)")
    sigmas, timesteps = GRIDS[kind][solver](int(steps), float(shift))
    sigmas = np.append(sigmas, 0.0).astype(np.float32)
    if np.any(np.diff(sigmas) >= 0):
        raise InputError(f"{steps} steps with shift {shift:g} repeat a sigma in float32; use fewer steps or less shift")
    return Schedule(sigmas, timesteps.astype(np.float32))


def shift_sigmas(sigmas, shift: float):
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def _truncate_timesteps(sigmas: np.ndarray) -> np.ndarray:
    """Whole timesteps from float64 sigmas: cut, not rounded, and before sigmas are rounded to float32."""
    return np.trunc(sigmas * TRAIN_TIMESTEPS)


def _official_unipc(steps: int, shift: float) -> tuple[np.ndarray, np.ndarray]:
    """wan/utils/fm_solvers_unipc.py; its largest sigma went through float32."""
    sigmas = shift_sigmas(np.linspace(float(np.float32(0.999)), 0.0, steps + 1)[:-1], shift)
    return sigmas, _truncate_timesteps(sigmas)


def _official_dpm(steps: int, shift: float) -> tuple[np.ndarray, np.ndarray]:
    """wan/utils/fm_solvers.py, get_sampling_sigmas; starts at exactly 1."""
    sigmas = shift_sigmas(np.linspace(1.0, 0.0, steps + 1)[:-1], shift)
    return sigmas, _truncate_timesteps(sigmas)


def _diffusers_unipc(steps: int, shift: float) -> tuple[np.ndarray, np.ndarray]:
    """UniPCMultistepScheduler(use_flow_sigmas=True); keeps the first sigma 1e-6 away from 1."""
    sigmas = shift_sigmas(np.linspace(1.0, 1 / TRAIN_TIMESTEPS, steps + 1)[:-1], shift)
    sigmas[0] -= 1e-6
    return sigmas, _truncate_timesteps(sigmas)


def _diffusers_dpm(steps: int, shift: float) -> tuple[np.ndarray, np.ndarray]:
    """DPMSolverMultistepScheduler(use_flow_sigmas=True): another grid than diffusers' UniPC, from 0.999 to 0."""
    sigmas = shift_sigmas(1.0 - np.linspace(1.0, 1 / TRAIN_TIMESTEPS, steps + 1), shift)[:0:-1]
    return sigmas, _truncate_timesteps(sigmas)


def _diffusers_euler(steps: int, shift: float) -> tuple[np.ndarray, np.ndarray]:
    """FlowMatchEulerDiscreteScheduler(shift): the end points are shifted in float32, then the whole grid once more."""
    highest = shift_sigmas(np.float32(1.0), shift)
    lowest = shift_sigmas(np.float32(1.0) / np.float32(TRAIN_TIMESTEPS), shift)
    timesteps = np.linspace(float(highest) * TRAIN_TIMESTEPS, float(lowest) * TRAIN_TIMESTEPS, steps)
    sigmas = shift_sigmas(timesteps / TRAIN_TIMESTEPS, shift)
    return sigmas, sigmas.astype(np.float32) * np.float32(TRAIN_TIMESTEPS)


def _lightx2v(steps: int, shift: float) -> tuple[np.ndarray, np.ndarray]:
    """LightX2V's step-distilled models (steps 4, shift 5, no guidance): timesteps stay fractional."""
    sigmas = shift_sigmas(np.linspace(1.0, 0.0, steps + 1)[:-1], shift)
    return sigmas, sigmas * TRAIN_TIMESTEPS


Grid = Callable[[int, float], tuple[np.ndarray, np.ndarray]]

GRIDS: dict[str, dict[str, Grid]] = {
    # The official code has no Euler; it gets the default solver's grid.
    "official": {"unipc": _official_unipc, "dpm++": _official_dpm, "euler": _official_unipc},
    "diffusers": {"unipc": _diffusers_unipc, "dpm++": _diffusers_dpm, "euler": _diffusers_euler},
    "lightx2v": {"euler": _lightx2v},
}
