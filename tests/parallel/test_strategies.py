"""One seed gives the same latents on every mesh: the denoise loop on 8 devices against one.

In float32 to 1e-5. In bfloat16 sums in another order round otherwise: the latents are no further from those of one
device than those are from float32's.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from wan_jax.config import DenoiserConfig
from wan_jax.diffusion.loop import denoise
from wan_jax.diffusion.schedule import make_schedule
from wan_jax.diffusion.segments import plan_segments
from wan_jax.diffusion.solvers import get_solver
from wan_jax.diffusion.step import Expert
from wan_jax.models.denoiser import Denoiser
from wan_jax.parallel.mesh_spec import MeshSpec
from wan_jax.parallel.placement import Placement
from wan_jax.runtime.events import Run
from wan_jax.testing.models import random_model

# 3 x 3 x 5 = 45 tokens: no axis divides them.
LATENTS = (4, 3, 6, 10)
CONFIG = DenoiserConfig(
    num_layers=4, dim=64, num_heads=8, ffn_dim=96, in_channels=4, out_channels=4, text_dim=12, text_length=7
)
FIVE_HEADS = DenoiserConfig(
    num_layers=2, dim=40, num_heads=5, ffn_dim=48, in_channels=4, out_channels=4, text_dim=12, text_length=7
)


def run(config: DenoiserConfig, mesh: str, dtype: str = "float32", *, batch: int = 2) -> np.ndarray:
    placement = Placement.over(MeshSpec.parse(mesh))
    model = random_model(Denoiser, config, dtype, placement=placement)
    noise = np.random.default_rng(0)
    latents, text = noise.standard_normal((batch, *LATENTS)), noise.standard_normal((2, batch, 7, 12))
    arrays = placement.put_batch([jnp.asarray(x, jnp.float32) for x in (latents, *text)])
    expert = Expert.prepare(model, *arrays[1:], placement=placement)
    schedule = make_schedule("official", "unipc", 2, 5.0)
    return np.asarray(
        denoise(arrays[0], plan_segments(schedule, get_solver("unipc"), 3.0, None), lambda name: expert, Run())
    )


@pytest.fixture(scope="module")
def alone() -> np.ndarray:
    return run(CONFIG, "single")


@pytest.mark.parametrize(
    "mesh",
    [
        "data2", "cfg2", "ulysses8", "ring3", "tensor4", "pipeline4", "fsdp4",
        "cfg2-ring2-ulysses2", "data2-tensor2-ulysses2", "pipeline2-tensor2", "ring2-fsdp2-tensor2",
        "data2-pipeline2-ring2", "cfg2-pipeline2-fsdp2",
    ],
)  # fmt: skip
def test_every_mesh_gives_the_latents_of_one_device(mesh: str, alone: np.ndarray) -> None:
    assert np.abs(run(CONFIG, mesh) - alone).max() < 1e-5 * np.abs(alone).max()


@pytest.mark.parametrize("mesh", ["ulysses5", "data2-ring4"])
def test_five_heads(mesh: str) -> None:
    alone = run(FIVE_HEADS, "single")
    assert np.abs(run(FIVE_HEADS, mesh) - alone).max() < 1e-5 * np.abs(alone).max()


def rms(array: np.ndarray) -> float:
    return float(np.sqrt(np.mean(array**2)))


def test_in_bfloat16(alone: np.ndarray) -> None:
    rounded = run(CONFIG, "single", "bfloat16")
    distance = rms(rounded - alone)
    assert 1e-3 * rms(alone) < distance < 2e-2 * rms(alone)  # 1.1 % in two steps of four layers
    for mesh in ("ulysses8", "ring3", "tensor4", "ring2-fsdp2-tensor2"):
        assert 0 < rms(run(CONFIG, mesh, "bfloat16") - rounded) < distance, mesh
