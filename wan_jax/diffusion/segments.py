"""The plan of a run, made on the host before it starts: which expert makes which steps, with which numbers."""

import itertools
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from wan_jax.diffusion.experts import by_expert
from wan_jax.diffusion.guidance import guidance_by_expert
from wan_jax.diffusion.schedule import TRAIN_TIMESTEPS, Schedule
from wan_jax.diffusion.solvers import Solver
from wan_jax.errors import InputError


def plan_steps(schedule: Schedule, boundary: float | None) -> list[str]:
    """Names the expert of each step: "high_noise" where timestep >= 1000 * boundary, else "low_noise".

    A schedule with its own number of steps for each expert decides by itself where they change. With boundary None
    there is one expert, "denoiser". Raises InputError for a boundary outside [0, 1].
    """
    if boundary is None:
        return ["denoiser"] * schedule.num_steps
    if not 0 <= boundary <= 1:
        raise InputError(f"boundary {boundary} is not between 0 and 1; presets have 0.875 or 0.9")
    if (high := schedule.high_noise_steps) is not None:
        return ["high_noise"] * high + ["low_noise"] * (schedule.num_steps - high)
    return ["high_noise" if t >= boundary * TRAIN_TIMESTEPS else "low_noise" for t in schedule.timesteps.tolist()]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepInputs:
    """The numbers of one step, a row per video: rows may differ in all of them."""

    timestep: ArrayLike  # [B] float32
    guidance: ArrayLike  # [B] float32; 1 is no guidance
    coefficients: Any  # the solver's, a pytree of [B] float32


@dataclass(frozen=True, eq=False)
class Segment:
    """Consecutive steps of one expert.

    Attributes:
        expert: its name.
        steps: indices of the steps in the whole run.
        total: number of steps of the whole run.
        solver: of these steps.
        starts_solver: whether the solver begins here without history.
        timesteps: float32 [len(steps)].
        coefficients: the solver's, a pytree of float32 [len(steps)].
        guidance: scale of each video, float32 [B], or [1] for all of them.
    """

    expert: str
    steps: range
    total: int
    solver: Solver
    starts_solver: bool
    timesteps: np.ndarray
    coefficients: Any
    guidance: np.ndarray

    @property
    def is_guided(self) -> bool:
        """Whether any video needs its negative prompt's velocity."""
        return bool(np.any(self.guidance != 1))

    def after(self, step: int) -> "Segment":
        """The rest of it when so many steps of the whole run are done."""
        done = max(0, step - self.steps.start)
        if done == 0:
            return self
        timesteps, coefficients = jax.tree.map(lambda values: values[done:], (self.timesteps, self.coefficients))
        steps = self.steps[done:]
        return replace(self, steps=steps, starts_solver=False, timesteps=timesteps, coefficients=coefficients)

    def inputs(self, steps: np.ndarray) -> StepInputs:
        """The numbers of one call of the step; `steps` [B] counts each video's step from this segment's first."""
        arrays = self.timesteps, self.coefficients
        timestep, coefficients = jax.tree.map(lambda values: values[steps], arrays)
        return StepInputs(timestep, np.broadcast_to(self.guidance, steps.shape), coefficients)


def plan_segments(
    schedule: Schedule,
    solver: Solver | tuple[Solver, Solver],
    guidance: Any,
    boundary: float | None,
) -> list[Segment]:
    """What each expert does, in order.

    Args:
        schedule: the noise levels; see `make_schedule`.
        solver: see `get_solver`; one, whose history goes on over the change of experts, or one for each expert. Where
            they differ, the second starts from the latents at the change without history, as on a schedule that begins
            there: another solver's history means nothing to it.
        guidance: a scale, or a sequence with one for each video; or either for each expert. An expert whose scales are
            all 1 is evaluated once per step instead of twice.
        boundary: see `plan_steps`.

    Raises:
        InputError: a boundary, solver or guidance that cannot be used.
    """
    names = plan_steps(schedule, boundary)
    experts = tuple(dict.fromkeys(names))
    scales, solvers = guidance_by_expert(guidance, experts), by_expert("solver", solver, experts)
    segments: list[Segment] = []
    first, coefficients = 0, solvers[names[0]].coefficients(schedule)
    for name, group in itertools.groupby(range(schedule.num_steps), key=names.__getitem__):
        indices = list(group)
        steps = range(indices[0], indices[-1] + 1)
        changes_solver = bool(segments) and solvers[name] != segments[-1].solver
        if changes_solver:
            first, coefficients = steps.start, solvers[name].coefficients(schedule.after(steps.start))
        part = slice(steps.start - first, steps.stop - first)
        segments.append(
            Segment(
                expert=name,
                steps=steps,
                total=schedule.num_steps,
                solver=solvers[name],
                starts_solver=changes_solver or not segments,
                timesteps=schedule.timesteps[steps.start : steps.stop],
                coefficients=jax.tree.map(lambda values, part=part: values[part], coefficients),
                guidance=np.atleast_1d(np.asarray(scales[name], np.float32)),
            )
        )
    return segments
