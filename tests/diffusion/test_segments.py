"""Which expert makes which step, with which numbers."""

import numpy as np
import pytest

from wan_jax.config import PerExpert
from wan_jax.diffusion.schedule import make_schedule
from wan_jax.diffusion.segments import plan_segments, plan_steps
from wan_jax.diffusion.solvers import get_solver
from wan_jax.errors import InputError

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("kind", "solver", "shift", "boundary", "high", "low"),
    [
        ("official", "unipc", 12.0, 0.875, 26, 14),
        ("official", "dpm++", 12.0, 0.875, 26, 14),
        ("diffusers", "unipc", 12.0, 0.875, 26, 14),
        ("official", "unipc", 5.0, 0.9, 15, 25),
        ("official", "dpm++", 5.0, 0.9, 15, 25),
        ("diffusers", "unipc", 5.0, 0.9, 15, 25),
        ("diffusers", "unipc", 3.0, 0.875, 13, 27),  # the shift in the published diffusers checkpoint: half of 26
    ],
)
def test_plan_of_40_steps(kind, solver, shift, boundary, high, low):
    plan = plan_steps(make_schedule(kind, solver, 40, shift), boundary)
    assert plan == ["high_noise"] * high + ["low_noise"] * low


def test_plan_edges():
    schedule = make_schedule("lightx2v", "euler", 4, 5.0)
    assert plan_steps(schedule, 0.875) == ["high_noise"] * 2 + ["low_noise"] * 2
    assert plan_steps(schedule, 0.9375) == ["high_noise"] * 2 + ["low_noise"] * 2  # timestep 937.5 is at the boundary
    assert plan_steps(schedule, 0.0) == ["high_noise"] * 4
    assert plan_steps(schedule, None) == ["denoiser"] * 4
    with pytest.raises(InputError, match="boundary 875"):
        plan_steps(schedule, 875)


def test_inputs_have_a_row_per_video():
    schedule = make_schedule("official", "unipc", 6, 12.0)
    guidance = PerExpert(high=[1.0, 4.0], low=1.0)
    high, low = plan_segments(schedule, get_solver("unipc"), guidance, 0.875)
    assert (high.expert, low.expert) == ("high_noise", "low_noise")
    assert [*high.steps, *low.steps] == list(range(6))
    assert (high.is_guided, low.is_guided) == (True, False)
    inputs = high.inputs(np.array([0, 2]))
    np.testing.assert_array_equal(inputs.timestep, schedule.timesteps[[0, 2]])
    np.testing.assert_array_equal(inputs.guidance, [1, 4])
    np.testing.assert_array_equal(inputs.coefficients.sigma, schedule.sigmas[[0, 2]])
    np.testing.assert_array_equal(low.inputs(np.array([1, 1])).timestep, schedule.timesteps[[low.steps[1]] * 2])
