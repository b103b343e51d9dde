"""Attention as the formula says it: what every other backend is compared with, and the fastest for short sequences.

Materialises the logits [B, H, Sq, Sk] in float32.
"""

import jax
import jax.numpy as jnp

from wan_jax.precision import matmul_precision


def supports(query: jax.Array, key: jax.Array, value: jax.Array) -> str | None:
    """None: it runs everywhere."""
    del query, key, value
    return None


def attention(query: jax.Array, key: jax.Array, value: jax.Array, *, scale: float) -> jax.Array:
    """softmax(query key^T scale) value; see the package for shapes."""
    logits = einsum_float32("b q h d, b k h d -> b h q k", query, key) * scale
    probabilities = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    return einsum_float32("b h q k, b k h d -> b q h d", probabilities, value).astype(query.dtype)


def einsum_float32(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """A product accumulated and returned in float32."""
    return jnp.einsum(equation, x, y, precision=matmul_precision(x.dtype), preferred_element_type=jnp.float32)
