"""The request chooses how attention is computed: no weights are loaded anew, and what runs has a name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parallel.test_strategies import CONFIG
from wan_jax.diffusion.loop import denoise
from wan_jax.diffusion.schedule import make_schedule
from wan_jax.diffusion.segments import plan_segments
from wan_jax.diffusion.solvers import get_solver
from wan_jax.diffusion.step import Expert
from wan_jax.kernels.attention import AttentionOptions
from wan_jax.kernels.attention.block_lists import TemporalWindow
from wan_jax.models.denoiser import Denoiser
from wan_jax.parallel.mesh_spec import MeshSpec
from wan_jax.parallel.placement import Placement
from wan_jax.runtime.events import Run
from wan_jax.testing.models import random_model

LATENTS = (2, 4, 5, 6, 10)  # 75 tokens: no axis divides them


def run(options: AttentionOptions, mesh: str = "single") -> np.ndarray:
    placement = Placement.over(MeshSpec.parse(mesh))
    model = random_model(Denoiser, CONFIG, "float32", placement=placement)
    noise = np.random.default_rng(0)
    latents, *texts = (
        placement.put_batch(jnp.asarray(noise.standard_normal(shape), jnp.float32))
        for shape in (LATENTS, (2, 7, 12), (2, 7, 12))
    )
    expert = Expert.prepare(model.with_attention(options), *texts, placement=placement)
    segments = plan_segments(make_schedule("official", "euler", 2, 5.0), get_solver("euler"), 3.0, None)
    return np.asarray(denoise(latents, segments, lambda name: expert, Run()))


def test_the_implementation_is_a_choice():
    exact = run(AttentionOptions())
    assert np.abs(run(AttentionOptions("chunked")) - exact).max() < 1e-5 * np.abs(exact).max()
    with pytest.raises(ValueError, match="unknown attention implementation 'flash'"):
        run(AttentionOptions("flash"))


def test_weights_are_shared():
    model = random_model(Denoiser, CONFIG, "float32")
    other = model.with_attention(AttentionOptions("chunked"))
    assert model.attention == AttentionOptions()
    pairs = zip(jax.tree.leaves(model), jax.tree.leaves(other), strict=True)
    assert all(ours is theirs for ours, theirs in pairs)


@pytest.mark.parametrize("mesh", ["ulysses4", "data2-cfg2", "pipeline2-tensor2"])
def test_block_lists(mesh):
    exact = run(AttentionOptions())
    whole = run(AttentionOptions(block_lists=TemporalWindow(LATENTS[2])))
    assert np.abs(whole - exact).max() < 1e-5 * np.abs(exact).max()
    options = AttentionOptions(block_lists=TemporalWindow(1))
    window = run(options)
    assert np.abs(window - exact).max() > 1e-3 * np.abs(exact).max()
    assert np.abs(run(options, mesh) - window).max() < 1e-5 * np.abs(window).max()


def test_block_lists_need_all_keys():
    with pytest.raises(ValueError, match="ring"):
        run(AttentionOptions(block_lists=TemporalWindow(1)), "ring2")


def test_what_is_used_has_a_name():
    def used(options: AttentionOptions, frames: int) -> str:
        denoiser = random_model(Denoiser, CONFIG, "float32").with_attention(options)
        return Expert(denoiser, None).attention_used((1, 4, frames, 64, 64))

    assert used(AttentionOptions(), 1) == "chunked"
    assert used(AttentionOptions(block_lists=TemporalWindow(1)), 1) == "chunked"
    assert used(AttentionOptions("cudnn"), 1) == "cudnn"
