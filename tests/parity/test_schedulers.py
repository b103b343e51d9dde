"""Schedules and solvers against diffusers' schedulers, grid by grid and step by step."""

import jax
import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from wan_jax.diffusion.schedule import make_schedule
from wan_jax.diffusion.solvers import get_solver

STEPS = (1, 2, 3, 7, 40, 100)
SHAPE = (1, 4, 3, 2, 5)  # B C F h w

# Of the largest latent, at any step. Measured: 1.1e-6 at 100 steps, which is some twenty float32 roundings (6e-8) in
# 100 steps of about ten; a wrong coefficient costs 1e-4 and more.
TOLERANCE = 5e-6


def diffusers_scheduler(solver: str, steps: int, shift: float):
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    if solver == "unipc":
        scheduler = UniPCMultistepScheduler(solver_order=2, solver_type="bh2", **flow)
    elif solver == "dpm++":
        scheduler = DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", solver_order=2, **flow)
    else:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)  # not by looking for the timestep, which fails where timesteps repeat
    return scheduler


@pytest.mark.parametrize("shift", [0.7, 1.0, 3.0, 5.0, 12.0])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
def test_grids_are_equal(solver, steps, shift):
    scheduler = diffusers_scheduler(solver, steps, shift)
    schedule = make_schedule("diffusers", solver, steps, shift)
    np.testing.assert_array_equal(schedule.sigmas, scheduler.sigmas.numpy())
    np.testing.assert_array_equal(schedule.timesteps, scheduler.timesteps.numpy().astype(np.float32))


# "official": the same algorithms on the official grids; dpm++ then starts at sigma 1, where the log-SNR is infinite.
@pytest.mark.parametrize("kind", ["diffusers", "official"])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", ["unipc", "dpm++", "euler"])
def test_every_step_agrees(name, steps, kind, record_property):
    schedule = make_schedule(kind, name, steps, 12.0)
    scheduler = diffusers_scheduler(name, steps, 12.0)
    scheduler.sigmas = torch.from_numpy(schedule.sigmas)
    solver = get_solver(name)
    step = jax.jit(solver.step)
    coefficients = solver.coefficients(schedule)
    rng = np.random.default_rng(steps)
    start = rng.standard_normal(SHAPE, np.float32)
    expected, state = torch.from_numpy(start), solver.init(start)
    worst = 0.0
    for index, timestep in enumerate(scheduler.timesteps):
        velocity = rng.standard_normal(SHAPE, np.float32)
        expected = scheduler.step(torch.from_numpy(velocity), timestep, expected).prev_sample
        state = step(state, velocity, jax.tree.map(lambda values, index=index: values[index], coefficients))
        error = np.abs(np.asarray(state.latents) - expected.numpy()).max() / np.abs(expected.numpy()).max()
        worst = max(worst, float(error))
    record_property("worst_relative_error", worst)
    print(f"{name} {kind} {steps} steps: worst relative error {worst:.1e}")
    assert worst < TOLERANCE


def lightx2v(steps: list[int], shift: float) -> tuple[np.ndarray, np.ndarray]:
    """What LightX2V computes: (sigmas without the last 0, timesteps), picked from 1000 float32 sigmas."""
    sigmas = torch.linspace(1.0, 0.0, 1001)[:-1]
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    picks = [1000 - step for step in steps]
    return sigmas[picks].numpy(), (sigmas * 1000)[picks].numpy()


def test_lightx2v_four_steps():
    schedule = make_schedule("lightx2v", "euler", 4, 5.0)
    sigmas, timesteps = lightx2v([1000, 750, 500, 250], 5.0)
    np.testing.assert_array_equal(schedule.sigmas[:-1], sigmas)
    np.testing.assert_array_equal(schedule.timesteps, timesteps)
