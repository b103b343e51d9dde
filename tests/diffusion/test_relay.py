"""Experts on devices of their own, two videos at once: the latents of one video after the other on one device."""

import threading

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.parallel.test_strategies import CONFIG, LATENTS
from wan_jax.diffusion.loop import denoise
from wan_jax.diffusion.relay import denoise_in_relay
from wan_jax.diffusion.schedule import make_schedule
from wan_jax.diffusion.segments import plan_segments
from wan_jax.diffusion.solvers import get_solvers
from wan_jax.diffusion.step import Expert
from wan_jax.errors import InputError
from wan_jax.models.denoiser import Denoiser
from wan_jax.parallel.mesh_spec import MeshSpec
from wan_jax.parallel.placement import Placement
from wan_jax.parameters import abstract_parameters
from wan_jax.presets import get_preset
from wan_jax.runtime.events import Run, StepDone
from wan_jax.runtime.offload import place
from wan_jax.testing.models import random_model

VIDEOS = 3
EXPERTS = ("high_noise", "low_noise")


@pytest.fixture(scope="module")
def models() -> dict[str, Denoiser]:
    return {name: random_model(Denoiser, CONFIG, "float32", seed) for seed, name in enumerate(EXPERTS)}


@pytest.fixture(scope="module")
def inputs() -> tuple[np.ndarray, np.ndarray]:
    """Noise, and encodings of each prompt and its negative prompt."""
    noise = np.random.default_rng(0)
    return noise.standard_normal((VIDEOS, 1, *LATENTS), np.float32), noise.standard_normal(
        (VIDEOS, 2, 1, 7, 12), np.float32
    )


SCHEDULE = make_schedule("official", "unipc", 4, 5.0)
SEGMENTS = plan_segments(SCHEDULE, get_solvers(("unipc", "euler")), (3.0, 1.0), 0.9)


@pytest.mark.parametrize("mesh", ["experts2-ulysses2", "experts2-cfg2-pipeline2"])
def test_relay_gives_the_latents_of_one_device(mesh: str, models: dict, inputs: tuple) -> None:
    placement = Placement.over(MeshSpec.parse(mesh))
    placements = placement.by_expert(EXPERTS)
    assert not set(placements["high_noise"].devices) & set(placements["low_noise"].devices)
    tree = abstract_parameters(lambda: Denoiser(CONFIG, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    placed = {name: place(model, placements[name].parameter_shardings(tree)) for name, model in models.items()}
    noise, text = inputs
    reports: list[tuple[int, str, int]] = []
    second_is_in = threading.Event()
    at_once: list[bool] = []

    def get_expert(name: str, index: int) -> Expert:
        if (name, index) == ("high_noise", 1):
            second_is_in.set()
        if (name, index) == ("low_noise", 0):
            at_once.append(second_is_in.wait(60))
        texts = (placements[name].put_batch(x) for x in text[index])
        return Expert.prepare(placed[name], *texts, placement=placements[name])

    def on_step(step: StepDone) -> None:
        (index,) = step.videos
        reports.append((index, step.expert, step.step))

    relayed = denoise_in_relay(list(noise), SEGMENTS, get_expert, Run(on_step))
    assert at_once == [True]
    assert len(reports) == VIDEOS * SCHEDULE.num_steps
    for index, video in enumerate(relayed):
        texts = [jnp.asarray(x) for x in text[index]]
        experts = {name: Expert.prepare(model, *texts) for name, model in models.items()}
        alone = np.asarray(denoise(jnp.asarray(noise[index]), SEGMENTS, experts.__getitem__, Run()))
        assert np.abs(np.asarray(video) - alone).max() < 1e-5 * np.abs(alone).max()  # sums in another order


def test_an_error_at_one_expert_ends_the_relay(inputs: tuple) -> None:
    def get_expert(name: str, index: int) -> Expert:
        raise InputError(f"no {name} for video {index}")

    with pytest.raises(InputError, match="no high_noise for video 0"):
        denoise_in_relay(list(inputs[0]), SEGMENTS, get_expert, Run())


def test_experts_of_a_model_with_one() -> None:
    with pytest.raises(InputError, match="t2v-14b has 1 experts; use experts1, or none"):
        MeshSpec.parse("experts2").check(get_preset("t2v-14b"))
    MeshSpec.parse("experts2-ulysses4").check(get_preset("t2v-a14b"))
