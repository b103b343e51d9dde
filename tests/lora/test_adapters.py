"""Adapters on Linears: the merged kernel, the form for training, and what they leave alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wan_jax.config import DenoiserConfig
from wan_jax.lora.adapters import adapt
from wan_jax.models.denoiser import Denoiser
from wan_jax.models.nn.linear import Adapter, Linear
from wan_jax.parameters import named_parameters
from wan_jax.testing.models import random_model

CONFIG = DenoiserConfig(num_layers=2, dim=36, num_heads=3, ffn_dim=52, text_dim=28, text_length=7, freq_dim=22)
QUERY, UP, HEAD = "blocks.self_attention.query", "blocks.feed_forward.up", "head.linear"
KEY = "blocks.cross_attention.key"  # used outside the step, for the context


def adapter(model: nnx.Module, name: str, rank: int, seed: int = 0, **options) -> Adapter:
    kernel = named_parameters(model)[f"{name}.kernel"]
    *layers, inputs, outputs = kernel.shape
    random = np.random.default_rng((seed, len(name)))
    return Adapter(
        jnp.asarray(random.standard_normal((*layers, inputs, rank), np.float32)),
        jnp.asarray(0.02 * random.standard_normal((*layers, rank, outputs), np.float32)),
        jnp.asarray(random.uniform(0.5, 2, (*layers, rank)).astype(np.float32)),
        axes=("embed", "heads"),
        **options,
    )


def by_hand(model: nnx.Module, adapters: dict[str, Adapter]) -> dict[str, np.ndarray]:
    """float64 kernels before rounding."""
    parameters, changed = named_parameters(model), {}
    for name, one in adapters.items():
        down, up, scale = (np.asarray(array[...], np.float64) for array in (one.down, one.up, one.scale))
        changed[f"{name}.kernel"] = np.asarray(parameters[f"{name}.kernel"], np.float64) + (
            down * scale[..., None, :] @ up
        )
    return changed


def run(model: Denoiser) -> np.ndarray:
    random = np.random.default_rng(5)
    text = jnp.asarray(random.standard_normal((1, 7, 28), np.float32))
    latents = jnp.asarray(random.standard_normal((1, 16, 2, 4, 6), np.float32))

    @jax.jit
    def velocity(model):
        return model(latents, jnp.array([500.0]), model.encode_context(text))

    return np.asarray(velocity(model))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_with_adapters_is_the_merged_model(dtype):
    model = random_model(Denoiser, CONFIG, dtype)
    adapters = {name: adapter(model, name, rank) for name, rank in ((QUERY, 3), (UP, 5), (HEAD, 2), (KEY, 3))}
    kernels = {name: jnp.asarray(kernel, dtype) for name, kernel in by_hand(model, adapters).items()}
    adapted, merged = run(adapt(model, adapters)), run(adapt(model, {}, kernels))
    change = np.linalg.norm(merged - run(model)) / np.linalg.norm(merged)
    error = np.linalg.norm(adapted - merged) / np.linalg.norm(merged)
    assert change > 0.05
    # float32: sums in another order. bfloat16: a sum that lies between two numbers may be rounded to the other one,
    # 2^-8 of a weight, which happens to one in a thousand.
    assert error < (1e-5 if dtype == "float32" else 3e-3)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_merged_kernel_is_rounded_once(dtype):
    linear = Linear(40, 24, axes=(None, None), dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    one = adapter(nnx.Dict(linear=linear), "linear", 6)
    exact = by_hand(nnx.Dict(linear=linear), {"linear": one})["linear.kernel"]
    merged = jax.jit(lambda one, kernel: one.merged(kernel))(one, linear.kernel[...])
    assert merged.dtype == dtype
    # Half a unit in the last place, and float32's own error on top.
    spacing = 2.0 ** np.floor(np.log2(np.abs(exact))) * 2.0 ** -(7 if dtype == jnp.bfloat16 else 23)
    np.testing.assert_array_less(np.abs(np.asarray(merged, np.float64) - exact), 0.5 * spacing + 1e-6)


def test_the_form_for_training_is_the_same_function():
    model = random_model(Denoiser, CONFIG, "float32")
    pairs = [{name: adapter(model, name, 4, merge=merge) for name in (QUERY, UP, HEAD, KEY)} for merge in (True, False)]
    merged, unmerged = (run(adapt(model, adapters)) for adapters in pairs)
    np.testing.assert_allclose(unmerged, merged, atol=2e-5 * np.abs(merged).max())  # sums in another order

    def loss(factors, graphdef, rest):
        latents = jnp.linspace(-1, 1, 16 * 2 * 4 * 6).reshape(1, 16, 2, 4, 6)
        text = jnp.sin(jnp.arange(7 * 28.0)).reshape(1, 7, 28)
        denoiser = nnx.merge(graphdef, factors, rest)
        return jnp.square(denoiser(latents, jnp.array([500.0]), denoiser.encode_context(text))).sum()

    def gradients(adapters):
        graphdef, factors, rest = nnx.split(adapt(model, adapters), nnx.LoRAParam, ...)
        return jax.jit(jax.grad(loss), static_argnums=1)(factors, graphdef, rest)

    ours, theirs = map(gradients, pairs)
    assert len(jax.tree.leaves(ours)) == 8
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(one).max())


def test_the_base_is_shared_and_left_alone():
    model = random_model(Denoiser, CONFIG, "bfloat16")
    before = dict(named_parameters(model))
    bias = f"{QUERY}.bias"
    adapted = adapt(model, {QUERY: adapter(model, QUERY, 3)}, {bias: before[bias] + 1})
    after = named_parameters(adapted)
    assert set(after) - set(before) == {f"{QUERY}.adapter.{part}" for part in ("down", "up", "scale")}
    for name, array in before.items():
        assert named_parameters(model)[name] is array
        assert (after[name] is array) == (name != bias), name
    assert model.blocks.self_attention.query.adapter is None


def test_other_values_of_the_same_rank_compile_nothing():
    model = random_model(Denoiser, CONFIG, "float32")
    step = jax.jit(lambda model: model.blocks.self_attention.query.kernel[...].sum() + model.head.linear.adapter.down)
    for seed in (0, 1):
        step(adapt(model, {HEAD: adapter(model, HEAD, 4, seed)}))
    assert step._cache_size() == 1


@pytest.mark.quick
def test_a_name_that_is_no_linear():
    model = random_model(Denoiser, CONFIG, "float32")
    with pytest.raises(ValueError, match="is a RMSNorm, not a Linear"):
        adapt(model, {"blocks.self_attention.query_norm": adapter(model, QUERY, 1)})
