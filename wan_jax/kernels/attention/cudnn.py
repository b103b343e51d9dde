"""cuDNN's fused attention, through jax.nn.dot_product_attention. NVIDIA GPUs, bfloat16 and float16.

Logits, softmax and sums are float32 inside; the probabilities meet the values in the inputs' dtype. Gradients are
cuDNN's too, but for odd lengths, which its backward pass does not take: those are recomputed (backward.py).
"""

import jax
import jax.numpy as jnp

from wan_jax.kernels.attention import chunked
from wan_jax.kernels.attention.backward import with_recomputed_gradients
from wan_jax.kernels.attention.reference import Result


def supports(query, key, value, *, block_lists=None, return_lse=False) -> str | None:
    """Why cuDNN cannot run this call here, or None."""
    del key, value
    device = jax.devices()[0]
    if device.platform != "gpu" or "cuda" not in device.client.platform_version:
        return f"it needs an NVIDIA GPU and JAX runs on {device.platform}"
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it needs bfloat16 or float16 and the query is {query.dtype}"
    # Head widths above 128 came with Hopper (compute capability 9).
    widest = 256 if float(device.compute_capability) >= 9.0 else 128
    head_dim = query.shape[-1]
    if head_dim > widest or head_dim % 8:
        return f"it needs a head_dim of at most {widest} and divisible by 8, not {head_dim}"
    if block_lists is not None:
        return "it knows no block lists"
    if return_lse:
        return "it returns no float32 log-sum-exp"
    return None


def attention(query, key, value, *, scale, block_lists=None, return_lse=False) -> Result:
    """softmax(query key^T scale) value; see the package."""
    del block_lists, return_lse  # refused by supports
    if differentiates(query, key):
        return run(query, key, value, scale=scale)
    return with_recomputed_gradients(run_or_save, query, key, value, scale=scale, block_lists=None, return_lse=False)


def differentiates(query: jax.Array, key: jax.Array) -> bool:
    """Whether the backward pass takes these lengths: JAX refuses odd ones."""
    return query.shape[1] % 2 == 0 and key.shape[1] % 2 == 0


def run(query: jax.Array, key: jax.Array, value: jax.Array, *, scale: float) -> jax.Array:
    """cuDNN's kernels, forward and, where it `differentiates`, backward."""
    return jax.nn.dot_product_attention(query, key, value, scale=scale, implementation="cudnn")


def run_or_save(query, key, value, *, scale, block_lists, return_lse):
    """What with_recomputed_gradients asks for. Only a call that is differentiated needs the log-sum-exp."""
    if return_lse:
        return chunked.forward(query, key, value, scale=scale, block_lists=block_lists, return_lse=True)
    return run(query, key, value, scale=scale)
