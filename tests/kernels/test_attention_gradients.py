"""Gradients of every backend against those of the reference in float32. Pallas kernels run in JAX's interpreters."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from tests.kernels.attention_cases import LIST_CASES, Case, attention_float64
from wan_jax.kernels.attention import (
    BACKENDS,
    HOPPER_LIST_SIZES,
    PallasBackend,
    attention,
    cudnn,
    pallas_gpu,
    reference,
    unsupported_by_hopper,
)
from wan_jax.kernels.attention.backward import CUDNN_FORWARD, keeps_attention, with_recomputed_gradients
from wan_jax.kernels.attention.block_lists import from_key_ranges

# Errors as a share of the largest gradient.
# float32: sums of ~1000 terms in another order.
# bfloat16: probabilities, logits' gradients, output and result are rounded by up to 2^-9 each, with random signs.
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 2**-7}

CASES = {
    "several_chunks": Case("several_chunks", 1, 1031, 601, 2, 12),
    "batch_and_lse": Case("batch_and_lse", 2, 37, 53, 3, 64, return_lse=True),
    "one_query": Case("one_query", 2, 1, 700, 2, 64),
    "one_key": Case("one_key", 1, 130, 1, 2, 64),
    "large_logits": Case("large_logits", 1, 130, 201, 1, 64, query_scale=30.0, return_lse=True),
} | {case.name: case for case in LIST_CASES}


def gradients(case, name, inputs):
    """Of a random linear function of the output and, where returned, of the log-sum-exp."""
    generator = np.random.default_rng(0)
    output_weights = jnp.asarray(generator.normal(size=inputs[0].shape), jnp.float32)
    lse_weights = jnp.asarray(generator.normal(size=(case.batch, case.heads, case.query_length)), jnp.float32)
    lists = case.block_lists

    def loss(*inputs):
        result = attention(*inputs, block_lists=lists, return_lse=case.return_lse, implementation=name)
        output, lse = result if case.return_lse else (result, jnp.zeros(()))
        return jnp.sum(output * output_weights) + jnp.sum(jnp.where(lse > -jnp.inf, lse, 0.0) * lse_weights)

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*inputs)


def check(case, name, dtype):
    inputs = case.inputs(dtype)
    expected = gradients(case, "reference", [x.astype(jnp.float32) for x in inputs])
    largest = [float(jnp.abs(x).max()) for x in expected]
    if case.key_length == 1:  # query and key have no influence: the exact gradients are 0
        largest = [max(largest)] * 3
    for ours, exact, size in zip(gradients(case, name, inputs), expected, largest, strict=True):
        assert ours.dtype == dtype
        assert jnp.abs(ours - exact).max() <= TOLERANCE[dtype] * size


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_chunked_gradients(case, dtype):
    check(case, "chunked", dtype)


def interpreted(monkeypatch, name, params):
    monkeypatch.setitem(BACKENDS, name, dataclasses.replace(BACKENDS[name], interpret=params))


@pytest.mark.parametrize(
    ("name", "dtype"), [("batch_and_lse", jnp.float32), ("one_query", jnp.bfloat16), ("unseeing_queries", jnp.bfloat16)]
)
def test_pallas_tpu_gradients(monkeypatch, name, dtype):
    interpreted(monkeypatch, "pallas_tpu", pltpu.InterpretParams())
    check(CASES[name], "pallas_tpu", dtype)


if jax.__version_info__ >= pallas_gpu.JAX_NEEDED:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    @pytest.mark.parametrize("name", ["batch_and_lse", "one_key", "unseeing_queries"])
    def test_pallas_gpu_gradients(monkeypatch, name):
        interpreted(monkeypatch, "pallas_gpu", plgpu.InterpretGPUParams())
        check(CASES[name], "pallas_gpu", jnp.bfloat16)


def test_reference_gradients_agree_with_differences():
    """The one that the others are compared with: against finite differences in float64."""
    case = CASES["unseeing_queries"]
    query, key, value = (np.asarray(x, np.float64) for x in case.inputs(jnp.float32))
    weights = np.random.default_rng(0).normal(size=query.shape)

    def loss(query, key, value):
        return (attention_float64(query, key, value, 64**-0.5, case.mask) * weights).sum()

    def loss_float32(*inputs):
        return jnp.sum(attention(*inputs, block_lists=case.block_lists, implementation="reference") * weights)

    slopes = jax.grad(loss_float32, argnums=(0, 1, 2))(*(jnp.asarray(x, jnp.float32) for x in (query, key, value)))
    generator, step = np.random.default_rng(1), 1e-4
    for argument, slope in enumerate(slopes):
        direction = generator.normal(size=slope.shape)
        ends = []
        for sign in (1, -1):
            moved = [query, key, value]
            moved[argument] = moved[argument] + sign * step * direction
            ends.append(loss(*moved))
        # Differences err by the square of the step, 1e-8; float32 sums of 10,000 terms of both signs by 1e-5.
        np.testing.assert_allclose(np.vdot(slope, direction), (ends[0] - ends[1]) / (2 * step), rtol=1e-4)


class KernelsOfCudnn:
    """Stands in for cuDNN on a CPU: the reference, with JAX's rule for what may be differentiated."""

    def __init__(self, monkeypatch):
        self.calls = 0
        monkeypatch.setattr(cudnn, "run", self.run)
        monkeypatch.setattr(cudnn, "supports", self.supports)

    def run(self, query, key, value, *, scale):
        self.calls += 1
        even = query.shape[1] % 2 == key.shape[1] % 2 == 0
        return (reference.attention if even else undifferentiable)(query, key, value, scale=scale)

    def supports(self, *inputs, block_lists=None, return_lse=False):
        return "neither" if return_lse or block_lists is not None else None


