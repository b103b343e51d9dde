"""The Hopper kernel without a GPU: run in JAX's GPU interpreter with its race detector, and lowered for CUDA."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels.attention_cases import CASES, LIST_CASES, Case, attention_float64
from wan_jax.kernels.attention import pallas_gpu
from wan_jax.kernels.attention.block_lists import BlockLists, along_time, from_key_ranges, temporal_window
from wan_jax.kernels.attention.pallas_gpu import Tuning, attention

if jax.__version_info__ < (0, 11, 2):
    reason = (
        "JAX's GPU interpreter needs jax >= 0.11.2 (Python >= 3.12); .ci/run runs this file in a second environment"
    )
    pytest.skip(reason, allow_module_level=True)

from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.pallas import mosaic_gpu as plgpu

# As in test_attention.py: the probabilities and the output are each rounded once, by at most 2^-8, relative to the
# size of what is summed; the rest is float32's share.
TOLERANCE = 2**-7 + 4e-5
LSE_TOLERANCE = 1e-5  # float32 sums of up to 1000 terms, and logits of up to 150

TUNINGS = {
    "free": Tuning(key_block=64),
    "free_running": Tuning(key_block=64, stages=3, running_maximum=True),
    "ping_pong": Tuning("ping_pong", 64),
    "ping_pong_running": Tuning("ping_pong", 64, running_maximum=True),
    "two_stage_ping_pong": Tuning("two_stage_ping_pong", 64, stages=3),
    "two_stage_ping_pong_running": Tuning("two_stage_ping_pong", 64, running_maximum=True),
}
SMALL = tuple(case for case in CASES if case.head_dim in (64, 128) and case.query_length * case.key_length < 200_000)


def run(query, key, value, **options):
    """attention in the interpreter, races refused."""
    try:
        result = attention(query, key, value, interpret=plgpu.InterpretGPUParams(detect_races=True), **options)
        jax.block_until_ready(result)
        assert not interpret_pallas_call.get_races().races_found
    finally:
        interpret_pallas_call.reset_gpu_interpret_mode_state()
    return result


def masked_float64(query, key, value, scale, mask):
    """(attention, log-sum-exp [B, H, Sq]) in float64; queries that see nothing give 0 and -inf."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    logits = np.where(mask, np.einsum("bqhd,bkhd->bhqk", query, key) * scale, -np.inf)
    largest = np.maximum(logits.max(-1, keepdims=True), -1e300)
    weights = np.exp(logits - largest)
    total = weights.sum(-1, keepdims=True)
    output = np.einsum("bhqk,bkhd->bqhd", weights / np.maximum(total, 1e-300), value)
    with np.errstate(divide="ignore"):
        return output, (np.log(total) + largest)[..., 0]


def check(query, key, value, scale, mask, output, lse):
    expected, expected_lse = masked_float64(query, key, value, scale, mask)
    size, _ = masked_float64(query, key, abs(value), scale, mask)
    assert output.dtype == jnp.bfloat16
    assert output.shape == query.shape
    error = np.abs(np.asarray(output, np.float64) - expected)
    assert (error <= TOLERANCE * size).all()
    assert lse.dtype == jnp.float32
    np.testing.assert_allclose(lse, expected_lse, rtol=LSE_TOLERANCE, atol=LSE_TOLERANCE)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_agrees_with_float64(case):
    inputs = case.inputs(jnp.bfloat16)
    scale = case.head_dim**-0.5
    output = run(*inputs)
    error = np.abs(np.asarray(output, np.float64) - attention_float64(*inputs, scale))
    assert (error <= TOLERANCE * attention_float64(inputs[0], inputs[1], abs(inputs[2]), scale)).all()


@pytest.mark.parametrize("tuning", TUNINGS.values(), ids=TUNINGS)
def test_every_tuning_computes_the_same(tuning):
    """Batch 2, lengths that nothing divides, more blocks than stages, an unusual scale, log-sum-exp."""
    inputs = Case("tunings", 2, 203, 341, 1, 64).inputs(jnp.bfloat16)
    output, lse = run(*inputs, scale=0.3, tuning=tuning, return_lse=True)
    check(*inputs, 0.3, True, output, lse)


@pytest.mark.parametrize("keys", [1, 7, 64, 512])
@pytest.mark.parametrize("name", ["free", "ping_pong", "two_stage_ping_pong_running"])
def test_few_keys(keys, name):
    inputs = Case("few_keys", 1, 70, keys, 1, 128).inputs(jnp.bfloat16)
    output, lse = run(*inputs, scale=0.1, tuning=TUNINGS[name], return_lse=True)
    check(*inputs, 0.1, True, output, lse)


