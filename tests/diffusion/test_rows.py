"""Rows of a batch are independent: each is what a run of that video alone gives."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.parallel.test_strategies import CONFIG, LATENTS
from wan_jax.diffusion.conditioning import TEXT_ONLY, FirstFrame, KnownFrames, stack_conditioning
from wan_jax.diffusion.loop import denoise
from wan_jax.diffusion.noise import initial_noise
from wan_jax.diffusion.schedule import make_schedule
from wan_jax.diffusion.segments import StepInputs, plan_segments
from wan_jax.diffusion.solvers import get_solver
from wan_jax.diffusion.step import Expert, compile_step
from wan_jax.models.denoiser import Denoiser
from wan_jax.parallel.mesh_spec import MeshSpec
from wan_jax.parallel.placement import SINGLE, Placement
from wan_jax.runtime.events import Run
from wan_jax.testing.models import random_model

VIDEOS = 4
GUIDANCE = [3.0, 1.0, 4.5, 2.0]
SEEDS = [0, 7, 8, 2**40]


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


TEXTS = random(1, 2, VIDEOS, CONFIG.text_length, CONFIG.text_dim)  # prompts and negative prompts
CHANNELS, LENGTH, *SIDES = LATENTS
IMAGES = [
    {
        "text": TEXT_ONLY,
        # The last video has no image.
        "first_frame": FirstFrame(jnp.asarray(random(video, 1, CHANNELS, 1, *SIDES)), jnp.array([video < 3])),
        "known_frames": KnownFrames(jnp.asarray(random(video, 1, 3, LENGTH, *SIDES))),
    }
    for video in range(VIDEOS)
]


def run(kind: str, videos: list[int], solver: str = "unipc", mesh: str = "single") -> np.ndarray:
    placement = Placement.over(MeshSpec.parse(mesh))
    config = replace(CONFIG, in_channels=CHANNELS + 3) if kind == "known_frames" else CONFIG
    model = random_model(Denoiser, config, "float32", placement=placement)
    texts = [placement.put_batch(jnp.asarray(text[videos])) for text in TEXTS]
    expert = Expert.prepare(model, *texts, placement=placement)
    latents = placement.put_batch(jnp.stack([initial_noise(SEEDS[video], LATENTS) for video in videos]))
    known = stack_conditioning([IMAGES[video][kind] for video in videos])
    known = placement.put(known, placement.batch_specs(known))
    schedule = make_schedule("official", solver, 3, 5.0)
    segments = plan_segments(schedule, get_solver(solver), [GUIDANCE[video] for video in videos], None)
    return np.asarray(denoise(latents, segments, lambda name: expert, Run(), known))


@pytest.mark.parametrize("solver", ["unipc", "euler"])
@pytest.mark.parametrize("kind", ["text", "first_frame", "known_frames"])
def test_a_row_is_the_run_of_its_video(kind, solver):
    together = run(kind, [0, 1, 2, 3], solver)
    for video in range(VIDEOS):
        alone = run(kind, [video], solver)[0]
        # Sums in another order; guidance 1 adds back a difference that the run alone does not compute.
        assert np.abs(together[video] - alone).max() < 1e-5 * np.abs(alone).max()


@pytest.mark.parametrize("kind", ["first_frame", "known_frames"])
@pytest.mark.parametrize("mesh", ["data2-pipeline2", "data2-cfg2-ulysses2"])
def test_rows_on_a_mesh(mesh, kind):
    alone = run(kind, [0, 1, 2, 3])
    assert np.abs(run(kind, [0, 1, 2, 3], mesh=mesh) - alone).max() < 1e-5 * np.abs(alone).max()


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
def test_rows_may_be_at_different_steps(solver):
    """One call of the compiled step takes each video by a step of its own, in schedules of different length."""
    model = random_model(Denoiser, CONFIG, "float32")
    plans = [
        plan_segments(make_schedule("official", solver, steps, shift), get_solver(solver), scale, None)[0]
        for steps, shift, scale in ((4, 5.0, 3.0), (9, 12.0, 1.5))
    ]
    state = plans[0].solver.init(jnp.asarray(random(3, 2, *LATENTS)))
    state = replace(state, denoised=jnp.asarray(random(4, 2, *LATENTS)))

    def step(rows: slice, inputs: StepInputs):
        expert = Expert.prepare(model, *(jnp.asarray(text[rows]) for text in TEXTS[:, :2]), placement=SINGLE)
        part = jax.tree.map(lambda x: jnp.array(x[rows]), state)
        compiled = compile_step(expert, plans[0], part)
        arrays = nnx.state(expert.denoiser), expert.cond, expert.uncond
        return compiled(*arrays, part, TEXT_ONLY, inputs, None)

    rows = [plan.inputs(np.array([index])) for plan, index in zip(plans, (0, 5), strict=True)]
    together = step(slice(0, 2), jax.tree.map(lambda *parts: np.concatenate(parts), *rows))
    for video, inputs in enumerate(rows):
        alone = step(slice(video, video + 1), inputs)
        for one, both in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
            assert np.abs(both[video] - one[0]).max() <= 1e-5 * np.abs(one).max()
