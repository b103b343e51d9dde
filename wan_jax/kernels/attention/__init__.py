"""Attention: one function, several backends.

A backend is a module with two functions: `supports(query, key, value)`, which returns None or the reason why it cannot
run the call on this device, and `attention(query, key, value, *, scale)`. Adding one is a file and a line in BACKENDS.
"""

from typing import Protocol

import jax
import jax.numpy as jnp

from wan_jax.errors import InputError
from wan_jax.kernels.attention import chunked, cudnn, reference


class Backend(Protocol):
    """What a backend's module offers."""

    def supports(self, query: jax.Array, key: jax.Array, value: jax.Array) -> str | None: ...

    def attention(self, query: jax.Array, key: jax.Array, value: jax.Array, *, scale: float) -> jax.Array: ...


# Fastest first: the order in which `implementation=None` tries them.
BACKENDS: dict[str, Backend] = {
    "cudnn": cudnn,
    "reference": reference,
    "chunked": chunked,
}

# Above this many bytes of logits the reference is no longer the fastest, and soon does not fit.
REFERENCE_LOGITS_BYTES = 4 * 2**20


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """softmax(query key^T scale) value per head, without a mask: every query sees every key.

    Args:
      query: [B, Sq, H, D], bfloat16, float16 or float32.
      key, value: [B, Sk, H, D] in the same dtype. Lengths are free.
      scale: what the logits are multiplied by; 1/sqrt(D) if None.
      implementation: a name in BACKENDS; None takes the fastest that supports the call on the default device.

    Returns:
      [B, Sq, H, D] in the query's dtype. Logits, softmax and accumulation are float32; the probabilities are rounded
      to the inputs' dtype before they meet the values.

    Raises:
      InputError: shapes or dtypes that do not fit, an unknown implementation, or one that cannot run the call.
    """
    check_arguments(query, key, value)
    if implementation is None:
        implementation = fastest(query, key, value)
    if implementation not in BACKENDS:
        raise InputError(f"unknown attention implementation {implementation!r}; use one of {', '.join(BACKENDS)}")
    backend = BACKENDS[implementation]
    if reason := backend.supports(query, key, value):
        raise InputError(f"attention implementation {implementation!r} cannot run here: {reason}; use another or None")
    return backend.attention(query, key, value, scale=query.shape[-1] ** -0.5 if scale is None else scale)


def fastest(query: jax.Array, key: jax.Array, value: jax.Array) -> str:
    """The name of the fastest backend that can run this call on the default device."""
    batch, query_length, heads, _ = query.shape
    logits_bytes = 4 * batch * heads * query_length * key.shape[1]
    for name, backend in BACKENDS.items():
        too_large = name == "reference" and logits_bytes > REFERENCE_LOGITS_BYTES
        if not too_large and backend.supports(query, key, value) is None:
            return name
    raise AssertionError("unreachable: 'chunked' runs everywhere")


def check_arguments(query: jax.Array, key: jax.Array, value: jax.Array) -> None:
    if query.ndim != 4 or key.shape != value.shape or key.shape != (query.shape[0], *key.shape[1:2], *query.shape[2:]):
        raise InputError(
            "attention needs a query [B, Sq, H, D] and a key and value [B, Sk, H, D]; "
            f"it got {query.shape}, {key.shape} and {value.shape}"
        )
    if not query.dtype == key.dtype == value.dtype or query.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise InputError(
            "attention needs query, key and value of one dtype, bfloat16, float16 or float32; "
            f"it got {query.dtype}, {key.dtype} and {value.dtype}"
        )