@pytest.mark.parametrize("name", ["free", "two_stage_ping_pong"])
def test_sums_that_outgrow_the_first_maximum(name):
    """Logits that grow by hundreds after the first block, in one tile of queries only: it starts again."""
    query, key, value = Case("outgrow", 1, 400, 330, 1, 64).inputs(jnp.bfloat16)
    key = key.at[:, 100].set(query[:, 10])
    query = query.at[:, 10].multiply(50)
    output, lse = run(query, key, value, tuning=TUNINGS[name], return_lse=True)
    logits = np.einsum("bqhd,bkhd->bhqk", np.asarray(query, np.float64), np.asarray(key, np.float64)) / 8
    assert logits[0, 0, 10].max() - logits[0, 0, 10, -(330 % 64) :].max() > 100  # 2^96 is e^67
    check(query, key, value, 64**-0.5, True, output, lse)


@pytest.mark.parametrize("name", ["ping_pong", "two_stage_ping_pong", "two_stage_ping_pong_running"])
def test_block_lists(name):
    """Per head, of several lengths, with the unfinished last block in the middle of a list, alone, and empty ones."""
    inputs = Case("lists", 2, 300, 330, 2, 64).inputs(jnp.bfloat16)
    indices = np.zeros((1, 2, 3, 6), np.int32)
    lists = [[[0, 5, 2], [], [5]], [[4, 3, 2, 1, 0, 5], [1], []]]
    for head, of_head in enumerate(lists):
        for tile, blocks in enumerate(of_head):
            indices[0, head, tile, : len(blocks)] = blocks
    counts = np.array([[[len(blocks) for blocks in of_head] for of_head in lists]], np.int32)
    block_lists = BlockLists(jnp.asarray(indices), jnp.asarray(counts), key_block=64)
    output, lse = run(*inputs, block_lists=block_lists, tuning=TUNINGS[name], return_lse=True)
    mask = block_lists.mask(300, 330)
    assert (np.asarray(lse == -np.inf) == ~mask.any(-1)).all()
    assert (np.asarray(output[:, 128:256, 0]) == 0).all()
    check(*inputs, 64**-0.5, mask, output, lse)


def test_block_lists_for_tiles_of_three_warpgroups():
    inputs = Case("lists", 1, 200, 330, 2, 64).inputs(jnp.bfloat16)
    indices = jnp.array([[0, 5, 2], [1, 0, 0]], jnp.int32)
    block_lists = BlockLists(indices, jnp.array([3, 1], jnp.int32), query_tile=192, key_block=64)
    output, lse = run(*inputs, block_lists=block_lists, return_lse=True)
    check(*inputs, 64**-0.5, block_lists.mask(200, 330), output, lse)


@pytest.mark.parametrize("pattern", [along_time, functools.partial(temporal_window, window=1)])
@pytest.mark.parametrize("query_tile", [128, 192])
def test_patterns_of_videos(pattern, query_tile):
    """Exact to the token, though no frame or place fills whole blocks."""
    shape = (5, 7, 9)
    inputs = Case("video", 1, 315, 315, 1, 64).inputs(jnp.bfloat16)
    block_lists = pattern(shape, query_tile=query_tile, key_block=64)
    output, lse = run(*inputs, block_lists=block_lists, return_lse=True)
    check(*inputs, 64**-0.5, block_lists.mask(315, 315), output, lse)


def test_queries_that_see_no_key_of_their_tile():
    """Ranges that are empty for some queries of a tile: 0 and -inf, and no NaN for their neighbours."""
    inputs = Case("unseen", 1, 100, 200, 1, 64).inputs(jnp.bfloat16)
    ranges = np.stack([np.arange(100), np.arange(100) + 30 * (np.arange(100) % 2)], -1)
    block_lists = from_key_ranges(ranges, 200, key_block=64)
    output, lse = run(*inputs, block_lists=block_lists, return_lse=True)
    assert (np.asarray(lse == -np.inf)[0, 0] == (np.arange(100) % 2 == 0)).all()
    check(*inputs, 64**-0.5, block_lists.mask(100, 200), output, lse)


def test_an_unfinished_block_that_is_seen_whole():
    """Beside partial blocks, alone, and after other whole ones: its missing keys are never seen."""
    case = next(case for case in LIST_CASES if case.name == "unfinished_block_seen_whole")
    inputs, block_lists = case.inputs(jnp.bfloat16), case.block_lists
    output, lse = run(*inputs, block_lists=block_lists, return_lse=True)
    check(*inputs, case.head_dim**-0.5, case.mask, output, lse)


