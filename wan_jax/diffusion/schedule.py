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

from wan_jax.config import PerExpert
from wan_jax.diffusion.experts import as_pair
from wan_jax.errors import InputError, unknown_name

TRAIN_TIMESTEPS = 1000
MOST_STEPS = 10_000


@dataclass(frozen=True, eq=False)
class Schedule:
    """The grid of one run of n steps; step i goes from sigmas[i] to sigmas[i + 1]."""

    sigmas: np.ndarray  # [n + 1] float32, strictly falling, the last is 0
    timesteps: np.ndarray  # [n] float32, what the model sees: about 1000 * sigma
    high_noise_steps: int | None = None  # the first steps, which the high-noise expert takes; None: timesteps decide

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    def after(self, step: int) -> "Schedule":
        """The grid without its first steps."""
        high = None if self.high_noise_steps is None else max(0, self.high_noise_steps - step)
        return Schedule(self.sigmas[step:], self.timesteps[step:], high)


def make_schedule(
    kind: str | tuple[str, str],
    solver: str | tuple[str, str],
    steps: int | tuple[int, int],
    shift: float,
    boundary: float | None = None,
) -> Schedule:
    """Makes the grid that program `kind` uses with `solver`.

    With one number of steps this is the program's own grid (its one for the high-noise expert's solver, where there are
    two), and `plan_steps` reads the experts from the timesteps.

    With a pair of numbers (low, high) each expert has a grid of its own. The high-noise expert's `high` steps go from
    its program's first sigma to `boundary`, the low-noise expert's `low` steps from `boundary` to 0; either are evenly
    spaced before the shift. So the change of experts falls exactly on the boundary, which is the last sigma of one part
    and the first of the other. The exception is a pair on "lightx2v", which means what it means there: the one grid of
    low + high steps, of which the first `high` (boundary_step_index) are the high-noise expert's.

    Args:
        kind: "official" (Wan-Video/Wan2.2), "diffusers", or "lightx2v" (the 4-step distilled models; Euler only); or
            a pair (low, high) of them.
        solver: "unipc", "dpm++" or "euler"; or a pair (low, high).
        steps: number of steps n, at least 1; or a pair (low, high).
        shift: s > 0 in sigma' = s * sigma / (1 + (s - 1) * sigma); larger means more steps at high noise.
        boundary: sigma at which the experts change; needed for a pair of steps only.

    Raises:
        InputError: an unknown name, steps or shift out of range, steps too fine for float32, a pair of kinds without a
            pair of steps, or a pair of steps without a boundary.
    """
    kinds, solvers, numbers = as_pair(kind), as_pair(solver), as_pair(steps)
    grids = PerExpert(high=_get_grid(kinds.high, solvers.high), low=_get_grid(kinds.low, solvers.low))
    for number in (numbers.low, numbers.high):
        if not isinstance(number, Integral) or number < 1:
            raise InputError(f"steps is {number!r}; give a whole number of at least 1")
        if number > MOST_STEPS:
            raise InputError(f"steps {number}: give at most {MOST_STEPS}; a model knows {TRAIN_TIMESTEPS} timesteps")
    if not (math.isfinite(shift) and shift > 0):
        raise InputError(f"shift is {shift}; give a number above 0 (presets have 5 to 12)")
    high_noise_steps = numbers.high if isinstance(steps, tuple) else None
    if high_noise_steps is None:
        if kinds.low != kinds.high:
            raise InputError(f"schedules {kinds.low},{kinds.high} need the steps of each expert; write steps LOW,HIGH")
        sigmas, timesteps = grids.high(int(numbers.high), float(shift))
    elif kinds == ("lightx2v", "lightx2v"):
        sigmas, timesteps = _lightx2v(sum(numbers), float(shift))
    else:
        sigmas, timesteps = _parts(grids, numbers, float(shift), boundary)
    sigmas = np.append(sigmas, 0.0).astype(np.float32)
    if np.any(np.diff(sigmas) >= 0):
        raise InputError(f"{steps} steps with shift {shift:g} repeat a sigma in float32; use fewer steps or less shift")
    return Schedule(sigmas, timesteps.astype(np.float32), high_noise_steps)


def _get_grid(kind: str, solver: str) -> "Grid":
    if kind not in GRIDS:
        raise unknown_name("schedule", kind, GRIDS)
    if solver not in GRIDS[kind]:
        raise unknown_name(f"solver for schedule {kind!r}:", solver, GRIDS[kind])
    return GRIDS[kind][solver]


def _parts(
    grids: PerExpert["Grid"], steps: PerExpert[int], shift: float, boundary: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """The high-noise expert's part down to the boundary, and the low-noise expert's from there."""
    if boundary is None:
        raise InputError(f"steps {steps.low},{steps.high} are for two experts but the model has one; give one number")
    first = float(grids.high(1, shift)[0][0])
    if not 0 < boundary < first:
        raise InputError(f"boundary {boundary} leaves one expert no steps; presets have 0.875 or 0.9")
    sigmas, timesteps = [], []
    for grid, start, end, number in (
        (grids.high, first, boundary, steps.high),
        (grids.low, boundary, 0.0, steps.low),
    ):
        even = np.linspace(shift_sigmas(start, 1 / shift), shift_sigmas(end, 1 / shift), number + 1)[:-1]
        part = shift_sigmas(even, shift)
        part[0] = start  # there and back again rounds
        sigmas.append(part)
        timesteps.append(part * TRAIN_TIMESTEPS if grid in FRACTIONAL_TIMESTEPS else _truncate_timesteps(part))
    return np.concatenate(sigmas), np.concatenate(timesteps)


def shift_sigmas(sigmas, shift: float):
    """sigma -> sigma'; a shift of 1 / s undoes one of s."""
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
    """LightX2V's step-distilled models (steps 4, shift 5, no guidance): timesteps stay fractional.

    lightx2v/models/schedulers/wan/step_distill/scheduler.py takes every 250th of 1000 sigmas.
    """
    sigmas = shift_sigmas(np.linspace(1.0, 0.0, steps + 1)[:-1], shift)
    return sigmas, sigmas * TRAIN_TIMESTEPS


Grid = Callable[[int, float], tuple[np.ndarray, np.ndarray]]

GRIDS: dict[str, dict[str, Grid]] = {
    # The official code has no Euler; it gets the default solver's grid.
    "official": {"unipc": _official_unipc, "dpm++": _official_dpm, "euler": _official_unipc},
    "diffusers": {"unipc": _diffusers_unipc, "dpm++": _diffusers_dpm, "euler": _diffusers_euler},
    "lightx2v": {"euler": _lightx2v},
}

# Grids whose model sees 1000 * sigma as it is; the others cut it to a whole number.
FRACTIONAL_TIMESTEPS = (_diffusers_euler, _lightx2v)
