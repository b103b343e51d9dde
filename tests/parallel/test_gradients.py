"""Gradients through a forward on a mesh are those of one device, and a mesh may have Explicit axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from wan_jax.config import DenoiserConfig
from wan_jax.diffusion.loop import denoise
from wan_jax.diffusion.schedule import make_schedule
from wan_jax.diffusion.segments import plan_segments
from wan_jax.diffusion.solvers import get_solver
from wan_jax.diffusion.step import Expert
from wan_jax.models.denoiser import Denoiser
from wan_jax.parallel.collectives import MESH_AXES
from wan_jax.parallel.mesh_spec import MeshSpec
from wan_jax.parallel.placement import Placement
from wan_jax.parallel.sharding import gather_outside_layers, state_specs
from wan_jax.runtime.events import Run
from wan_jax.testing.models import random_model

# 3 x 1 x 3 = 9 tokens: over four devices the last has none, only padding.
LATENTS = (2, 4, 3, 2, 6)
CONFIG = DenoiserConfig(
    num_layers=2, dim=32, num_heads=4, ffn_dim=48, in_channels=4, out_channels=4, text_dim=12, text_length=7
)


def inputs() -> tuple[jax.Array, jax.Array, jax.Array]:
    """Latents, what the velocity is multiplied with, and text."""
    random = np.random.default_rng(0)
    shapes = LATENTS, LATENTS, (LATENTS[0], CONFIG.text_length, CONFIG.text_dim)
    latents, weights, text = (jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in shapes)
    return latents, weights, text


def gradients(mesh: str) -> dict[str, np.ndarray]:
    """Of a number that depends on every value of the velocity: by parameters, latents and text."""
    placement = Placement.over(MeshSpec.parse(mesh))
    graphdef, state = nnx.split(random_model(Denoiser, CONFIG, "float32", placement=placement))
    latents, weights, text = inputs()

    def forward(state: nnx.State, latents: jax.Array, text: jax.Array) -> jax.Array:
        denoiser = nnx.merge(graphdef, gather_outside_layers(state))
        return denoiser(latents, jnp.full(latents.shape[:1], 500.0), denoiser.encode_context(text))

    in_specs = state_specs(state), placement.batch, placement.batch
    forward = placement.run(forward, in_specs, placement.batch)

    def loss(state: nnx.State, latents: jax.Array, text: jax.Array) -> jax.Array:
        return jnp.mean(jnp.sin(forward(state, latents, text)) * weights)

    found = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(state, latents, text)
    leaves, _ = jax.tree_util.tree_flatten_with_path(found)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


@pytest.fixture(scope="module")
def alone() -> dict[str, np.ndarray]:
    return gradients("single")


@pytest.mark.parametrize("mesh", ["data2-tensor2", "ulysses4", "ring4", "ring2-ulysses2", "pipeline2"])
def test_gradients_of_one_device(alone: dict[str, np.ndarray], mesh: str) -> None:
    found = gradients(mesh)
    assert found.keys() == alone.keys()
    largest = max(np.abs(each).max() for each in alone.values())
    for name, expected in alone.items():
        # Sums in another order. Gradients that are nothing but rounding are held to the largest of all.
        assert np.abs(found[name] - expected).max() < 1e-5 * max(np.abs(expected).max(), 1e-2 * largest), name


def test_a_mesh_with_explicit_axes() -> None:
    def run(placement: Placement) -> np.ndarray:
        latents, _, text = inputs()
        model = random_model(Denoiser, CONFIG, "float32", placement=placement)
        latents, text = placement.put_batch((latents, text))
        expert = Expert.prepare(model, text, -text, placement=placement)
        schedule = make_schedule("official", "unipc", 2, 5.0)
        result = denoise(latents, plan_segments(schedule, get_solver("unipc"), 3.0, None), lambda name: expert, Run())
        return np.asarray(result)

    mesh_spec = MeshSpec(data=2, ulysses=2, tensor=2)
    sizes = tuple(getattr(mesh_spec, name) for name in MESH_AXES)
    mesh = jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Explicit,) * len(sizes))
    with jax.set_mesh(mesh):
        sharded = run(Placement(mesh_spec, mesh))
    single = run(Placement())
    assert np.abs(sharded - single).max() < 1e-5 * np.abs(single).max()  # as under a mesh of Auto axes
