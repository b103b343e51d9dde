"""The cases that every attention backend must serve or refuse, and the float64 answer."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from wan_jax.kernels.attention.block_lists import BlockLists, from_key_ranges, temporal_window


@dataclass(frozen=True)
class Case:
    name: str
    batch: int
    query_length: int
    key_length: int
    heads: int
    head_dim: int
    query_scale: float = 1.0  # large values make the softmax nearly one-hot
    return_lse: bool = False
    make_lists: Callable[[], BlockLists] | None = None

    def inputs(self, dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Normal query [B, Sq, H, D], key and value [B, Sk, H, D]."""
        generator = np.random.default_rng(sum(self.name.encode()))
        query = (self.batch, self.query_length, self.heads, self.head_dim)
        key = (self.batch, self.key_length, self.heads, self.head_dim)
        arrays = (generator.normal(size=shape) for shape in (query, key, key))
        query, key, value = (jnp.asarray(array, dtype) for array in arrays)
        return query * jnp.asarray(self.query_scale, dtype), key, value

    @property
    def block_lists(self) -> BlockLists | None:
        return None if self.make_lists is None else self.make_lists()

    @property
    def mask(self) -> np.ndarray | bool:
        """Which queries see which keys, to broadcast to [B, H, Sq, Sk]."""
        lists = self.block_lists
        return True if lists is None else np.asarray(lists.mask(self.query_length, self.key_length))


CASES = (
    Case("tiny", 1, 3, 5, 1, 64),
    Case("odd_lengths", 2, 37, 53, 3, 64),
    Case("one_query", 2, 1, 700, 3, 128),
    Case("one_key", 1, 130, 1, 2, 64),
    Case("head_dim_12", 1, 97, 97, 5, 12),
    Case("cross_512_keys", 2, 600, 512, 2, 128),
    Case("lengths_that_no_chunk_divides", 1, 1543, 1031, 2, 64),
    Case("720p_scaled_down", 1, 75_600 // 45, 75_600 // 45, 1, 128),  # like 75,600 a multiple of 16 and not of 128
    Case("large_logits", 1, 600, 1031, 2, 64, query_scale=30.0),
    Case("lse", 2, 203, 341, 2, 64, return_lse=True),
    Case("lse_of_large_logits", 1, 130, 201, 1, 128, query_scale=30.0, return_lse=True),
)

# Every backend takes block lists for these sizes.
SIZES = {"query_tile": 128, "key_block": 64}


def lists_per_head() -> BlockLists:
    """For 2 heads, 300 queries and 330 keys: empty lists, and the unfinished last block inside one and alone."""
    indices = np.zeros((2, 3, 6), np.int32)
    counts = np.zeros((2, 3), np.int32)
    for head, lists in enumerate([[[0, 5, 2], [], [5]], [[4, 3, 2, 1, 0, 5], [1], []]]):
        for tile, blocks in enumerate(lists):
            indices[head, tile, : len(blocks)] = blocks
            counts[head, tile] = len(blocks)
    return BlockLists(jnp.asarray(indices), jnp.asarray(counts), **SIZES)


def every_other_query_sees_nothing() -> BlockLists:
    start = np.arange(100)
    return from_key_ranges(np.stack([start, start + 30 * (start % 2)], -1), 200, **SIZES)


def unfinished_block_seen_whole() -> BlockLists:
    """For 300 queries and 330 keys: the last block, 5, as a whole one of lists that have key ranges."""
    lists = [([1, 3], [0, 5, 2]), ([], [5]), ([5, 2], [4])]
    indices = np.zeros((3, 5), np.int32)
    for row, (partial, whole) in zip(indices, lists, strict=True):
        row[: len(partial) + len(whole)] = partial + whole
    return BlockLists(
        jnp.asarray(indices),
        jnp.asarray([len(partial) + len(whole) for partial, whole in lists], jnp.int32),
        jnp.asarray([len(partial) for partial, _ in lists], jnp.int32),
        jnp.asarray(np.stack([np.arange(300) // 2, np.arange(300) // 2 + 180], -1), jnp.int32),
        **SIZES,
    )


LIST_CASES = (
    Case("lists_per_head", 2, 300, 330, 2, 64, return_lse=True, make_lists=lists_per_head),
    Case("lists_without_lse", 1, 300, 330, 2, 128, make_lists=lists_per_head),
    # 63 tokens a frame: no edge of a frame falls on a block's.
    Case(
        "temporal_window",
        *(2, 315, 315, 1, 64),
        return_lse=True,
        make_lists=functools.partial(temporal_window, (5, 7, 9), 1, **SIZES),
    ),
    Case("unfinished_block_seen_whole", 1, 300, 330, 1, 64, return_lse=True, make_lists=unfinished_block_seen_whole),
    Case("unseeing_queries", 1, 100, 200, 2, 64, return_lse=True, make_lists=every_other_query_sees_nothing),
)


def attention_float64(query, key, value, scale: float, mask: np.ndarray | bool = True) -> np.ndarray:
    return attention_and_lse_float64(query, key, value, scale, mask)[0]


def attention_and_lse_float64(query, key, value, scale: float, mask: np.ndarray | bool = True):
    """(attention [B, Sq, H, D], log-sum-exp [B, H, Sq]); 0 and -inf for a query that sees nothing."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    logits = np.where(mask, np.einsum("bqhd,bkhd->bhqk", query, key) * scale, -np.inf)
    largest = np.maximum(logits.max(-1, keepdims=True), -1e300)
    weights = np.exp(logits - largest)
    total = weights.sum(-1, keepdims=True)
    output = np.einsum("bhqk,bkhd->bqhd", weights / np.maximum(total, 1e-300), value)
    with np.errstate(divide="ignore"):
        return output, (np.log(total) + largest)[..., 0]
