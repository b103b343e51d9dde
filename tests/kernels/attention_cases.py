"""The cases that every attention backend must serve or refuse, and the float64 answer."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Case:
    name: str
    batch: int
    query_length: int
    key_length: int
    heads: int
    head_dim: int
    query_scale: float = 1.0  # large values make the softmax nearly one-hot

    def inputs(self, dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Normal query [B, Sq, H, D], key and value [B, Sk, H, D]."""
        generator = np.random.default_rng(sum(self.name.encode()))
        query = (self.batch, self.query_length, self.heads, self.head_dim)
        key = (self.batch, self.key_length, self.heads, self.head_dim)
        arrays = (generator.normal(size=shape) for shape in (query, key, key))
        query, key, value = (jnp.asarray(array, dtype) for array in arrays)
        return query * jnp.asarray(self.query_scale, dtype), key, value


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
)


def attention_float64(query, key, value, scale: float) -> np.ndarray:
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    logits = np.einsum("bqhd,bkhd->bhqk", query, key) * scale
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), value)