@jax.custom_vjp
def undifferentiable(query, key, value, scale):
    return reference.attention(query, key, value, scale=scale)


def refuse(*args):
    raise NotImplementedError("Unsupported sequence length")


undifferentiable.defvjp(refuse, refuse)


class KernelWithoutGradients:
    """A Pallas kernel's module: the reference."""

    calls = 0

    def supports(self, *inputs):
        return None

    def unsupported_shape(self, query):
        return None

    def attention(self, *inputs, interpret, **options):
        self.calls += 1
        return jax.tree.map(jax.lax.stop_gradient, reference.attention(*inputs, **options))


@pytest.mark.parametrize(
    ("query_length", "key_length", "return_lse", "by_cudnn"),
    [(8, 6, False, True), (8, 6, True, False), (7, 6, False, False), (8, 5, False, False)],
)
def test_which_kernel_a_differentiated_call_runs(monkeypatch, query_length, key_length, return_lse, by_cudnn):
    """cuDNN's where it can go backward; ours, and recomputing, where it cannot. Its own backend likewise."""
    stand_in, kernel = KernelsOfCudnn(monkeypatch), KernelWithoutGradients()
    monkeypatch.setitem(BACKENDS, "pallas_gpu", PallasBackend(kernel, unsupported_by_hopper))
    inputs = Case("dispatch", 1, query_length, key_length, 2, 64).inputs(jnp.float32)

    def loss(name, *inputs):
        result = attention(*inputs, scale=0.1, return_lse=return_lse, implementation=name)
        return (result[0] if return_lse else result).sum()

    for name in ("pallas_gpu",) if return_lse else ("pallas_gpu", "cudnn"):
        jax.make_jaxpr(jax.grad(functools.partial(loss, name), argnums=(0, 1, 2)))(*inputs)
        assert (stand_in.calls > 0) == by_cudnn
        assert (kernel.calls > 0) == (name == "pallas_gpu" and not by_cudnn)
        stand_in.calls = kernel.calls = 0
        jax.make_jaxpr(functools.partial(loss, name))(*inputs)  # not differentiated: always its own kernel
        assert (stand_in.calls > 0, kernel.calls > 0) == (name == "cudnn", name == "pallas_gpu")
        stand_in.calls = kernel.calls = 0


def test_cudnns_gradients_at_odd_lengths(monkeypatch):
    KernelsOfCudnn(monkeypatch)
    inputs = Case("dispatch", 1, 7, 5, 2, 64).inputs(jnp.float32)

    def loss(name, *inputs):
        return jnp.sum(attention(*inputs, scale=0.1, implementation=name) ** 2)

    differentiate = jax.jit(jax.grad(loss, argnums=(1, 2, 3)), static_argnums=0)
    for ours, expected in zip(differentiate("cudnn", *inputs), differentiate("reference", *inputs), strict=True):
        assert jnp.abs(ours - expected).max() <= TOLERANCE[jnp.float32] * jnp.abs(expected).max()


