"""Attention as the formula says it: what every other backend is compared with, and the fastest for short sequences.

Materialises the logits [B, H, Sq, Sk] in float32.
"""

import jax
import jax.numpy as jnp

from wan_jax.kernels.precision import matmul_precision

# What attention returns: [B, Sq, H, D], and with return_lse also the logits' log-sum-exp [B, H, Sq].
Result = jax.Array | tuple[jax.Array, jax.Array]


def supports(*call, **options) -> None:
    """It runs every call everywhere."""


def attention(query, key, value, *, scale, block_lists=None, return_lse=False) -> Result:
    """softmax(query key^T scale) value; see the package."""
    logits = einsum_float32("b q h d, b k h d -> b h q k", query, key) * scale
    if block_lists is not None:
        mask = block_lists.mask(query.shape[1], key.shape[1])
        logits = jnp.where(mask, logits, -jnp.inf)
    probabilities = jax.nn.softmax(logits, axis=-1)
    if block_lists is not None:
        probabilities = jnp.where(mask, probabilities, 0.0)  # where a query sees nothing, softmax gives NaN
    output = einsum_float32("b h q k, b k h d -> b q h d", probabilities.astype(value.dtype), value)
    output = output.astype(query.dtype)
    return (output, jax.nn.logsumexp(logits, axis=-1)) if return_lse else output


def einsum_float32(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """A product accumulated and returned in float32."""
    return jnp.einsum(equation, x, y, precision=matmul_precision(x.dtype), preferred_element_type=jnp.float32)
