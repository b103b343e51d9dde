"""Golden coefficients and trajectories of the original solvers, and properties that every solver has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wan_jax.diffusion.schedule import GRIDS, make_schedule
from wan_jax.diffusion.solvers import SOLVERS, Euler, UniPC, get_solver
from wan_jax.errors import InputError

pytestmark = pytest.mark.quick


def at(coefficients, index):
    return jax.tree.map(lambda values: values[index], coefficients)


def trajectory(solver, schedule, latents, velocity):
    """The latents after each step; velocity(latents, index) is called on the host."""
    step = jax.jit(solver.step)
    coefficients = solver.coefficients(schedule)
    state = solver.init(latents)
    result = []
    for index in range(schedule.num_steps):
        state = step(state, velocity(state.latents, index), at(coefficients, index))
        result.append(np.asarray(state.latents))
    return result


# Step -> value, from the official UniPC scheduler at 40 steps, shift 12. What depends on log-SNRs inherits the last bit
# of the recording machine's float32 logarithm: an ulp of a log-SNR (2.4e-7) over the distance of two (0.1 at step 20).
GOLDEN_RATIO = {0: 0.99786586, 1: 0.99775857, 2: 0.99764299, 20: 0.99196112, 38: 0.60775852, 39: 0.0}
GOLDEN_WEIGHT = {0: 0.0021341434, 1: 0.0022414559, 2: 0.0023570128, 20: 0.0080388701, 38: 0.39224142, 39: 1.0}
GOLDEN_R = {1: -4.6916261, 2: -1.644147, 20: -0.99990225, 38: -0.60090041}
GOLDEN_RHO = {
    1: (0.0, 0.5),
    2: (0.029046632, 0.52879119),
    3: (0.062842831, 0.47251457),
    20: (0.08311554, 0.42521468),
    39: (0.10322201, 0.45619261),
}


def test_golden_unipc_coefficients():
    c = UniPC().coefficients(make_schedule("official", "unipc", 40, 12.0))
    for step, value in GOLDEN_RATIO.items():
        np.testing.assert_allclose(c.ratio[step], value, rtol=2.4e-7)
    for step, value in GOLDEN_WEIGHT.items():
        np.testing.assert_allclose(c.weight[step], value, rtol=5e-6)
    for step, value in GOLDEN_R.items():
        np.testing.assert_allclose(0.5 / c.slope[step], value, rtol=5e-6)
    for step, (rho_1, rho_last) in GOLDEN_RHO.items():
        r = 0.5 / c.slope[step - 1] if step > 1 else 1.0  # the corrector looks at the interval before
        np.testing.assert_allclose(c.corrector_slope[step] * r, rho_1, atol=5e-7)
        np.testing.assert_allclose(c.corrector_newest[step], rho_last, atol=5e-7)


def test_unipc_orders_are_coefficients():
    c = UniPC().coefficients(make_schedule("official", "unipc", 5, 12.0))
    assert c.uncorrected.tolist() == [1, 0, 0, 0, 0]
    assert (c.slope != 0).tolist() == [False, True, True, True, False]  # first and last step are of first order
    assert (c.corrector_slope != 0).tolist() == [False, False, True, True, True]
    assert (c.corrector_weight != 0).tolist() == [False, True, True, True, True]


# The state after some steps of dx/dsigma = 0.5 x + 0.1 cos(t / 100) from x = 1, recorded from the originals.
STEPS = (1, 2, 3, 20, 38, 39, 40)
GOLDEN_TOY = {
    ("official", "unipc"): (0.99911320, 0.99818915, 0.99722356, 0.96948606, 0.73280215, 0.70522714, 0.63884580),
    ("official", "dpm++"): (0.99911284, 0.99818754, 0.99722129, 0.96950233, 0.73073363, 0.70306993, 0.63689023),
    ("diffusers", "unipc"): (0.99911529, 0.99819279, 0.99722922, 0.96956474, 0.73403972, 0.70616084, 0.63876373),
}


@pytest.mark.parametrize("case", GOLDEN_TOY, ids=str)
def test_golden_toy_trajectories(case):
    kind, name = case
    schedule = make_schedule(kind, name, 40, 12.0)

    def velocity(x, index):
        return np.float32(0.5) * x + np.float32(0.1) * np.cos(schedule.timesteps[index] / np.float32(100))

    states = trajectory(get_solver(name), schedule, jnp.ones(()), velocity)
    # Values just under 1 have an ulp of 6e-8; 40 steps of a few roundings each stay under ten of them.
    np.testing.assert_allclose([states[step - 1] for step in STEPS], GOLDEN_TOY[case], atol=6e-7, rtol=0)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize(("kind", "grid"), [(kind, grid) for kind in GRIDS for grid in GRIDS[kind]])
@pytest.mark.parametrize("steps", [1, 2, 3, 40, 1000])
def test_coefficients_are_finite_float32(name, kind, grid, steps):
    """Also where sigma starts at 1, whose log-SNR is minus infinity."""
    for values in jax.tree.leaves(SOLVERS[name].coefficients(make_schedule(kind, grid, steps, 12.0))):
        assert values.shape == (steps,)
        assert values.dtype == np.float32
        assert np.isfinite(values).all()


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize(("kind", "grid"), [("official", "unipc"), ("official", "dpm++")])
@pytest.mark.parametrize("steps", [1, 2, 3, 12])
def test_a_straight_path_is_solved_exactly(name, kind, grid, steps):
    """With v = noise - x_0 at every step, any number of steps of any solver gives x_0."""
    rng = np.random.default_rng(0)
    x0, noise = rng.standard_normal((2, 3, 4), np.float32)
    schedule = make_schedule(kind, grid, steps, 5.0)
    sigma = schedule.sigmas[0]
    start = (1 - sigma) * x0 + sigma * noise
    final = trajectory(SOLVERS[name], schedule, start, lambda x, index: noise - x0)[-1]
    np.testing.assert_allclose(final, x0, atol=2e-6)  # some ten roundings of numbers of about 3, ulp 2.4e-7


def test_euler_step():
    c = Euler().coefficients(make_schedule("official", "euler", 2, 1.0))
    state = Euler().step(Euler().init(jnp.full((2,), 3.0)), jnp.full((2,), 2.0), at(c, 1))
    np.testing.assert_allclose(state.latents, 3.0 - 2.0 * 0.4995, rtol=1e-6)
    np.testing.assert_allclose(state.denoised, 3.0 - 2.0 * 0.4995, rtol=1e-6)  # the last step ends at x_0


@pytest.mark.parametrize("name", SOLVERS)
def test_state_is_float32_and_shares_nothing(name):
    """The loop donates the state: it must not hold the caller's array, or one array twice."""
    latents = jnp.ones((2, 3), jnp.bfloat16)
    leaves = jax.tree.leaves(SOLVERS[name].init(latents)) + jax.tree.leaves(
        SOLVERS[name].init(latents.astype("float32"))
    )
    assert all(leaf.dtype == jnp.float32 and leaf.shape == (2, 3) for leaf in leaves)
    original = jnp.ones((2, 3))
    pointers = [x.unsafe_buffer_pointer() for x in (original, *jax.tree.leaves(SOLVERS[name].init(original)))]
    assert len(set(pointers)) == len(pointers)


def test_unknown_solver_names_the_nearest():
    with pytest.raises(InputError, match=r"unknown solver 'unipcc'; did you mean 'unipc'\? \(known: unipc, dpm\+\+"):
        get_solver("unipcc")
