"""ODE solvers: from the model's velocity at one noise level to the latents at the next.

A solver is a policy of three parts. `coefficients` runs once on the host and turns a schedule into arrays of one value
per step; `init` makes the state; `step` is pure and the same for every step, so that one compiled step serves them all:
its order, and whether it corrects, are zeros and ones among the coefficients. None of them is infinite.

The velocity is v = noise - x_0, so that x_0 = x - sigma * v. Everything is float32. Coefficients are float32 at every
operation as in the originals: 1 - sigma loses digits near sigma = 1, and that loss is part of what they compute.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from wan_jax.config import PerExpert
from wan_jax.diffusion.experts import as_pair
from wan_jax.diffusion.schedule import Schedule
from wan_jax.errors import unknown_name


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepState:
    """What one step hands to the next: float32 arrays [B, C, F, h, w], a row per video."""

    latents: jax.Array  # what the model sees next; after the last step, the result
    denoised: jax.Array  # x_0 as the model predicted it in the last step; zeros before the first
    history: tuple[jax.Array, ...] = ()  # what the solver remembers beside that

    @classmethod
    def start(cls, latents: jax.Array, history: int = 0) -> "StepState":
        """A copy of `latents`, so that the state can be donated, and zeros."""
        x = jnp.array(latents, jnp.float32, copy=True)
        return cls(x, jnp.zeros_like(x), tuple(jnp.zeros_like(x) for _ in range(history)))


class Solver(Protocol):
    """What the denoise loop needs from a solver (hashable, because it is a static argument of the compiled step)."""

    def coefficients(self, schedule: Schedule) -> Any:
        """A pytree of float32 [n] arrays, all finite."""

    def init(self, latents: jax.Array) -> StepState:
        """The state before the first step. It shares no memory with `latents`, so that it can be donated."""

    def step(self, state: StepState, velocity: jax.Array, coefficients: Any) -> StepState:
        """The state after a step.

        Args:
            velocity: float32, of the latents' shape.
            coefficients: of this step, broadcastable to that shape.
        """


class _Intervals(NamedTuple):
    """Quantities of the n intervals between sigmas, t = sigma_{i+1} seen from s = sigma_i; some may be infinite."""

    ratio: np.ndarray  # sigma_t / sigma_s
    alpha: np.ndarray  # 1 - sigma_t
    h: np.ndarray  # lambda_t - lambda_s, where lambda = ln(1 - sigma) - ln(sigma)
    r: np.ndarray  # (lambda_{i-1} - lambda_i) / h, negative; NaN for the first interval


def _intervals(sigmas: np.ndarray) -> _Intervals:
    alphas = 1 - sigmas
    with np.errstate(divide="ignore", invalid="ignore"):  # lambda is infinite at sigma 0 and 1
        lambdas = _round(np.log, alphas) - _round(np.log, sigmas)
        h = np.diff(lambdas)
        r = np.append(np.float32(np.nan), -h[:-1] / h[1:])
    return _Intervals(sigmas[1:] / sigmas[:-1], alphas[1:], h, r)


def _round(function: np.ufunc, x: np.ndarray) -> np.ndarray:
    """`function` of float32 values, correctly rounded: NumPy's own float32 versions vary with the CPU."""
    return function(x, dtype=np.float64).astype(np.float32)


class UniPCCoefficients(NamedTuple):
    """See `UniPC`; each float32 [n]."""

    sigma: np.ndarray
    uncorrected: np.ndarray  # 1 at the first step, which has nothing to correct, else 0
    corrector_ratio: np.ndarray
    corrector_weight: np.ndarray
    corrector_slope: np.ndarray  # rho_1 / r
    corrector_newest: np.ndarray  # rho_last
    ratio: np.ndarray
    weight: np.ndarray
    slope: np.ndarray  # 1 / (2 r)


