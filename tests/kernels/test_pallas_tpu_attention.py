"""The TPU kernel without a TPU: run in JAX's TPU interpreter with its race detector, and lowered for TPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from tests.kernels.attention_cases import CASES, LIST_CASES, Case, attention_and_lse_float64
from wan_jax.kernels.attention import pallas_tpu
from wan_jax.kernels.attention.block_lists import BlockLists
from wan_jax.kernels.attention.pallas_tpu import Tuning, attention

# As in test_attention.py: the probabilities and the output are each rounded once, by at most 2^-8, relative to the
# size of what is summed; the rest is float32's share.
TOLERANCE = {jnp.float32: 4e-5, jnp.bfloat16: 2**-7 + 4e-5}
LSE_TOLERANCE = 1e-5  # float32 sums of up to 1000 terms, and logits of up to 150

BY_NAME = {case.name: case for case in CASES + LIST_CASES}
ALSO_IN_FLOAT32 = ("odd_lengths", "large_logits", "lists_per_head")


def run_and_check(case, dtype, **options):
    """attention in the interpreter, races refused, against float64."""
    query, key, value = case.inputs(dtype)
    scale = options.pop("scale", case.head_dim**-0.5)
    lists = options.pop("block_lists", case.block_lists)
    mask = True if lists is None else lists.mask(case.query_length, case.key_length)
    interpret = pltpu.InterpretParams(detect_races=True)
    try:
        output, lse = attention(
            query, key, value, scale=scale, block_lists=lists, return_lse=True, interpret=interpret, **options
        )
        jax.block_until_ready(output)
        assert not interpret_pallas_call.races.races_found
    finally:
        pltpu.reset_tpu_interpret_mode_state()
    expected, expected_lse = attention_and_lse_float64(query, key, value, scale, mask)
    size, _ = attention_and_lse_float64(query, key, abs(value), scale, mask)
    assert (output.dtype, lse.dtype) == (dtype, jnp.float32)
    assert output.shape == expected.shape
    error = np.abs(np.asarray(output, np.float64) - expected)
    assert (error <= TOLERANCE[dtype] * size).all()  # and exactly 0 where nothing is seen
    np.testing.assert_allclose(lse, expected_lse, rtol=LSE_TOLERANCE, atol=LSE_TOLERANCE)


@pytest.mark.parametrize("case", BY_NAME.values(), ids=BY_NAME)
def test_agrees_with_float64(case):
    run_and_check(case, jnp.bfloat16)


@pytest.mark.parametrize("name", ALSO_IN_FLOAT32)
def test_agrees_with_float64_in_float32(name):
    run_and_check(BY_NAME[name], jnp.float32)


@pytest.mark.parametrize("tuning", [Tuning(128, 64), Tuning(48, 32), Tuning(256, 512)], ids=str)
def test_every_tuning_computes_the_same(tuning):
    """Several tiles and blocks of several batches and heads, ragged at both ends; an unusual scale."""
    run_and_check(Case("tunings", 2, 130, 151, 1, 64), jnp.bfloat16, tuning=tuning, scale=0.3)


@pytest.mark.parametrize("lead", [(), (2,), (1, 1), (2, 1), (2, 2)], ids=str)
def test_leading_axes_of_block_lists(lead):
    generator = np.random.default_rng(len(lead))
    shuffled = generator.permuted(np.broadcast_to(np.arange(3, dtype=np.int32), (*lead, 2, 3)), axis=-1)
    counts = generator.integers(0, 3, (*lead, 2), np.int32)
    lists = BlockLists(jnp.asarray(shuffled), jnp.asarray(counts), query_tile=16, key_block=16)
    run_and_check(Case("leading_axes", 2, 20, 45, 2, 64), jnp.bfloat16, block_lists=lists)


def test_unfinished_last_block_that_is_not_partial():
    """Every query sees all that there is of it, whatever its range says."""
    ranges = jnp.tile(jnp.array([[0, 7]], jnp.int32), (20, 1))
    lists = BlockLists(jnp.array([[0, 2], [2, 0]]), jnp.array([2, 1]), jnp.array([1, 0]), ranges, 16, 16)
    run_and_check(Case("unfinished", 1, 20, 45, 1, 64), jnp.bfloat16, block_lists=lists)


def test_without_lse():
    query, key, value = Case("output", 1, 40, 77, 2, 64).inputs(jnp.float32)
    output = attention(query, key, value, interpret=pltpu.InterpretParams())
    expected, _ = attention_and_lse_float64(query, key, value, 64**-0.5)
    np.testing.assert_allclose(output, expected, atol=1e-5)  # values of order 1, and float32's roundings


# Shapes as in the models: 1280x720 and 832x480, 81 frames; 14B has 40 heads of 128.
REAL = {
    "720p": ((1, 75_600, 40, 128), 75_600, jnp.bfloat16),
    "480p": ((1, 32_760, 40, 128), 32_760, jnp.bfloat16),
    "480p in float32": ((1, 32_760, 40, 128), 32_760, jnp.float32),
    "720p cross": ((1, 75_600, 40, 128), 512, jnp.bfloat16),
    "480p two prompts, head_dim 64": ((2, 32_760, 12, 64), 32_760, jnp.bfloat16),
    "one query": ((1, 1, 40, 128), 75_600, jnp.bfloat16),
}


def lower_for_tpu(query_shape, key_length, dtype=jnp.bfloat16, block_lists=None, **options) -> str:
    batch, _, heads, head_dim = query_shape
    query = jax.ShapeDtypeStruct(query_shape, dtype)
    key = jax.ShapeDtypeStruct((batch, key_length, heads, head_dim), dtype)
    function = jax.jit(lambda q, k, v, lists: attention(q, k, v, block_lists=lists, **options))
    return function.trace(query, key, key, block_lists).lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize(("query_shape", "key_length", "dtype"), REAL.values(), ids=REAL)
def test_lowers_for_tpu_at_real_shapes(query_shape, key_length, dtype):
    assert "tpu_custom_call" in lower_for_tpu(query_shape, key_length, dtype, return_lse=True)


@pytest.mark.parametrize("ranges", [False, True])
@pytest.mark.parametrize("sizes", [(128, 128), (1024, 512)], ids=str)
def test_block_lists_lower_for_tpu(sizes, ranges):
    """Lists for each head of 720p are larger than the memory of scalars: a tile's row goes there alone."""
    tile, block = sizes
    tiles, blocks, length = -(-75_600 // tile), -(-75_600 // block) // 2, 75_600
    integers = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    lists = BlockLists(
        integers((40, tiles, blocks)),
        integers((40, tiles)),
        integers((40, tiles)) if ranges else None,
        integers((length, 2)) if ranges else None,
        query_tile=tile,
        key_block=block,
    )
    assert "tpu_custom_call" in lower_for_tpu((1, length, 40, 128), length, block_lists=lists)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": jnp.zeros((1, 8, 1, 64), jnp.float16)}, "needs bfloat16 or float32"),
        ({"query": jnp.zeros((1, 8, 1, 384))}, "head_dim of at most 256, not 384"),
        ({"key": jnp.zeros((1, 8, 2, 64))}, r"needs key and value \[B, Sk, H, D\]"),
        ({"key": jnp.zeros((1, 8, 1, 64), jnp.bfloat16)}, "one dtype"),
        ({"query": jnp.zeros((1, 0, 1, 64))}, "at least one query"),
        ({"block_lists": BlockLists(jnp.zeros((2, 1), int), jnp.zeros(2, int))}, "do not fit 8 queries"),
        ({"block_lists": BlockLists(jnp.zeros((1, 1), int), jnp.zeros(1, int), key_block=24)}, "multiples of 16"),
    ],
)
def test_calls_that_do_not_fit(changes, message):
    x = jnp.zeros((1, 8, 1, 64))
    with pytest.raises(ValueError, match=message):
        attention(**({"query": x, "key": x, "value": x} | changes))


def test_tunings_that_cannot_be():
    with pytest.raises(ValueError, match="multiples of 16"):
        Tuning(100, 128)


def test_supports_only_tpus():
    query = jnp.zeros((1, 8, 1, 64), jnp.bfloat16)
    assert "needs a TPU and JAX runs on cpu" in pallas_tpu.supports(query, query, query)
