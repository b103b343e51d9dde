"""Which blocks of keys each tile of queries sees: the input of block-sparse attention, and lists for videos.

A list is made for tiles of `query_tile` consecutive queries and blocks of `key_block` consecutive keys. Where a block
is only partly visible to a tile, each query's own range of keys says the rest, so that patterns whose edges do not
fall on blocks stay exact. Tokens of a video have the order "(frames height width)" by default.
"""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

QUERY_TILE = 128
KEY_BLOCK = 128


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockLists:
    """Lists of key blocks, one per tile of queries.

    Attributes:
      indices: int32 [..., query_tiles, max_blocks], block j being keys [j * key_block, (j + 1) * key_block). The
        leading axes are none, [heads] or [batch, heads], each of full size or 1. No block twice in a list.
      counts: int32 [..., query_tiles]: how many entries of each list count. With 0 the output is 0.
      partial_counts: int32 [..., query_tiles]: how many blocks, at the head of each list, some query of the tile sees
        only in part. None if there are no key_ranges.
      key_ranges: int32 [queries, 2]: query i sees keys [key_ranges[i, 0], key_ranges[i, 1]) of its partial blocks.
        None: every query sees all of every listed block.
      query_tile, key_block: the sizes that the lists were made for.
    """

    indices: jax.Array
    counts: jax.Array
    partial_counts: jax.Array | None = None
    key_ranges: jax.Array | None = None
    query_tile: int = dataclasses.field(default=QUERY_TILE, metadata={"static": True})
    key_block: int = dataclasses.field(default=KEY_BLOCK, metadata={"static": True})

    def check(self, batch: int, heads: int, query_length: int, key_length: int) -> None:
        """Raises ValueError where the shapes cannot be those of such a call. Values are not looked at."""
        *lead, tiles, max_blocks = self.indices.shape
        whole_lead = (batch, heads)[2 - len(lead) :]
        leads_fit = len(lead) <= 2 and all(size in (1, whole) for size, whole in zip(lead, whole_lead, strict=True))
        if not leads_fit or tiles != -(-query_length // self.query_tile):
            raise ValueError(
                f"block lists of shape {self.indices.shape} do not fit {query_length} queries in tiles of "
                f"{self.query_tile}, {heads} heads and batch {batch}; make them for this shape"
            )
        if max_blocks == 0 or max_blocks > -(-key_length // self.key_block):
            raise ValueError(
                f"block lists of {max_blocks} blocks do not fit {key_length} keys in blocks of {self.key_block}; "
                "make them for this shape"
            )
        if self.counts.shape != self.indices.shape[:-1]:
            raise ValueError(f"block counts {self.counts.shape} do not fit block lists {self.indices.shape}")
        if (self.key_ranges is None) != (self.partial_counts is None):
            raise ValueError("block lists need key_ranges and partial_counts together, or neither")
        if self.key_ranges is not None and self.key_ranges.shape != (query_length, 2):
            raise ValueError(f"key ranges {self.key_ranges.shape} do not fit {query_length} queries; make them [S, 2]")

    def mask(self, query_length: int, key_length: int) -> jax.Array:
        """The same as a mask, bool [..., query_length, key_length]: for references and for looking at."""
        listed = jnp.arange(self.indices.shape[-1]) < self.counts[..., None]
        blocks = jnp.arange(-(-key_length // self.key_block))
        hits = self.indices[..., None, :] == blocks[:, None]  # [..., tiles, blocks, entries]
        visible = self._tokens((hits & listed[..., None, :]).any(-1), query_length, key_length)
        if self.key_ranges is None or self.partial_counts is None:
            return visible
        in_part = jnp.arange(self.indices.shape[-1]) < self.partial_counts[..., None]
        partial = self._tokens((hits & in_part[..., None, :]).any(-1), query_length, key_length)
        keys = jnp.arange(key_length)
        in_range = (self.key_ranges[:, :1] <= keys) & (keys < self.key_ranges[:, 1:])
        return visible & (in_range | ~partial)

    def _tokens(self, blocks: jax.Array, query_length: int, key_length: int) -> jax.Array:
        tokens = jnp.repeat(jnp.repeat(blocks, self.query_tile, axis=-2), self.key_block, axis=-1)
        return tokens[..., :query_length, :key_length]


def from_key_ranges(
    key_ranges: np.ndarray, key_length: int, *, query_tile: int = QUERY_TILE, key_block: int = KEY_BLOCK
) -> BlockLists:
    """Lists for queries that see one range of keys each.

    Args:
      key_ranges: int [queries, 2], the first key that a query sees and the one after the last.
      key_length: the number of keys.

    Returns:
      BlockLists without leading axes.

    Raises:
      ValueError: a range that leaves the keys.
    """
    key_ranges = np.asarray(key_ranges, np.int32)
    if key_ranges.size and (key_ranges.min() < 0 or key_ranges.max() > key_length):
        raise ValueError(f"a key range leaves the {key_length} keys; clip the ranges")
    first = np.arange(-(-key_length // key_block)) * key_block
    lists = []
    for row in range(0, len(key_ranges), query_tile):
        start, stop = key_ranges[row : row + query_tile].T
        start, stop = start[start < stop], stop[start < stop]
        seen = ((start[:, None] < first + key_block) & (first < stop[:, None])).any(0)
        whole = ((start[:, None] <= first) & (first + key_block <= stop[:, None])).all(0) & (len(start) > 0)
        # A query that sees nothing makes every block of its tile a partial one.
        whole &= len(start) == len(key_ranges[row : row + query_tile])
        lists.append((np.flatnonzero(seen & ~whole), np.flatnonzero(seen & whole)))
    counts = np.array([len(partial) + len(whole) for partial, whole in lists], np.int32)
    indices = np.zeros((len(lists), max(1, counts.max())), np.int32)
    for row, blocks in zip(indices, lists, strict=True):
        row[: sum(map(len, blocks))] = np.concatenate(blocks)
    return BlockLists(
        indices=jnp.asarray(indices),
        counts=jnp.asarray(counts),
        partial_counts=jnp.asarray([len(partial) for partial, _ in lists], jnp.int32),
        key_ranges=jnp.asarray(key_ranges),
        query_tile=query_tile,
        key_block=key_block,
    )


def temporal_window(
    shape: tuple[int, int, int], window: int, *, query_tile: int = QUERY_TILE, key_block: int = KEY_BLOCK
) -> BlockLists:
    """Every token sees the frames at most `window` away from its own, all places in them.

    Args:
      shape: (frames, height, width) in tokens; tokens in the order "(frames height width)".
      window: frames to either side; 0 is attention within each frame.
    """
    frames, height, width = shape
    if window < 0:
        raise ValueError(f"a temporal window of {window} frames sees nothing; use 0 or more")
    frame = np.repeat(np.arange(frames), height * width)
    first, last = np.maximum(frame - window, 0), np.minimum(frame + window, frames - 1)
    ranges = np.stack([first, last + 1], -1) * (height * width)
    return from_key_ranges(ranges, frames * height * width, query_tile=query_tile, key_block=key_block)


@dataclass(frozen=True)
class TemporalWindow:
    """`temporal_window` as a value, for `AttentionOptions`."""

    window: int

    def __call__(self, shape: tuple[int, int, int]) -> BlockLists:
        return temporal_window(shape, self.window)


def along_time(shape: tuple[int, int, int], *, query_tile: int = QUERY_TILE, key_block: int = KEY_BLOCK) -> BlockLists:
    """Every token sees its own place in all frames, and nothing else.

    Args:
      shape: (frames, height, width) in tokens; tokens in the order "(height width frames)", in which what a token
        sees lies together: einops.rearrange(x, "b (f p) ... -> b (p f) ...", f=frames) on the way in, and back.
    """
    frames, height, width = shape
    first = np.repeat(np.arange(height * width), frames) * frames
    ranges = np.stack([first, first + frames], -1)
    return from_key_ranges(ranges, frames * height * width, query_tile=query_tile, key_block=key_block)