@dataclass(frozen=True)
class UniPC:
    """UniPC of order 2, B(h) = e^h - 1, predicting x_0 (Zhao et al. 2023; wan/utils/fm_solvers_unipc.py).

    Each step first corrects the latents that the previous step predicted, then predicts the next ones from those. The
    x_0 stays the one of the uncorrected latents. First and last step are of first order.
    """

    def coefficients(self, schedule: Schedule) -> UniPCCoefficients:
        n = schedule.num_steps
        ratio, alpha, h, r = _intervals(schedule.sigmas)
        with np.errstate(divide="ignore", invalid="ignore"):
            b_h = _round(np.expm1, -h)
            # The corrector's 2 x 2 system [[1, 1], [r, 1]] rho = [b_1, b_2].
            k = b_h / -h - 1
            b_1, b_2 = k / b_h, 2 * (k / -h - 0.5) / b_h
            rho_1 = (b_1 - b_2) / (1 - r)
            first_order = np.isin(np.arange(n), (0, n - 1))
            slope = np.where(first_order, 0, 0.5 / r)
            corrector_slope = np.where(first_order, 0, rho_1 / r)
            corrector_newest = np.where(first_order, 0.5, b_1 - rho_1)
        weight = -alpha * b_h

        def previous_step(values: np.ndarray) -> np.ndarray:  # step i corrects over the interval of step i - 1
            return np.append(np.float32(0), values[:-1])

        return UniPCCoefficients(
            sigma=schedule.sigmas[:-1],
            uncorrected=(np.arange(n) == 0).astype(np.float32),
            corrector_ratio=previous_step(ratio),
            corrector_weight=previous_step(weight),
            corrector_slope=previous_step(corrector_slope),
            corrector_newest=previous_step(corrector_newest),
            ratio=ratio,
            weight=weight,
            slope=slope,
        )

    def init(self, latents: jax.Array) -> StepState:
        return StepState.start(latents, history=2)

    def step(self, state: StepState, velocity: jax.Array, coefficients: UniPCCoefficients) -> StepState:
        c = coefficients
        before, (corrected, before_that) = state.denoised, state.history  # x_0 of the last two steps
        x0 = state.latents - c.sigma * velocity
        corrected = (
            c.uncorrected * state.latents
            + c.corrector_ratio * corrected
            + c.corrector_weight
            * (before + c.corrector_slope * (before_that - before) + c.corrector_newest * (x0 - before))
        )
        latents = c.ratio * corrected + c.weight * (x0 + c.slope * (before - x0))
        return StepState(latents, x0, (corrected, before))


class DPMSolverCoefficients(NamedTuple):
    """See `DPMSolver`; each float32 [n]."""

    sigma: np.ndarray
    ratio: np.ndarray
    weight: np.ndarray
    slope: np.ndarray  # 1 / (2 r)


@dataclass(frozen=True)
class DPMSolver:
    """DPM-Solver++ 2M, midpoint (Lu et al. 2022; wan/utils/fm_solvers.py). First and last step are of first order."""

    def coefficients(self, schedule: Schedule) -> DPMSolverCoefficients:
        n = schedule.num_steps
        ratio, alpha, h, r = _intervals(schedule.sigmas)
        first_order = np.isin(np.arange(n), (0, n - 1))
        with np.errstate(divide="ignore"):
            slope = np.where(first_order, 0, 0.5 / r)
        weight = -alpha * (_round(np.exp, -h) - 1)
        return DPMSolverCoefficients(schedule.sigmas[:-1], ratio, weight, slope)

    def init(self, latents: jax.Array) -> StepState:
        return StepState.start(latents)

    def step(self, state: StepState, velocity: jax.Array, coefficients: DPMSolverCoefficients) -> StepState:
        c = coefficients
        x0 = state.latents - c.sigma * velocity
        return StepState(c.ratio * state.latents + c.weight * (x0 + c.slope * (state.denoised - x0)), x0)


class EulerCoefficients(NamedTuple):
    """See `Euler`; each float32 [n]."""

    sigma: np.ndarray
    difference: np.ndarray  # sigma_{i+1} - sigma_i


@dataclass(frozen=True)
class Euler:
    """x' = x + (sigma_{i+1} - sigma_i) * v: first order, for distilled models."""

    def coefficients(self, schedule: Schedule) -> EulerCoefficients:
        return EulerCoefficients(schedule.sigmas[:-1], np.diff(schedule.sigmas))

    def init(self, latents: jax.Array) -> StepState:
        return StepState.start(latents)

    def step(self, state: StepState, velocity: jax.Array, coefficients: EulerCoefficients) -> StepState:
        c = coefficients
        return StepState(state.latents + c.difference * velocity, state.latents - c.sigma * velocity)


SOLVERS: dict[str, Solver] = {"unipc": UniPC(), "dpm++": DPMSolver(), "euler": Euler()}


def get_solver(name: str) -> Solver:
    """Returns the solver called `name`; raises InputError naming the nearest one."""
    if name not in SOLVERS:
        raise unknown_name("solver", name, SOLVERS)
    return SOLVERS[name]


def get_solvers(names: str | tuple[str, str]) -> PerExpert[Solver]:
    """The solvers of both experts, from one name or two."""
    return PerExpert(*map(get_solver, as_pair(names)))
