import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels.attention_cases import CASES, Case, attention_float64
from wan_jax.errors import InputError
from wan_jax.kernels.attention import BACKENDS, attention, chunked, cudnn, fastest, reference

# Largest error allowed per output, as a share of sum(p |v|), the size of what is summed.
# bfloat16: the probabilities and the output are each rounded once, by at most 2^-8; the rest is float32's share.
# float32: a few roundings of 2^-24 in logits of up to ~150, which exp makes relative errors of the probabilities.
TOLERANCE = {jnp.float32: 4e-5, jnp.bfloat16: 2**-7 + 4e-5}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("name", BACKENDS)
def test_backend_agrees_with_float64_or_refuses(name, case, dtype):
    query, key, value = case.inputs(dtype)
    scale = case.head_dim**-0.5
    if reason := BACKENDS[name].supports(query, key, value):
        with pytest.raises(InputError, match=re.escape(reason)):
            attention(query, key, value, implementation=name)
        return
    output = jax.jit(lambda *inputs: attention(*inputs, implementation=name))(query, key, value)
    assert output.dtype == dtype
    expected = attention_float64(query, key, value, scale)
    assert output.shape == expected.shape
    error = np.abs(np.asarray(output, np.float64) - expected) / attention_float64(query, key, abs(value), scale)
    assert error.max() < TOLERANCE[dtype]


@pytest.mark.parametrize("implementation", [None, "reference", "chunked"])
def test_scale_is_used(implementation):
    query, key, value = Case("scale", 1, 20, 30, 2, 12).inputs(jnp.float32)
    output = attention(query, key, value, scale=0.7, implementation=implementation)
    np.testing.assert_allclose(output, attention_float64(query, key, value, 0.7), atol=1e-5)  # as TOLERANCE


def test_chunked_gradients_agree_with_the_reference():
    inputs = Case("gradients", 1, 1031, 601, 2, 12).inputs(jnp.float32)
    weights = jnp.asarray(np.random.default_rng(0).normal(size=inputs[0].shape), jnp.float32)

    def gradients(name):
        def loss(*inputs):
            return jnp.sum(attention(*inputs, implementation=name) * weights)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*inputs)

    for ours, expected in zip(gradients("chunked"), gradients("reference"), strict=True):
        # Sums of ~1000 float32 terms in another order.
        assert jnp.abs(ours - expected).max() < 1e-5 * jnp.abs(expected).max()


@pytest.mark.parametrize("differentiate", [False, True], ids=["forward", "gradient"])
def test_chunked_memory_is_not_quadratic(differentiate):
    """Compiled for one head of a full 720p video (75,600 tokens), not run."""
    length = 75_600
    tokens = jax.ShapeDtypeStruct((1, length, 1, 128), jnp.bfloat16)

    def temporary_bytes(backend):
        def run(*inputs):
            return backend.attention(*inputs, scale=1.0).astype(jnp.float32).sum()

        function = jax.grad(run, argnums=(0, 1, 2)) if differentiate else run
        return jax.jit(function).lower(tokens, tokens, tokens).compile().memory_analysis().temp_size_in_bytes

    logits_bytes = 4 * length * length
    assert temporary_bytes(reference) > logits_bytes  # the measure sees what it should
    assert temporary_bytes(chunked) < logits_bytes / 50


def test_unknown_implementation_names_the_known_ones():
    query, key, value = CASES[0].inputs(jnp.float32)
    with pytest.raises(InputError, match=r"unknown attention implementation 'flash'; use one of .*reference, chunked"):
        attention(query, key, value, implementation="flash")


@pytest.mark.parametrize(
    ("key_shape", "value_shape", "dtype", "message"),
    [
        ((1, 7, 2, 16), (1, 7, 2, 16), jnp.float32, "needs a query"),  # head width
        ((1, 7, 2, 8), (1, 6, 2, 8), jnp.float32, "needs a query"),  # key and value lengths
        ((2, 7, 2, 8), (2, 7, 2, 8), jnp.float32, "needs a query"),  # batch
        ((1, 7, 2, 8), (1, 7, 2, 8), jnp.bfloat16, "one dtype"),
    ],
)
def test_inputs_that_do_not_fit(key_shape, value_shape, dtype, message):
    with pytest.raises(InputError, match=message):
        attention(jnp.zeros((1, 3, 2, 8)), jnp.zeros(key_shape, dtype), jnp.zeros(value_shape, dtype))


def on_device(monkeypatch, capability: str | None, platform_version: str = "PJRT C API cuda 13000"):
    """Pretends that JAX runs on a GPU of this compute capability."""
    device = SimpleNamespace(
        platform="gpu", compute_capability=capability, client=SimpleNamespace(platform_version=platform_version)
    )
    monkeypatch.setattr(jax, "devices", lambda: [device])


@pytest.mark.parametrize(
    ("capability", "platform_version", "dtype", "head_dim", "reason"),
    [
        ("9.0", "cuda 13000", jnp.bfloat16, 128, None),
        ("9.0", "cuda 13000", jnp.float16, 256, None),
        ("8.0", "cuda 13000", jnp.bfloat16, 128, None),
        ("8.0", "cuda 13000", jnp.bfloat16, 256, "at most 128"),
        ("9.0", "cuda 13000", jnp.bfloat16, 264, "at most 256"),
        ("9.0", "cuda 13000", jnp.bfloat16, 12, "divisible by 8, not 12"),
        ("9.0", "cuda 13000", jnp.float32, 128, "needs bfloat16 or float16"),
        ("gfx942", "rocm 70000", jnp.bfloat16, 128, "needs an NVIDIA GPU"),
    ],
)
def test_what_cudnn_supports(monkeypatch, capability, platform_version, dtype, head_dim, reason):
    on_device(monkeypatch, capability, platform_version)
    tokens = jnp.zeros((1, 3, 2, head_dim), dtype)
    answer = cudnn.supports(tokens, tokens, tokens)
    assert answer is None if reason is None else reason in answer


def test_cudnn_on_a_cpu_says_why(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices(backend="cpu"))
    tokens = jnp.zeros((1, 3, 2, 64), jnp.bfloat16)
    with pytest.raises(InputError, match="'cudnn' cannot run here: it needs an NVIDIA GPU and JAX runs on cpu"):
        attention(tokens, tokens, tokens, implementation="cudnn")


def test_the_fastest_is_chosen_by_device_and_size(monkeypatch):
    def choice(length, dtype):
        tokens = jax.ShapeDtypeStruct((1, length, 40, 128), dtype)
        return fastest(tokens, tokens, tokens)

    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices(backend="cpu"))
    assert choice(64, jnp.bfloat16) == "reference"
    assert choice(75_600, jnp.bfloat16) == "chunked"
    on_device(monkeypatch, "9.0")
    assert choice(75_600, jnp.bfloat16) == "cudnn"
    assert choice(75_600, jnp.float32) == "chunked"
