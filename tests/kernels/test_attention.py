"""Every backend that runs on this device against float64, and the choice among them.

What needs another device says so here; test_pallas_gpu_attention.py and test_pallas_tpu_attention.py interpret it.
"""

import dataclasses
import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels.attention_cases import CASES, LIST_CASES, SIZES, Case, attention_and_lse_float64, lists_per_head
from wan_jax.kernels.attention import BACKENDS, attention, chunked, cudnn, fastest, pallas_gpu, reference
from wan_jax.kernels.attention.block_lists import BlockLists, temporal_window

# Largest error allowed per output, as a share of sum(p |v|), the size of what is summed.
# bfloat16: the probabilities and the output are each rounded once, by at most 2^-8; the rest is float32's share.
# float32: a few roundings of 2^-24 in logits of up to ~150, which exp makes relative errors of the probabilities.
TOLERANCE = {jnp.float32: 4e-5, jnp.bfloat16: 2**-7 + 4e-5}
LSE_TOLERANCE = 1e-5  # float32 sums of up to 1000 terms, and logits of up to 150


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("case", CASES + LIST_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("name", BACKENDS)
def test_backend_agrees_with_float64_or_refuses(name, case, dtype):
    query, key, value = case.inputs(dtype)
    options = {"block_lists": case.block_lists, "return_lse": case.return_lse}
    if reason := BACKENDS[name].supports(query, key, value, **options):
        with pytest.raises(ValueError, match=re.escape(reason)):
            attention(query, key, value, **options, implementation=name)
        return
    result = jax.jit(lambda q, k, v: attention(q, k, v, **options, implementation=name))(query, key, value)
    output, lse = result if case.return_lse else (result, None)
    scale = case.head_dim**-0.5
    expected, expected_lse = attention_and_lse_float64(query, key, value, scale, case.mask)
    size, _ = attention_and_lse_float64(query, key, abs(value), scale, case.mask)
    assert output.dtype == dtype
    assert output.shape == expected.shape
    error = np.abs(np.asarray(output, np.float64) - expected)
    assert (error <= TOLERANCE[dtype] * size).all()  # and exactly 0 where nothing is seen
    if case.return_lse:
        assert lse.dtype == jnp.float32
        np.testing.assert_allclose(lse, expected_lse, rtol=LSE_TOLERANCE, atol=LSE_TOLERANCE)


@pytest.mark.parametrize("implementation", [None, "reference", "chunked"])
def test_scale_is_used(implementation):
    query, key, value = Case("scale", 1, 20, 30, 2, 12).inputs(jnp.float32)
    output = attention(query, key, value, scale=0.7, implementation=implementation)
    expected, _ = attention_and_lse_float64(query, key, value, 0.7)
    np.testing.assert_allclose(output, expected, atol=1e-5)  # as TOLERANCE


@pytest.mark.parametrize("differentiate", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("lists", [False, True], ids=["dense", "lists"])
def test_chunked_memory_is_not_quadratic(differentiate, lists):
    """Compiled for one head of a full 720p video (75,600 tokens), not run."""
    length = 75_600
    tokens = jax.ShapeDtypeStruct((1, length, 1, 128), jnp.bfloat16)
    block_lists = None
    if lists:
        integers = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
        block_lists = BlockLists(integers((591, 296)), integers((591,)), integers((591,)), integers((length, 2)))

    def temporary_bytes(backend):
        def run(block_lists, *inputs):
            return backend.attention(*inputs, scale=1.0, block_lists=block_lists).astype(jnp.float32).sum()

        function = jax.grad(run, argnums=(1, 2, 3)) if differentiate else run
        compiled = jax.jit(function).lower(block_lists, tokens, tokens, tokens).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits_bytes = 4 * length * length
    assert temporary_bytes(reference) > logits_bytes  # the measure sees what it should
    assert temporary_bytes(chunked) < logits_bytes / 50


def test_bad_values():
    x = jnp.zeros((1, 300, 2, 8))
    with pytest.raises(ValueError, match=r"positive scale, not -1\.0"):
        attention(x, x, x, scale=-1.0)
    with pytest.raises(ValueError, match="at least one"):
        attention(x[:, :0], x, x)
    lists = BlockLists(jnp.zeros((2, 1), int), jnp.zeros(2, int), **SIZES)
    with pytest.raises(ValueError, match="do not fit 300 queries"):
        attention(x, x, x, block_lists=lists)


def test_unknown_implementation_names_the_known_ones():
    query, key, value = CASES[0].inputs(jnp.float32)
    with pytest.raises(ValueError, match=r"unknown attention implementation 'flash'; use one of .*reference, chunked"):
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
    with pytest.raises(ValueError, match=message):
        attention(jnp.zeros((1, 3, 2, 8)), jnp.zeros(key_shape, dtype), jnp.zeros(value_shape, dtype))


def on_device(monkeypatch, capability: str | None, platform_version: str = "PJRT C API cuda 13000"):
    """Pretends that JAX runs on a GPU of this compute capability, or on a TPU."""
    device = SimpleNamespace(
        platform="tpu" if capability is None else "gpu",
        compute_capability=capability,
        device_kind="pretended",
        client=SimpleNamespace(platform_version=platform_version),
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
    with pytest.raises(ValueError, match="'cudnn' cannot run here: it needs an NVIDIA GPU and JAX runs on cpu"):
        attention(tokens, tokens, tokens, implementation="cudnn")


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"block_lists": lists_per_head()}, "no block lists"), ({"return_lse": True}, "log-sum-exp")],
)
def test_what_cudnn_does_not_have(monkeypatch, options, reason):
    on_device(monkeypatch, "9.0")
    tokens = jnp.zeros((1, 300, 2, 64), jnp.bfloat16)
    assert reason in cudnn.supports(tokens, tokens, tokens, **options)


