"""Sequence parallelism: each device holds a part of the video's tokens, and attention sees all of them.

    Ulysses   an all-to-all exchange before attention turns a part of the tokens with all heads into all tokens with a
              part of the heads; another one after attention turns it back (Jacobs et al. 2023, arXiv:2309.14509)
    ring      keys and values go around the devices; each device attends to one part after the other and merges the
              results by their log-sum-exp (Liu et al. 2023, arXiv:2310.01889)

Both combine: Ulysses within groups of neighbours, the ring between the groups. Any number of tokens works: the last
parts are padded, and nothing attends to padding.
"""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from wan_jax.kernels.attention import attention
from wan_jax.kernels.attention.block_lists import BlockLists
from wan_jax.parallel import collectives
from wan_jax.parallel.collectives import FSDP, RING, ULYSSES

HEAD_AXES = (FSDP, ULYSSES)  # along these heads are exchanged for tokens
TOKEN_AXES = (RING, *HEAD_AXES)
ULYSSES_CHUNKS = 2  # of the heads: one is exchanged while another is attended

Partial = tuple[jax.Array, jax.Array]  # attention to a part of the keys: output [B, S, H, D], log-sum-exp [B, H, S]


def is_split() -> bool:
    """Whether devices hold different tokens."""
    return collectives.size(*TOKEN_AXES) > 1


def split_tokens(tree: Any, axis: int) -> Any:
    """Arrays of all tokens -> this device's tokens."""
    return collectives.split_axis(tree, TOKEN_AXES, axis)


def join_tokens(array: jax.Array, axis: int, tokens: int) -> jax.Array:
    """This device's tokens -> all of them, without padding."""
    return collectives.join_axis(array, TOKEN_AXES, axis, tokens)


def sequence_parallel_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    tokens: int,
    implementation: str | None = None,
    block_lists: BlockLists | None = None,
) -> jax.Array:
    """Attention of this device's tokens to all tokens of the video.

    Args:
      query, key, value: [B, S / devices, H, D], this device's part of padded tokens.
      tokens: how many there are in all, without padding.
      implementation, block_lists: see wan_jax.kernels.attention; the lists are for all heads and all tokens.

    Returns:
      [B, S / devices, H, D]; rows of padding hold anything finite.

    Raises:
      ValueError: block lists on a ring, whose devices see a part of the keys at a time.
    """
    attend = partial(attention, implementation=implementation, block_lists=block_lists)
    if collectives.size(RING) > 1:
        if block_lists is not None:
            raise ValueError("block lists do not work with ring attention; use another mesh axis, such as ulysses")
        attend = partial(_ring, tokens=tokens, implementation=implementation)
    names = collectives.bound(*HEAD_AXES)
    if not names:
        return attend(query, key, value)
    group, heads = collectives.size(*names), query.shape[2]
    in_group = min(tokens, group * query.shape[1]) if collectives.size(RING) == 1 else group * query.shape[1]
    chunks = ULYSSES_CHUNKS if heads // group % ULYSSES_CHUNKS == 0 else 1
    exchange = partial(lax.all_to_all, axis_name=names, tiled=True)
    outputs = []
    for chunk in range(chunks):
        part = slice(chunk * heads // chunks, (chunk + 1) * heads // chunks)
        q, k, v = (exchange(x[:, :, part], split_axis=2, concat_axis=1) for x in (query, key, value))
        rows = q.shape[1] if block_lists is None else tokens  # block lists have no rows for padding
        y = attend(q[:, :rows], k[:, :in_group], v[:, :in_group])
        if rows < q.shape[1]:
            y = jnp.pad(y, [(0, 0), (0, q.shape[1] - rows), (0, 0), (0, 0)])
        outputs.append(exchange(y, split_axis=1, concat_axis=2))
    return outputs[0] if chunks == 1 else jnp.concatenate(outputs, axis=2)


def _ring(query: jax.Array, key: jax.Array, value: jax.Array, *, tokens: int, implementation: str | None) -> jax.Array:
    """Attention of query [B, S / ring, H, D] to the keys of all devices along the ring, `tokens` without padding."""
    devices, device, part = collectives.size(RING), collectives.index(RING), key.shape[1]
    # The number of keys without padding differs on the last devices alone. There is a branch for each number.
    lengths = [min(max(tokens - start * part, 0), part) for start in range(devices)]
    kinds = sorted(set(lengths))
    branches = [_partial_attention(length, implementation) for length in kinds]
    kind_of = jnp.array([kinds.index(length) for length in lengths])

    partials = []
    neighbours = [(source, (source + 1) % devices) for source in range(devices)]
    for hop in range(devices):
        # Sent before the kernel starts, so that the next keys arrive while these are attended.
        arriving = None if hop == devices - 1 else lax.ppermute((key, value), RING, neighbours)
        kind = kind_of[(device - hop) % devices]
        partials.append(lax.switch(kind, branches, query, key, value))
        if arriving is not None:
            key, value = arriving
    output, _ = reduce(_merge, partials)
    return output.astype(query.dtype)


def _partial_attention(length: int, implementation: str | None) -> Callable[..., Partial]:
    """Attention to the first `length` keys."""

    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> Partial:
        if length == 0:
            return _no_keys(query)
        output, lse = attention(
            query, key[:, :length], value[:, :length], return_lse=True, implementation=implementation
        )
        return output.astype(jnp.float32), lse

    return attend


def _no_keys(query: jax.Array) -> Partial:
    batch, rows, heads, _ = query.shape
    return jnp.zeros(query.shape, jnp.float32), jnp.full((batch, heads, rows), -jnp.inf)


def _merge(left: Partial, right: Partial) -> Partial:
    """Attention to two sets of keys -> attention to their union."""
    (left_output, left_lse), (right_output, right_lse) = left, right
    lse = jnp.logaddexp(left_lse, right_lse)

    def weight(part: jax.Array) -> jax.Array:
        share = jnp.where(jnp.isneginf(part), 0.0, jnp.exp(part - lse))  # both sets may be empty
        return share.swapaxes(1, 2)[..., None]  # [B, S, H, 1]

    return left_output * weight(left_lse) + right_output * weight(right_lse), lse
