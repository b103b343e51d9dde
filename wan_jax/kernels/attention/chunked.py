"""Attention in bounded memory, in plain XLA: runs on any device and length and never holds Sq x Sk logits.

Queries are taken a chunk at a time; for each, a scan over chunks of keys keeps a running maximum, a running sum and
the unnormalised output (online softmax: Milakov and Gimelshein 2018; Rabe and Staats 2021). All three are float32.
Under differentiation every chunk is recomputed instead of stored, so gradients are bounded too.
"""

import jax
import jax.numpy as jnp
from jax import lax

from wan_jax.kernels.attention.reference import einsum_float32

QUERY_CHUNK = 512
KEY_CHUNK = 512
MASKED = -1e30  # finite, so that exp(MASKED - maximum) is 0 and never NaN


def supports(query: jax.Array, key: jax.Array, value: jax.Array) -> str | None:
    """None: it runs everywhere."""
    del query, key, value
    return None


def attention(query: jax.Array, key: jax.Array, value: jax.Array, *, scale: float) -> jax.Array:
    """softmax(query key^T scale) value; see the package for shapes."""
    query_length, key_length = query.shape[1], key.shape[1]
    queries = split_chunks(query, QUERY_CHUNK)
    keys, values = split_chunks(key, KEY_CHUNK), split_chunks(value, KEY_CHUNK)
    # The last chunk of keys may end in padding.
    valid = jnp.arange(keys.shape[0] * keys.shape[2]).reshape(keys.shape[0], keys.shape[2]) < key_length
    padded = valid.size > key_length

    @jax.checkpoint
    def attend(query_chunk: jax.Array) -> jax.Array:
        batch, chunk, heads, head_dim = query_chunk.shape

        @jax.checkpoint
        def update(carry, xs):
            maximum, total, output = carry  # [b h q], [b h q], [b h q d]
            key_chunk, value_chunk, valid_chunk = xs
            logits = einsum_float32("b q h d, b k h d -> b h q k", query_chunk, key_chunk) * scale
            if padded:
                logits = jnp.where(valid_chunk, logits, MASKED)
            # The result does not depend on the maximum, so neither does the gradient.
            new_maximum = jnp.maximum(maximum, lax.stop_gradient(logits.max(axis=-1)))
            rescale = jnp.exp(maximum - new_maximum)
            weights = jnp.exp(logits - new_maximum[..., None])
            total = total * rescale + weights.sum(axis=-1)
            products = einsum_float32("b h q k, b k h d -> b h q d", weights.astype(value.dtype), value_chunk)
            return (new_maximum, total, output * rescale[..., None] + products), None

        rows = (batch, heads, chunk)
        start = (jnp.full(rows, MASKED), jnp.zeros(rows), jnp.zeros((*rows, head_dim)))
        (_, total, output), _ = lax.scan(update, start, (keys, values, valid))
        return (output / total[..., None]).astype(query.dtype)

    outputs = lax.map(attend, queries)  # [chunks, b, h, q, d]
    outputs = outputs.transpose(1, 0, 3, 2, 4)
    return outputs.reshape(outputs.shape[0], -1, *outputs.shape[3:])[:, :query_length]


def split_chunks(x: jax.Array, limit: int) -> jax.Array:
    """[B, S, H, D] -> [chunks, B, chunk, H, D] with equal chunks of at most `limit`, the end padded with zeros.

    Chunks are as equal as they get, so there is less padding than there are chunks and no chunk is all padding.
    """
    batch, length, heads, head_dim = x.shape
    chunks = -(-length // limit)
    chunk = -(-length // chunks)
    x = jnp.pad(x, ((0, 0), (0, chunks * chunk - length), (0, 0), (0, 0)))
    return x.reshape(batch, chunks, chunk, heads, head_dim).swapaxes(0, 1)