def test_the_fastest_is_chosen_by_device_size_and_features(monkeypatch):
    def choice(length, dtype, **options):
        tokens = jax.ShapeDtypeStruct((1, length, 40, 128), dtype)
        return fastest(tokens, tokens, tokens, **options)

    lists = temporal_window((21, 45, 80), 1)
    small_lists = temporal_window((21, 45, 80), 1, query_tile=64, key_block=64)

    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices(backend="cpu"))
    assert choice(64, jnp.bfloat16) == "reference"
    assert choice(75_600, jnp.bfloat16) == "chunked"
    assert choice(75_600, jnp.bfloat16, block_lists=lists, return_lse=True) == "chunked"

    on_device(monkeypatch, "9.0")
    monkeypatch.setattr(pallas_gpu, "JAX_NEEDED", (0, 10, 0))
    assert choice(75_600, jnp.bfloat16) == "pallas_gpu"
    assert choice(75_600, jnp.bfloat16, block_lists=lists, return_lse=True) == "pallas_gpu"
    assert choice(75_600, jnp.bfloat16, block_lists=small_lists) == "chunked"
    assert choice(75_600, jnp.float16) == "cudnn"
    assert choice(75_600, jnp.float32) == "chunked"
    monkeypatch.setattr(pallas_gpu, "JAX_NEEDED", (9, 9, 9))
    assert choice(75_600, jnp.bfloat16) == "cudnn"

    on_device(monkeypatch, "8.0")
    assert choice(75_600, jnp.bfloat16) == "cudnn"
    assert choice(75_600, jnp.bfloat16, return_lse=True) == "chunked"

    on_device(monkeypatch, None)
    for dtype in (jnp.bfloat16, jnp.float32):
        assert choice(75_600, dtype) == "pallas_tpu"
        assert choice(75_600, dtype, block_lists=small_lists, return_lse=True) == "pallas_tpu"
    assert choice(75_600, jnp.float16) == "chunked"


@pytest.mark.parametrize("options", [{"block_lists": lists_per_head()}, {"return_lse": True}], ids=["lists", "lse"])
def test_the_chosen_one_has_what_is_asked_for(monkeypatch, options):
    on_device(monkeypatch, "8.0")
    inputs = Case("chosen", 1, 300, 330, 2, 64).inputs(jnp.bfloat16)
    with pytest.raises(ValueError, match="'cudnn' cannot run here"):
        attention(*inputs, **options, implementation="cudnn")
    chosen, expected = (attention(*inputs, **options, implementation=name) for name in (None, "reference"))
    jax.tree.map(np.testing.assert_array_equal, chosen, expected)


def test_named_kernels_say_what_they_cannot_run(monkeypatch):
    tokens = jnp.zeros((1, 300, 2, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="'pallas_tpu' cannot run here: it needs a TPU"):
        attention(tokens, tokens, tokens, implementation="pallas_tpu")
    monkeypatch.setattr(pallas_gpu, "JAX_NEEDED", (0, 10, 0))
    with pytest.raises(ValueError, match="'pallas_gpu' cannot run here: it needs a Hopper GPU"):
        attention(tokens, tokens, tokens, implementation="pallas_gpu")
    on_device(monkeypatch, "9.0")
    lists = BlockLists(jnp.zeros((5, 1), int), jnp.zeros(5, int), query_tile=64, key_block=64)
    with pytest.raises(ValueError, match=r"sizes \[\(128, 64\), .*, not \(64, 64\)"):
        attention(tokens, tokens, tokens, block_lists=lists, implementation="pallas_gpu")
    on_device(monkeypatch, None)
    lists = dataclasses.replace(lists, key_block=72)
    with pytest.raises(ValueError, match="multiples of 16, not 64 queries and 72 keys"):
        attention(tokens, tokens, tokens, block_lists=lists, implementation="pallas_tpu")
