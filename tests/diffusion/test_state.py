"""A run that stops and goes on: the same bits, in this process, in another one, on a mesh and in the relay."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parallel.test_strategies import CONFIG, LATENTS
from wan_jax.diffusion.conditioning import FirstFrame
from wan_jax.diffusion.loop import denoise
from wan_jax.diffusion.relay import denoise_in_relay
from wan_jax.diffusion.schedule import make_schedule
from wan_jax.diffusion.segments import Segment, plan_segments
from wan_jax.diffusion.solvers import get_solvers
from wan_jax.diffusion.state import SamplingState
from wan_jax.diffusion.step import Expert
from wan_jax.errors import Cancelled, InputError
from wan_jax.models.denoiser import Denoiser
from wan_jax.parallel.mesh_spec import MeshSpec
from wan_jax.parallel.placement import SINGLE, Placement
from wan_jax.runtime.events import CancelToken, Run, StepDone
from wan_jax.testing.models import random_model

BATCH, STEPS = 2, 4
SOLVERS = [("unipc", "unipc"), ("dpm++", "dpm++"), ("euler", "euler"), ("euler", "unipc")]


def plan(low: str = "unipc", high: str = "unipc", steps: int = STEPS) -> list[Segment]:
    schedule = make_schedule("official", (low, high), steps, 5.0, 0.9)
    return plan_segments(schedule, get_solvers((low, high)), (3.0, 1.0), 0.9)


def noise(seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((BATCH, *LATENTS)), jnp.float32)


def make_experts(placements: dict[str, Placement] | None = None):
    """A function that gives the experts; each is loaded, and its text encoded, when it is asked for."""
    placements = placements or dict.fromkeys(("high_noise", "low_noise"), SINGLE)
    models = {
        name: random_model(Denoiser, CONFIG, "float32", seed, placements[name])
        for seed, name in enumerate(("high_noise", "low_noise"))
    }
    texts = np.random.default_rng(1).standard_normal((2, BATCH, 7, 12), np.float32)

    def get_expert(name: str, rows: slice = slice(None)) -> Expert:
        placed = [placements[name].put_batch(jnp.asarray(text[rows])) for text in texts]
        return Expert.prepare(models[name], *placed, placement=placements[name])

    return get_expert


def states(segments, get_expert, latents=None) -> tuple[list[SamplingState], np.ndarray]:
    """The state after each step, and the result."""
    found: list[SamplingState] = []
    result = denoise(
        noise() if latents is None else latents, segments, get_expert, Run(lambda step: found.append(step.state()))
    )
    return found, np.asarray(result)


@pytest.mark.parametrize("solvers", SOLVERS, ids="-".join)
def test_a_run_goes_on_to_the_same_bits(solvers):
    segments, get_expert = plan(*solvers), make_experts()
    assert len(segments) == 2
    found, result = states(segments, get_expert)
    assert [state.step for state in found] == [1, 2, 3, 4]
    for state in found:
        before = jax.tree.map(np.copy, state.arrays)
        steps: list[int] = []
        again = denoise(state, segments, get_expert, Run(lambda step, steps=steps: steps.append(step.step)))
        np.testing.assert_array_equal(again, result)
        assert steps == list(range(state.step + 1, STEPS + 1))
        jax.tree.map(np.testing.assert_array_equal, state.arrays, before)  # still there, to go on from once more


@pytest.mark.parametrize("mesh", ["data2-ulysses2-tensor2", "data2-pipeline2-ring2"])
def test_on_a_mesh(mesh):
    placement = Placement.over(MeshSpec.parse(mesh))
    segments, get_expert = plan(), make_experts(dict.fromkeys(("high_noise", "low_noise"), placement))
    found, result = states(segments, get_expert, placement.put_batch(noise()))
    for state in found[:-1]:
        np.testing.assert_array_equal(denoise(state, segments, get_expert, Run()), result)


def test_in_the_relay():
    placements = Placement.over(MeshSpec.parse("experts2-ulysses2")).by_expert(("high_noise", "low_noise"))
    segments, get_expert = plan("euler", "unipc"), make_experts(placements)
    found: dict[tuple[int, int], SamplingState] = {}

    def keep(step: StepDone) -> None:
        (video,) = step.videos
        found[video, step.step] = step.state()

    def run(batches, on_event=None) -> list[np.ndarray]:
        rows = [slice(index, index + 1) for index in range(BATCH)]
        latents = denoise_in_relay(batches, segments, lambda name, index: get_expert(name, rows[index]), Run(on_event))
        return [np.asarray(x) for x in latents]

    result = run([noise()[:1], noise()[1:]], keep)
    assert set(found) == {(video, step) for video in range(BATCH) for step in range(1, STEPS + 1)}
    for steps in ((1, 3), (2, 4)):  # one video before the change of experts and one after it; one that is done
        again = run([found[video, step] for video, step in enumerate(steps)])
        np.testing.assert_array_equal(again, result)


def test_in_another_process(tmp_path):
    found, result = states(plan(), make_experts())
    found[1].save(tmp_path / "state.npz")
    program = (
        "import sys, numpy as np\n"
        "from tests.diffusion.test_state import *\n"
        "state = SamplingState.load(sys.argv[1])\n"
        "np.save(sys.argv[2], np.asarray(denoise(state, plan(), make_experts(), Run())))\n"
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", program, tmp_path / "state.npz", tmp_path / "result.npy"]
    subprocess.run(command, check=True, cwd=root, timeout=300)
    np.testing.assert_array_equal(np.load(tmp_path / "result.npy"), result)


def test_files(tmp_path):
    found, _ = states(plan(), make_experts())
    path = tmp_path / "paused"
    found[0].save(path)
    loaded = SamplingState.load(path)
    assert (loaded.step, loaded.plan) == (1, found[0].plan)
    jax.tree.map(np.testing.assert_array_equal, loaded.arrays, found[0].arrays)
    path.write_bytes(b"no state")
    for damaged in (path, tmp_path / "missing.npz"):
        with pytest.raises(InputError, match=f"{damaged.name} holds no sampling state"):
            SamplingState.load(damaged)
    np.savez(path, weights=np.zeros(3))
    with pytest.raises(InputError, match="no sampling state"):
        SamplingState.load(f"{path}.npz")


@pytest.mark.parametrize("kind", ["empty", "npy", "float64", "other shape", "no step", "several steps"])
def test_damaged_files(tmp_path, kind):
    latents = np.zeros((1, 2, 1, 4, 4), np.float32)
    arrays = {"latents": latents, "denoised": latents, "step": 1, "plan": "plan"}
    changed = {
        "float64": {"latents": latents.astype(np.float64)},
        "other shape": {"denoised": latents[:, :1]},
        "no step": {"step": 0},
        "several steps": {"step": np.arange(2)},
    }
    path = tmp_path / "state"
    with path.open("wb") as file:
        if kind == "npy":
            np.save(file, latents)
        elif kind != "empty":
            np.savez(file, **arrays | changed[kind])
    with pytest.raises(InputError, match="no sampling state"):
        SamplingState.load(path)


def test_a_state_of_another_run_is_refused():
    get_expert = make_experts()
    found, _ = states(plan(), get_expert)
    for other in (plan(steps=5), plan("euler", "euler"), plan("euler", "unipc")):
        with pytest.raises(InputError, match="sampling state belongs to"):
            denoise(found[0], other, get_expert, Run())


def test_a_state_is_there_while_its_event_is_handled():
    events: list[StepDone] = []

    def keep(step: StepDone) -> None:
        events.append(step)
        if len(events) > 1:
            with pytest.raises(RuntimeError, match=f"after step {step.step - 1} is gone"):
                events[-2].state()

    denoise(noise(), plan(), make_experts(), Run(keep))
    with pytest.raises(RuntimeError, match="after step 4 is gone"):
        events[-1].state()


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
def test_preview_shows_the_predicted_clean_latents(solver):
    """x_0 = x - sigma v; after the last step, the result."""
    shown: list[np.ndarray] = []
    latents: list[np.ndarray] = []

    def look(latents: np.ndarray) -> np.ndarray:
        shown.append(latents)
        return np.zeros((BATCH, LATENTS[1], 1, 1, 3), np.uint8)

    def keep(step: StepDone) -> None:
        latents.append(step.state().arrays.latents)
        assert step.preview().shape == (BATCH, LATENTS[1], 1, 1, 3)

    conditioning = FirstFrame(jnp.full((1, LATENTS[0], 1, *LATENTS[2:]), 0.5), jnp.ones(1, bool))
    segments = plan(solver, solver)
    result = denoise(noise(), segments, make_experts(), Run(keep), conditioning, look)
    assert [x.shape for x in shown] == [(BATCH, *LATENTS)] * STEPS
    np.testing.assert_allclose(shown[-1], result, atol=1e-5)
    assert all((x[:, :, 0] == 0.5).all() for x in shown)  # what is known is shown as it is
    if solver == "euler":  # the velocity is the slope of its steps
        sigmas = make_schedule("official", solver, STEPS, 5.0).sigmas
        velocity = (latents[1] - latents[0]) / (sigmas[2] - sigmas[1])
        expected = latents[0] - sigmas[1] * velocity
        np.testing.assert_allclose(shown[1][:, :, 1:], expected[:, :, 1:], atol=1e-4)


@pytest.mark.parametrize("mesh", [None, "data2-ulysses2", "experts2-ulysses2"])
def test_cancelling_frees_the_device(mesh):
    placement = SINGLE if mesh is None else Placement.over(MeshSpec.parse(mesh))
    get_expert, segments = make_experts(placement.by_expert(("high_noise", "low_noise"))), plan()
    token = CancelToken()
    steps: list[int] = []

    def cancel_after_two(step: StepDone) -> None:
        steps.append(step.step)
        if step.step == 2:
            token.cancel()

    def run(run: Run) -> None:
        if placement.mesh_spec.experts == 1:
            denoise(placement.put_batch(latents), segments, get_expert, run)
        else:
            batches = [latents[:1], latents[1:]]
            denoise_in_relay(batches, segments, lambda name, index: get_expert(name, slice(index, index + 1)), run)

    latents = noise()
    run(Run())  # what is compiled and kept for good
    alive = {id(array) for array in jax.live_arrays()}
    with pytest.raises(Cancelled) as caught:
        run(Run(cancel_after_two, token))
    assert max(steps) <= 3  # the relay's other expert may be at work on a step
    left = [array for array in jax.live_arrays() if id(array) not in alive]
    # The traceback, which the caller may keep, holds at most the latents that it put on the devices.
    assert sum(array.nbytes for array in left) <= latents.nbytes, left
    del caught
    run(Run())
