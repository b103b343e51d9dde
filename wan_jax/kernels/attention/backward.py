"""Gradients of attention in bounded memory, for forward kernels that have none of their own.

The forward pass keeps its inputs, its output and the logits' log-sum-exp. From these the probabilities are recomputed
a chunk of queries and keys at a time: p = exp(logits - lse), and with o the output
    dv = p^T do,    dlogits = p (do v^T - sum(o do) + dlse),    dq = dlogits k scale,    dk = dlogits^T q scale
(Dao et al., FlashAttention, arXiv 2205.14135, algorithm 4). Sums are float32; p and dlogits meet the other factor in
the inputs' dtype.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from wan_jax.kernels.attention.block_lists import BlockLists
from wan_jax.kernels.attention.chunks import chunk_lengths, merge, split, visibility
from wan_jax.kernels.attention.reference import Result, einsum_float32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Saved:
    """What the backward pass needs."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    block_lists: BlockLists | None
    output: jax.Array
    lse: jax.Array


def with_recomputed_gradients(
    forward: Callable[..., Result],
    *call: jax.Array,
    scale: float,
    block_lists: BlockLists | None,
    return_lse: bool,
    faster: Callable[..., jax.Array] | None = None,
) -> Result:
    """forward(query, key, value, scale=, block_lists=, return_lse=), differentiable with respect to the three arrays.

    A call that is differentiated runs `faster`, forward and backward, if it is given: the same function with gradients
    of its own, without block lists and log-sum-exp.
    """
    return differentiable(forward, float(scale), return_lse, faster, *call, block_lists)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def differentiable(forward, scale, return_lse, faster, query, key, value, block_lists):
    del faster
    return forward(query, key, value, scale=scale, block_lists=block_lists, return_lse=return_lse)


def forward_and_save(forward, scale, return_lse, faster, query, key, value, block_lists):
    if faster is not None:
        return jax.vjp(functools.partial(faster, scale=scale), query, key, value)
    output, lse = forward(query, key, value, scale=scale, block_lists=block_lists, return_lse=True)
    output, lse = checkpoint_name(output, RESULTS), checkpoint_name(lse, RESULTS)
    return (output, lse) if return_lse else output, Saved(query, key, value, block_lists, output, lse)


def backward(forward, scale, return_lse, faster, saved, cotangents):
    del forward, faster
    if not isinstance(saved, Saved):  # the function that jax.vjp made
        return *saved(cotangents), None
    d_output, d_lse = cotangents if return_lse else (cotangents, None)
    return *gradients(saved, d_output, d_lse, scale=scale), None


differentiable.defvjp(forward_and_save, backward)


RESULTS = "attention results"
CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"  # JAX's name for it; without it attention would run once more


def keeps_attention(primitive: Any, *_: Any, **parameters: Any) -> bool:
    """A policy for jax.checkpoint: keep what attention computed, output and log-sum-exp, and nothing else."""
    return primitive.name == CUDNN_FORWARD or (primitive.name == "name" and parameters["name"] == RESULTS)


def gradients(
    saved: Saved, d_output: jax.Array, d_lse: jax.Array | None, *, scale: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of query, key and value, in their dtype.

    Args:
      saved: of the forward pass.
      d_output: the loss's gradient with respect to the output, [B, Sq, H, D].
      d_lse: the same for the log-sum-exp, [B, H, Sq], or None.
      scale: what the logits were multiplied by.
    """
    query_length, key_length = saved.query.shape[1], saved.key.shape[1]
    query_chunk, key_chunk = chunk_lengths(query_length, key_length, saved.block_lists)
    visible = visibility(saved.block_lists, query_length, key_length, query_chunk, key_chunk)
    dtype = saved.query.dtype

    delta = jnp.sum(saved.output.astype(jnp.float32) * d_output.astype(jnp.float32), axis=-1).swapaxes(1, 2)  # [b h q]
    if d_lse is not None:
        delta -= d_lse
    # Padded with zeros, d_output and delta too: what is padding adds nothing.
    of_queries = (
        split(saved.query, query_chunk),
        split(d_output, query_chunk),
        split(saved.lse, query_chunk, axis=2),
        split(delta, query_chunk, axis=2),
    )
    of_keys = split(saved.key, key_chunk), split(saved.value, key_chunk)

    def add_keys(d_queries, xs):
        j, keys, values = xs

        def add_queries(carry, xs):
            d_queries, d_keys, d_values = carry
            i, queries, d_outputs, lses, deltas = xs
            logits = einsum_float32("b q h d, b k h d -> b h q k", queries, keys) * scale
            probabilities = jnp.exp(logits - lses[..., None])
            if (mask := visible(i, j)) is not None:  # also where a query sees nothing and its lse is -inf
                probabilities = jnp.where(mask, probabilities, 0.0)
            d_probabilities = einsum_float32("b q h d, b k h d -> b h q k", d_outputs, values)
            d_logits = (probabilities * (d_probabilities - deltas[..., None])).astype(dtype)
            d_values += einsum_float32("b h q k, b q h d -> b k h d", probabilities.astype(dtype), d_outputs)
            d_keys += einsum_float32("b h q k, b q h d -> b k h d", d_logits, queries)
            d_queries = d_queries.at[i].add(einsum_float32("b h q k, b k h d -> b q h d", d_logits, keys))
            return (d_queries, d_keys, d_values), None

        nothing = jnp.zeros(keys.shape, jnp.float32)
        start = (d_queries, nothing, nothing)
        xs = (jnp.arange(len(d_queries)), *of_queries)
        (d_queries, d_keys, d_values), _ = lax.scan(add_queries, start, xs)
        return d_queries, ((d_keys * scale).astype(dtype), d_values.astype(dtype))

    d_queries = jnp.zeros(of_queries[0].shape, jnp.float32)
    xs = (jnp.arange(len(of_keys[0])), *of_keys)
    d_queries, (d_keys, d_values) = lax.scan(add_keys, d_queries, xs)
    d_query = merge((d_queries * scale).astype(dtype), query_length)
    return d_query, merge(d_keys, key_length), merge(d_values, key_length)
