"""Kernels in 8 bits: another format under Linear, with LoRAs, meshes and offload as for any other."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.parallel.test_strategies import CONFIG, LATENTS
from wan_jax.lora.adapters import adapt, find_linear
from wan_jax.models.build import build_model
from wan_jax.models.denoiser import Denoiser
from wan_jax.models.nn.linear import Adapter
from wan_jax.models.nn.weights import Dense, Scaled, quantize_layers
from wan_jax.parallel.mesh_spec import MeshSpec
from wan_jax.parallel.placement import Placement
from wan_jax.parallel.sharding import gather_outside_layers, state_specs
from wan_jax.parameters import abstract_parameters, named_parameters, with_parameters
from wan_jax.runtime.offload import PROFILES, Memory, place
from wan_jax.testing.models import random_model

DTYPES = [jnp.int8, jnp.float8_e4m3fn]
QUERY = "blocks.self_attention.query"


def random(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.fixture(scope="module")
def model() -> Denoiser:
    return random_model(Denoiser, CONFIG, "float32")


def velocity(model: Denoiser) -> np.ndarray:
    def forward(model: Denoiser, latents: jax.Array, timesteps: jax.Array, text: jax.Array) -> jax.Array:
        return model(latents, timesteps, model.encode_context(text))

    inputs = random(1, 2, *LATENTS), jnp.array([937.0, 12.0]), random(2, 2, CONFIG.text_length, CONFIG.text_dim)
    return np.asarray(jax.jit(forward)(model, *inputs))


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(theirs**2)))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: jnp.dtype(dtype).name)
def test_the_product_is_that_of_the_rounded_kernel(dtype):
    kernel = Dense(random(0, 64, 48) * jnp.logspace(-3, 3, 48), axes=("embed", "mlp"))
    scaled = Scaled.quantize(kernel, dtype)
    assert (scaled.values.dtype, scaled.shape, scaled.axes) == (dtype, kernel.shape, ("embed", "mlp"))
    largest = jnp.abs(kernel.dense()).max(axis=0)
    step = 0.5 / 127 if dtype == jnp.int8 else 2**-4  # half a step of int8; half an ulp of 3 bits of mantissa
    assert (jnp.abs(scaled.dense() - kernel.dense()) <= step * largest * 1.001).all()
    x = random(1, 5, 64)
    np.testing.assert_allclose(scaled.dot(x), x @ scaled.dense(), rtol=2e-5, atol=2e-5 * float(largest.max()))
    assert scaled.dot(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    zeros = Scaled.quantize(Dense(jnp.zeros((4, 2)), axes=(None, None)), dtype)
    np.testing.assert_array_equal(zeros.dense(), 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: jnp.dtype(dtype).name)
def test_a_model_in_8_bits(model, dtype):
    quantized = quantize_layers(model, dtype)
    names, before = named_parameters(quantized), named_parameters(model)
    assert names[f"{QUERY}.kernel.values"].dtype == dtype
    assert names[f"{QUERY}.kernel.scale"].shape == (CONFIG.num_layers, CONFIG.dim)
    assert all(names[name] is before[name] for name in names.keys() & before.keys())
    assert f"{QUERY}.kernel" in before  # the model that it was made from stays as it was
    assert names["head.linear.kernel"] is before["head.linear.kernel"]
    error = distance(velocity(quantized), velocity(model))
    assert 1e-4 < error < (0.02 if dtype == jnp.int8 else 0.06)


def test_abstract_tree_and_parameters_from_outside(model):
    def build() -> Denoiser:
        return quantize_layers(build_model(CONFIG, jnp.float32), jnp.int8)

    quantized = quantize_layers(model, jnp.int8)
    tree = abstract_parameters(build)
    assert tree.keys() == named_parameters(quantized).keys()
    assert tree[f"{QUERY}.kernel.values"].axes == ("layers", "embed", "heads")
    assert tree[f"{QUERY}.kernel.scale"].axes == ("layers", "heads")
    again = with_parameters(build, named_parameters(quantized))
    np.testing.assert_array_equal(velocity(again), velocity(quantized))


@pytest.mark.parametrize("merge", [True, False])
def test_a_lora_around_it(model, merge):
    quantized = quantize_layers(model, jnp.int8)
    layers, rank = CONFIG.num_layers, 4
    down, up = random(3, layers, CONFIG.dim, rank), random(4, layers, rank, CONFIG.dim)
    kernel = find_linear(quantized, QUERY).kernel
    adapter = Adapter(down, up, jnp.full((layers, rank), 0.05), axes=kernel.axes, merge=merge)
    adapted = adapt(quantized, {QUERY: adapter})
    changed = kernel.dense() + 0.05 * jnp.einsum("lir,lro->lio", down, up)
    expected = with_parameters(
        partial(build_model, CONFIG, jnp.float32),
        {
            name: changed
            if name == f"{QUERY}.kernel"
            else find_linear(quantized, name.removesuffix(".kernel")).kernel.dense()
            if name.startswith("blocks.") and name.endswith(".kernel")
            else array
            for name, array in named_parameters(model).items()
        },
    )
    assert distance(velocity(adapted), velocity(quantized)) > 1e-3
    assert distance(velocity(adapted), velocity(expected)) < 1e-5


@pytest.mark.parametrize("mesh", ["tensor4", "fsdp2-tensor2", "pipeline2-ulysses2"])
def test_on_a_mesh(model, mesh):
    placement = Placement.over(MeshSpec.parse(mesh))
    quantized = quantize_layers(model, jnp.int8)

    def build() -> Denoiser:
        return quantize_layers(build_model(CONFIG, jnp.float32), jnp.int8)

    placed = place(quantized, placement.parameter_shardings(abstract_parameters(build)))
    graphdef, state = nnx.split(placed)

    def forward(state, latents, timesteps, text):
        model = nnx.merge(graphdef, gather_outside_layers(state))
        return model(latents, timesteps, model.encode_context(text))

    inputs = random(1, 2, *LATENTS), jnp.array([937.0, 12.0]), random(2, 2, CONFIG.text_length, CONFIG.text_dim)
    run = placement.run(forward, (state_specs(state), *[placement.batch] * 3), placement.batch)
    result = jax.jit(run)(state, *map(placement.put_batch, inputs))
    assert distance(np.asarray(result), velocity(quantized)) < 1e-5


def test_streaming(model):
    """The values wait on the host like any kernel; the scales, which are small, do not."""
    quantized = quantize_layers(model, jnp.int8)
    memory = Memory(PROFILES["stream"], jax.devices()[0])
    with memory.on_device(quantized) as streamed:
        kinds = {name: array.sharding.memory_kind for name, array in named_parameters(streamed).items()}
        assert kinds[f"{QUERY}.kernel.values"] == "pinned_host"
        assert kinds[f"{QUERY}.kernel.scale"] != "pinned_host"
        np.testing.assert_array_equal(velocity(streamed), velocity(quantized))
