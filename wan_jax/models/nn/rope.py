"""Rotary position embedding over frames, rows and columns (Su et al. 2021, arXiv:2104.09864)."""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange


def rope_frequencies(head_dim: int) -> list[np.ndarray]:
    """Radians per position of the pairs that turn with the frame, the row and the column, float64.

    Rows and columns get a third of the pairs each, rounded down; frames get the rest.
    """
    spatial = head_dim // 6
    return [10000.0 ** (-np.arange(n) / n) for n in (head_dim // 2 - 2 * spatial, spatial, spatial)]


def rope_tables(grid: tuple[int, int, int], head_dim: int) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [S, 1, head_dim / 2], float32, for tokens in the order (frame, row, column)."""
    angles = [np.outer(np.arange(n), f) for n, f in zip(grid, rope_frequencies(head_dim), strict=True)]
    frames, rows, columns = angles[0][:, None, None], angles[1][None, :, None], angles[2][None, None]

    def table(function):
        # One small float64 table an axis; the large one is put together on the device.
        axes = [function(axis).astype(np.float32) for axis in (frames, rows, columns)]
        full = jnp.concatenate([jnp.broadcast_to(axis, (*grid, axis.shape[-1])) for axis in axes], axis=-1)
        return full.reshape(-1, 1, head_dim // 2)

    return table(np.cos), table(np.sin)


def apply_rope(x: jax.Array, rotary: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns the pairs (x[2j], x[2j + 1]) of [B, S, heads, head_dim] in float32; the same dtype out.

    (a, b) becomes (a cos - b sin, b cos + a sin): the pair times cos, and the reversed pair times -sin and sin. On GPUs
    that reads and writes whole pairs.
    """
    cos, sin = (table[..., None] for table in rotary)
    pairs = rearrange(x.astype(jnp.float32), "b s h (pair two) -> b s h pair two", two=2)
    turned = pairs * cos + jnp.flip(pairs, -1) * (sin * np.array([-1, 1], np.float32))
    return turned.reshape(x.shape).astype(x.dtype)
