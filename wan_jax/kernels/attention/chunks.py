"""Sequences in chunks, and what the queries of one chunk see of the keys of another: for attention in plain XLA."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from wan_jax.kernels.attention.block_lists import BlockLists

LIMIT = 512  # queries or keys in a chunk

# What a tile of queries sees of a block of keys.
WHOLE, PARTIAL = 1, 2


def chunk_lengths(query_length: int, key_length: int, block_lists: BlockLists | None) -> tuple[int, int]:
    """How many queries and how many keys a chunk holds: whole tiles and blocks of the lists."""
    if block_lists is None:
        return chunk_length(query_length), chunk_length(key_length)
    return chunk_length(query_length, block_lists.query_tile), chunk_length(key_length, block_lists.key_block)


def chunk_length(length: int, multiple: int = 1) -> int:
    """Chunks as equal as they get, so that no chunk is all padding: at most LIMIT, or one `multiple`."""
    limit = max(LIMIT // multiple, 1) * multiple
    chunks = -(-length // limit)
    return -(-length // (chunks * multiple)) * multiple


def split(x: jax.Array, chunk: int, *, axis: int = 1) -> jax.Array:
    """[..., S, ...] -> [chunks, ..., chunk, ...], the end filled with zeros."""
    chunks = -(-x.shape[axis] // chunk)
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, chunks * chunk - x.shape[axis])
    x = jnp.pad(x, padding)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], chunks, chunk, *x.shape[axis + 1 :]), axis, 0)


def merge(x: jax.Array, length: int, *, axis: int = 1) -> jax.Array:
    """The inverse of split: [chunks, ..., chunk, ...] -> [..., length, ...]."""
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, length, axis=axis)


def visibility(
    block_lists: BlockLists | None, query_length: int, key_length: int, query_chunk: int, key_chunk: int
) -> Callable[[jax.Array, jax.Array], jax.Array | None]:
    """A function of the indices of a chunk of queries and one of keys: which see which.

    It returns bool that broadcasts to [B, H, query_chunk, key_chunk], or None for all. Padding is not seen.
    """

    def keys_of(j: jax.Array) -> jax.Array:
        return j * key_chunk + jnp.arange(key_chunk)

    if block_lists is None:
        is_padded = key_length % key_chunk > 0
        return lambda i, j: keys_of(j) < key_length if is_padded else None

    tile, block = block_lists.query_tile, block_lists.key_block
    states = block_states(block_lists, -(-key_length // block))
    states = split(
        split(states, query_chunk // tile, axis=2), key_chunk // block, axis=4
    )  # [j, i, b, h, tiles, blocks]
    ranges = None if block_lists.key_ranges is None else split(block_lists.key_ranges, query_chunk, axis=0)

    def visible(i: jax.Array, j: jax.Array) -> jax.Array:
        state = jnp.repeat(jnp.repeat(states[j, i], tile, axis=-2), block, axis=-1)
        keys = keys_of(j)
        seen = state == WHOLE
        if ranges is not None:
            first, stop = ranges[i, :, :1], ranges[i, :, 1:]
            seen |= (state == PARTIAL) & (first <= keys) & (keys < stop)
        return seen & (keys < key_length)

    return visible


def block_states(lists: BlockLists, blocks: int) -> jax.Array:
    """What each tile sees of each block, int32 [B or 1, H or 1, tiles, blocks]: 0, WHOLE or PARTIAL."""
    *lead, tiles, max_blocks = lists.indices.shape
    entry = jnp.arange(max_blocks)
    state = jnp.where(entry < lists.counts[..., None], WHOLE, 0)
    if lists.partial_counts is not None:
        state = jnp.where(entry < lists.partial_counts[..., None], PARTIAL, state)
    indices, state = lists.indices.reshape(-1, max_blocks), state.reshape(-1, max_blocks)
    rows = jnp.arange(len(indices))[:, None]
    states = jnp.zeros((len(indices), blocks), jnp.int32).at[rows, indices].max(state)
    return states.reshape(*(1,) * (2 - len(lead)), *lead, tiles, blocks)
