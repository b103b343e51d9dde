"""Attention in bounded memory, in plain XLA: runs on any device and length and never holds Sq x Sk logits.

Queries are taken a chunk at a time; for each, a scan over chunks of keys keeps a running maximum, a running sum and
the unnormalised output (online softmax: Milakov and Gimelshein 2018; Rabe and Staats 2021). All three are float32.
"""

import jax.numpy as jnp
from jax import lax

from wan_jax.kernels.attention.backward import with_recomputed_gradients
from wan_jax.kernels.attention.chunks import chunk_lengths, merge, split, visibility
from wan_jax.kernels.attention.reference import Result, einsum_float32

LOWEST = -1e30  # where a running maximum starts: finite, so that LOWEST - LOWEST is 0 and never NaN


def supports(*call, **options) -> None:
    """It runs every call everywhere."""


def attention(query, key, value, *, scale, block_lists=None, return_lse=False) -> Result:
    """softmax(query key^T scale) value; see the package."""
    return with_recomputed_gradients(
        forward, query, key, value, scale=scale, block_lists=block_lists, return_lse=return_lse
    )


def forward(query, key, value, *, scale, block_lists, return_lse) -> Result:
    query_length, key_length = query.shape[1], key.shape[1]
    query_chunk, key_chunk = chunk_lengths(query_length, key_length, block_lists)
    visible = visibility(block_lists, query_length, key_length, query_chunk, key_chunk)
    queries, keys, values = split(query, query_chunk), split(key, key_chunk), split(value, key_chunk)

    def attend(xs):
        i, queries_i = xs
        batch, chunk, heads, head_dim = queries_i.shape

        def update(carry, xs):
            maximum, total, output = carry  # [b h q], [b h q], [b h q d]
            j, keys_j, values_j = xs
            logits = einsum_float32("b q h d, b k h d -> b h q k", queries_i, keys_j) * scale
            if (mask := visible(i, j)) is not None:
                logits = jnp.where(mask, logits, -jnp.inf)
            new_maximum = jnp.maximum(maximum, logits.max(axis=-1))
            rescale = jnp.exp(maximum - new_maximum)
            weights = jnp.exp(logits - new_maximum[..., None])
            total = total * rescale + weights.sum(axis=-1)
            products = einsum_float32("b h q k, b k h d -> b h q d", weights.astype(value.dtype), values_j)
            return (new_maximum, total, output * rescale[..., None] + products), None

        rows = (batch, heads, chunk)
        start = (jnp.full(rows, LOWEST), jnp.zeros(rows), jnp.zeros((*rows, head_dim)))
        (maximum, total, output), _ = lax.scan(update, start, (jnp.arange(len(keys)), keys, values))
        share = jnp.where(total > 0, 1 / total, 0)  # 0 for a query that sees nothing
        return (output * share[..., None]).astype(query.dtype), maximum + jnp.log(total)

    outputs, lses = lax.map(attend, (jnp.arange(len(queries)), queries))  # [chunks b h q d], [chunks b h q]
    output = merge(outputs, query_length, axis=2).swapaxes(1, 2)
    return (output, merge(lses, query_length, axis=2)) if return_lse else output