@pytest.mark.parametrize("lengths", [(64, 64), (63, 64), (64, 63), (1, 1)])
def test_what_is_said_of_cudnns_gradients_is_jaxs_rule(monkeypatch, lengths):
    """JAX traces cuDNN's attention without a GPU, once it believes that there is a cuDNN."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91_100)
    query, key = (jax.ShapeDtypeStruct((1, length, 2, 64), jnp.bfloat16) for length in lengths)

    def differentiate(query, key):
        output, vjp = jax.vjp(lambda q, k, v: cudnn.run(q, k, v, scale=0.1), query, key, key)
        return vjp(output)

    if cudnn.differentiates(query, key):
        assert jax.eval_shape(differentiate, query, key)[0].shape == query.shape
    else:
        with pytest.raises(NotImplementedError, match="sequence length"):
            jax.eval_shape(differentiate, query, key)


def scanned(x, scales, name):
    """As a model in training calls attention: layers scanned, each recomputed in the backward pass."""

    def layer(x, scale):
        y = x * scale.astype(x.dtype)
        return x + attention(y, y, y, implementation=name), None

    return jax.lax.scan(jax.checkpoint(layer), x, scales)[0].sum()


def test_gradients_under_rematerialisation_and_scan():
    x, _, _ = Case("layers", 1, 30, 30, 1, 64).inputs(jnp.float32)
    differentiate = jax.jit(jax.grad(scanned, argnums=(0, 1)), static_argnums=2)
    scales = jnp.array([0.5, 1.5])
    for ours, expected in zip(differentiate(x, scales, "chunked"), differentiate(x, scales, "reference"), strict=True):
        assert jnp.abs(ours - expected).max() <= TOLERANCE[jnp.float32] * jnp.abs(expected).max()


@pytest.mark.parametrize(
    ("name", "platform", "custom_call"),
    [
        ("pallas_tpu", "tpu", "@tpu_custom_call"),
        *([("pallas_gpu", "cuda", "@mosaic_gpu_v2")] if jax.__version_info__ >= pallas_gpu.JAX_NEEDED else []),
    ],
)
def test_gradients_lower_at_the_real_shape(monkeypatch, name, platform, custom_call):
    """The forward kernel once, and once more for what its recomputed gradients need."""
    monkeypatch.setattr(type(BACKENDS[name]), "supports", lambda *inputs, **options: None)
    x = jax.ShapeDtypeStruct((1, 75_600, 40, 128), jnp.bfloat16)
    scales = jax.ShapeDtypeStruct((40,), jnp.float32)
    traced = jax.jit(jax.grad(scanned), static_argnums=2).trace(x, scales, name)
    assert traced.lower(lowering_platforms=(platform,)).as_text().count(f"custom_call {custom_call}") == 2


if jax.__version_info__ >= pallas_gpu.JAX_NEEDED:

    @pytest.mark.parametrize("head_dim", [64, 128])
    @pytest.mark.parametrize("sizes", sorted(HOPPER_LIST_SIZES), ids=str)
    def test_what_is_said_of_hopper_lists(sizes, head_dim):
        """Lists of every size that `supports` admits lower for CUDA, where shared memory is counted."""
        query_tile, key_block = sizes
        lists = from_key_ranges(np.tile([0, 700], (1000, 1)), 1000, query_tile=query_tile, key_block=key_block)
        assert unsupported_by_hopper(lists) is None
        x = jax.ShapeDtypeStruct((1, 1000, 2, head_dim), jnp.bfloat16)
        run = jax.jit(lambda x, lists: pallas_gpu.attention(x, x, x, block_lists=lists, return_lse=True))
        assert "mosaic_gpu_v2" in run.trace(x, lists).lower(lowering_platforms=("cuda",)).as_text()


def layers_with_kept_attention(x, scales, attend):
    """As `scanned`; the backward pass keeps what attention computed."""

    def layer(x, scale):
        y = x * scale.astype(x.dtype)
        return x + attend(y), None

    step = jax.checkpoint(layer, policy=keeps_attention, prevent_cse=False)
    return jax.lax.scan(step, x, scales)[0].astype(jnp.float32).sum()


def test_kept_attention_is_not_computed_again():
    """Its forward pass is in the program once; without the policy it would be twice."""
    calls = []

    def attend(y):
        calls.append(y)
        return with_recomputed_gradients(forward, y, y, y, scale=0.1, block_lists=None, return_lse=False)

    def forward(query, key, value, *, scale, block_lists, return_lse):
        output, lse = attention(query, key, value, scale=scale, return_lse=True, implementation="reference")
        output = jnp.sinh(output)  # marks the forward pass
        return (output, lse) if return_lse else output

    x, scales = jnp.ones((1, 30, 1, 64)), jnp.ones(3)
    program = str(jax.make_jaxpr(jax.grad(layers_with_kept_attention), static_argnums=2)(x, scales, attend))
    assert program.count("sinh ") == 1
    assert calls


def test_kept_attention_of_cudnn(monkeypatch):
    """By JAX's own name for the kernel, which is no public one."""
    fused = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda *arguments, **options: 91000)
    monkeypatch.setattr(fused, "check_compute_capability", lambda *arguments, **options: True)
    x = jax.ShapeDtypeStruct((1, 1024, 2, 128), jnp.bfloat16)
    scales = jax.ShapeDtypeStruct((3,), jnp.float32)
    differentiate = jax.jit(jax.grad(layers_with_kept_attention), static_argnums=2)
    program = str(differentiate.trace(x, scales, lambda y: cudnn.attention(y, y, y, scale=0.1)).jaxpr)
    assert program.count(f"{CUDNN_FORWARD}[") == 1
    assert program.count("dot_product_attention_bwd_wrapper[") == 1
