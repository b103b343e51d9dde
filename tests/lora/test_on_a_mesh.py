"""LoRAs on a mesh: adapters lie beside their kernels' parts and change the latents as on one device, in float32."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.parallel.test_strategies import CONFIG, LATENTS
from wan_jax.diffusion.loop import denoise
from wan_jax.diffusion.schedule import make_schedule
from wan_jax.diffusion.segments import plan_segments
from wan_jax.diffusion.solvers import get_solver
from wan_jax.diffusion.step import Expert
from wan_jax.lora import save_lora
from wan_jax.lora.apply import AdaptedDenoiser
from wan_jax.lora.files import ActiveLora, open_lora
from wan_jax.models.denoiser import Denoiser
from wan_jax.models.nn.linear import Adapter
from wan_jax.parallel.mesh_spec import MeshSpec
from wan_jax.parallel.placement import Placement
from wan_jax.parameters import named_parameters
from wan_jax.runtime.events import Run
from wan_jax.testing.models import random_model


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> ActiveLora:
    """Every Linear of every layer, and the text's."""
    random = np.random.default_rng(0)
    adapters = {}
    for name, array in named_parameters(random_model(Denoiser, CONFIG, "float32")).items():
        if name.endswith(".kernel") and (name.startswith("blocks.") or "text_embedding" in name):
            *layers, inputs, outputs = array.shape
            adapters[name.removesuffix(".kernel")] = Adapter(
                jnp.asarray(random.standard_normal((*layers, inputs, 5)), jnp.float32),
                jnp.asarray(0.03 * random.standard_normal((*layers, 5, outputs)), jnp.float32),
                jnp.ones((*layers, 5), jnp.float32),
                axes=(None, None),
            )
    path = tmp_path_factory.mktemp("lora") / "x.safetensors"
    save_lora(path, adapters, CONFIG)
    file = open_lora(path, CONFIG)
    return ActiveLora(file, file.changes_of("denoiser"), 0.7)


def run(lora: ActiveLora | None, mesh: str) -> np.ndarray:
    placement = Placement.over(MeshSpec.parse(mesh))
    model = random_model(Denoiser, CONFIG, "float32", placement=placement)
    if lora is not None:
        model = AdaptedDenoiser(model, placement.parameter_sharding).with_loras([lora])
    noise = np.random.default_rng(0)
    inputs = [jnp.asarray(noise.standard_normal(shape), jnp.float32) for shape in ((2, *LATENTS), *[(2, 7, 12)] * 2)]
    inputs = placement.put_batch(inputs)
    expert = Expert.prepare(model, *inputs[1:], placement=placement)
    schedule = make_schedule("official", "unipc", 2, 5.0)
    segments = plan_segments(schedule, get_solver("unipc"), 3.0, None)
    return np.asarray(denoise(inputs[0], segments, lambda name: expert, Run()))


@pytest.fixture(scope="module")
def alone(lora) -> np.ndarray:
    return run(lora, "single")


@pytest.mark.parametrize("mesh", ["pipeline2-tensor2", "ring2-fsdp2-tensor2"])
def test_adapters_on_a_mesh(lora, alone, mesh):
    assert np.abs(run(lora, mesh) - alone).max() < 1e-5 * np.abs(alone).max()  # as without adapters


def test_the_adapters_matter(alone):
    assert np.abs(run(None, "single") - alone).max() > 0.01 * np.abs(alone).max()