# Shapes as in the models: 1280x720 and 832x480, 81 frames; 14B has 40 heads of 128.
REAL = {
    "720p": ((1, 75_600, 40, 128), 75_600),
    "480p": ((1, 32_760, 40, 128), 32_760),
    "720p cross": ((1, 75_600, 40, 128), 512),
    "480p two prompts, head_dim 64": ((2, 32_760, 12, 64), 32_760),
    "one query": ((1, 1, 40, 128), 75_600),
}


def lower_for_cuda(query_shape, key_length, **options) -> str:
    batch, _, heads, head_dim = query_shape
    query = jax.ShapeDtypeStruct(query_shape, jnp.bfloat16)
    key = jax.ShapeDtypeStruct((batch, key_length, heads, head_dim), jnp.bfloat16)
    function = jax.jit(lambda q, k, v, lists: attention(q, k, v, block_lists=lists, **options))
    traced = function.trace(query, key, key, options.pop("block_lists", None))
    return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(("query_shape", "key_length"), REAL.values(), ids=REAL)
def test_lowers_for_cuda_at_real_shapes_without_copies(query_shape, key_length):
    """Layouts, TMA shapes and the shared memory limit are checked in lowering."""
    text = lower_for_cuda(query_shape, key_length)
    assert "mosaic_gpu_v2" in text
    for copy in ("stablehlo.transpose", "stablehlo.pad", "stablehlo.concatenate", "stablehlo.gather"):
        assert copy not in text


@pytest.mark.parametrize("tuning", TUNINGS.values(), ids=TUNINGS)
def test_every_tuning_lowers_for_cuda(tuning):
    tuning = dataclasses.replace(tuning, key_block=128, stages=2)
    assert "mosaic_gpu_v2" in lower_for_cuda((1, 75_600, 40, 128), 75_600, tuning=tuning, return_lse=True)


@pytest.mark.parametrize("ranges", [False, True])
def test_block_lists_lower_for_cuda(ranges):
    tiles, length = 591, 75_600
    integers = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    lists = BlockLists(integers((40, tiles, 296)), integers((40, tiles)))
    if ranges:
        lists = dataclasses.replace(lists, partial_counts=integers((40, tiles)), key_ranges=integers((length, 2)))
    assert "mosaic_gpu_v2" in lower_for_cuda((1, length, 40, 128), length, block_lists=lists, return_lse=True)


def test_more_shared_memory_than_there_is():
    with pytest.raises(ValueError, match="exceeds available shared memory"):
        lower_for_cuda((1, 4096, 1, 128), 4096, tuning=Tuning(key_block=256))


def test_supports_only_hopper(monkeypatch):
    query = jnp.zeros((1, 8, 1, 64), jnp.bfloat16)
    assert "needs a Hopper GPU" in pallas_gpu.supports(query, query, query)
    for capability, good in (("9.0", True), ("8.0", False), ("10.0", False)):
        device = SimpleNamespace(platform="gpu", compute_capability=capability, device_kind="a GPU")
        monkeypatch.setattr(jax, "devices", lambda device=device: [device])
        assert (pallas_gpu.supports(query, query, query) is None) == good
    monkeypatch.setattr(device, "compute_capability", "9.0")
    assert "needs bfloat16" in pallas_gpu.supports(*[query.astype(jnp.float32)] * 3)
    assert "head_dim of 64 or 128, not 32" in pallas_gpu.supports(*[query[..., :32]] * 3)


LISTS = BlockLists(jnp.zeros((1, 1), int), jnp.zeros(1, int))
RANGES = dataclasses.replace(LISTS, partial_counts=jnp.zeros(1, int), key_ranges=jnp.zeros((8, 2), int))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": jnp.zeros((1, 8, 1, 64))}, "needs bfloat16"),
        ({"query": jnp.zeros((1, 8, 1, 32), jnp.bfloat16)}, "head_dim of 64 or 128"),
        ({"block_lists": dataclasses.replace(LISTS, query_tile=64)}, "use 128 or 192"),
        ({"block_lists": LISTS, "tuning": Tuning("ping_pong", 64)}, r"lists of \(128, 128\) queries and keys"),
        ({"block_lists": RANGES, "tuning": Tuning("two_stage_ping_pong")}, "use ping_pong"),
    ],
)
def test_calls_that_do_not_fit(changes, message):
    x = jnp.zeros((1, 8, 1, 64), jnp.bfloat16)
    arguments = {"query": x, "key": x, "value": x} | changes
    with pytest.raises(ValueError, match=message):
        attention(**arguments)


@pytest.mark.parametrize("options", [{"key_block": 100}, {"stages": 1}, {"schedule": "two_stage"}])
def test_tunings_that_cannot_be(options):
    with pytest.raises(ValueError, match="Tuning"):
        Tuning(**options)
