"""Space-time attention for Hopper GPUs: when the kernel runs, how it is tuned, and its arguments.

The kernel is in pallas_gpu_kernel.py.
"""

from typing import Any

import jax
import jax.numpy as jnp

from wan_jax.kernels.attention.block_lists import BlockLists
from wan_jax.kernels.attention.pallas_gpu_kernel import JAX_NEEDED, Tuning, forward

TOO_OLD = f"it needs jax >= {'.'.join(map(str, JAX_NEEDED))} (Python >= 3.12) and this is jax {jax.__version__}"


def default_tuning(key_length: int, block_lists: BlockLists | None) -> Tuning:
    """The fastest measured on an H200 (benchmarks/results/attention_h200.json)."""
    if block_lists is None:
        # With few steps per CTA, as in cross-attention, a fixed maximum does not pay.
        return Tuning(running_maximum=key_length < 2048)
    if block_lists.query_tile == 192:
        return Tuning("free", block_lists.key_block)
    if block_lists.key_ranges is None:
        return Tuning("two_stage_ping_pong", block_lists.key_block)
    # Two loops, partial blocks and whole ones, in two stages make ptxas serialise the matrix instructions (C7513).
    return Tuning("ping_pong", block_lists.key_block)


def supports(query: jax.Array, key: jax.Array, value: jax.Array) -> str | None:
    """Why this kernel cannot run this call here, or None."""
    del key, value
    if jax.__version_info__ < JAX_NEEDED:
        return TOO_OLD
    device = jax.devices()[0]
    if device.platform != "gpu" or device.compute_capability != "9.0":
        return f"it needs a Hopper GPU (compute capability 9.0) and JAX runs on {device.device_kind}"
    return unsupported_shape(query)


def unsupported_shape(query: jax.Array) -> str | None:
    if query.dtype != jnp.bfloat16:
        return f"it needs bfloat16 and the query is {query.dtype}"
    if query.shape[-1] not in (64, 128):
        return f"it needs a head_dim of 64 or 128, not {query.shape[-1]}"
    return None


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float | None = None,
    block_lists: BlockLists | None = None,
    return_lse: bool = False,
    tuning: Tuning | None = None,
    interpret: Any = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """softmax(query key^T scale) value per head, over all keys or over the key blocks that `block_lists` names.

    Logits, softmax and sums are float32; probabilities meet the values in bfloat16, unnormalised.

    Args:
      query: [B, Sq, H, D] bfloat16, D 64 or 128.
      key, value: [B, Sk, H, D] bfloat16. Lengths are free; ones above 8 that 8 does not divide cost a padded copy.
      scale: what the logits are multiplied by, positive; 1/sqrt(D) if None.
      block_lists: which key blocks each tile of queries sees; tiles of 128 or 192 queries.
      return_lse: also return the logits' log-sum-exp (natural logarithm).
      tuning: how to run; the fastest that is known if None.
      interpret: plgpu.InterpretGPUParams to run on the CPU.

    Returns:
      [B, Sq, H, D] bfloat16, and [B, H, Sq] float32 if return_lse. A query that sees no key gives 0 and -inf.

    Raises:
      ValueError: an old jax, or a call that this kernel cannot run. Whether the arguments fit each other is for the
        package to check.
    """
    query_length, key_length = query.shape[1], key.shape[1]
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if tuning is None:
        tuning = default_tuning(key_length, block_lists)
    if jax.__version_info__ < JAX_NEEDED:
        raise ValueError(f"the pallas_gpu attention cannot run here: {TOO_OLD}")
    if reason := unsupported_shape(query):
        raise ValueError(f"the pallas_gpu attention cannot run this call: {reason}")
    if block_lists is not None:
        sizes = block_lists.query_tile, block_lists.key_block
        if sizes != (tuning.query_tile, tuning.key_block):
            raise ValueError(f"block lists of {sizes} queries and keys do not fit {tuning}; use 128 or 192 queries")
        if block_lists.key_ranges is not None and tuning.schedule == "two_stage_ping_pong":
            raise ValueError("block lists with key ranges do not run in two stages; use ping_pong")
    arrays = () if block_lists is None else kernel_arrays(block_lists, key_length)
    # TMA takes rows in eights.
    padded = (pad_rows_to_eights(x) for x in (query, key, value))
    output, *lse = forward(
        *padded,
        arrays,
        key_length=key_length,
        scale=scale,
        tuning=tuning,
        return_lse=return_lse,
        interpret=interpret,
    )
    output = output[:, :query_length]
    return (output, lse[0][..., :query_length]) if return_lse else output


def pad_rows_to_eights(x: jax.Array) -> jax.Array:
    length = x.shape[1]
    if length <= 8 or length % 8 == 0:
        return x
    return jnp.pad(x, ((0, 0), (0, -length % 8), (0, 0), (0, 0)))


def kernel_arrays(lists: BlockLists, key_length: int) -> tuple[jax.Array, ...]:
    """The block lists as the kernel reads them.

    (indices [B or 1, H or 1, tiles, blocks], counts [B or 1, H or 1, tiles]) and, if the lists have key ranges,
    (partial_counts, as counts; first [tiles * lists.query_tile]; stop, as first).

    A whole block that reaches past the last key has to be masked: it comes before the other whole ones. Among partial
    blocks it is marked, as ~index, because the key ranges do not apply to it.
    """
    indices, counts = lists.indices.astype(jnp.int32), lists.counts.astype(jnp.int32)
    partial = jnp.zeros_like(counts) if lists.partial_counts is None else lists.partial_counts.astype(jnp.int32)
    tiles, max_blocks = indices.shape[-2:]
    if key_length % lists.key_block:
        last, entry = key_length // lists.key_block, jnp.arange(max_blocks)
        is_last = (indices == last) & (partial[..., None] <= entry) & (entry < counts[..., None])
        found = is_last.any(-1)
        first_whole = jnp.take_along_axis(indices, jnp.minimum(partial, max_blocks - 1)[..., None], axis=-1)
        indices = jnp.where(is_last, first_whole, indices)
        takes_it = found[..., None] & (entry == partial[..., None])
        indices = jnp.where(takes_it, last if lists.key_ranges is None else ~last, indices)
        partial += found
    lead = (1,) * (4 - indices.ndim) + indices.shape[:-2]
    arrays = indices.reshape(*lead, tiles, max_blocks), counts.reshape(*lead, tiles)
    if lists.key_ranges is None:
        return arrays
    padding = tiles * lists.query_tile - len(lists.key_ranges)
    ranges = jnp.pad(lists.key_ranges.astype(jnp.int32), ((0, padding), (0, 0)))
    return *arrays, partial.reshape(*lead, tiles), ranges[:, 0], ranges[:, 1]
