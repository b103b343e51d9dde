"""Attention: one function, several backends.

A backend has two functions of (query, key, value, *, block_lists=None, return_lse=False): `supports`, which returns
None or the reason why it cannot run a call on this device, and `attention`, differentiable, which takes a `scale`, too.
Most are modules; a Pallas kernel becomes one with PallasBackend. Adding one is a file and a line in BACKENDS.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from wan_jax.kernels.attention import chunked, cudnn, pallas_gpu, pallas_tpu, reference
from wan_jax.kernels.attention.backward import with_recomputed_gradients
from wan_jax.kernels.attention.block_lists import BlockLists
from wan_jax.kernels.attention.reference import Result


@dataclass(frozen=True)
class PallasBackend:
    """A Pallas kernel as a backend, with gradients.

    Attributes:
      kernel: the module, with supports(query, key, value), unsupported_shape(query) and attention(...).
      unsupported_lists: why the kernel cannot run block lists of these sizes, or None.
      interpret: what JAX needs to interpret the kernel on the CPU; None runs it on its own device.
    """

    kernel: Any
    unsupported_lists: Callable[[BlockLists], str | None]
    interpret: Any = None

    def supports(self, query, key, value, *, block_lists=None, return_lse=False) -> str | None:
        del return_lse  # every kernel has it
        on_device = self.kernel.supports(query, key, value) if self.interpret is None else None
        reason = on_device or self.kernel.unsupported_shape(query)
        return reason or (None if block_lists is None else self.unsupported_lists(block_lists))

    def attention(self, query, key, value, *, scale, block_lists=None, return_lse=False) -> Result:
        wanted = {"block_lists": block_lists, "return_lse": return_lse}
        by_cudnn = cudnn.supports(query, key, value, **wanted) is None and cudnn.differentiates(query, key)
        return with_recomputed_gradients(
            functools.partial(self.kernel.attention, interpret=self.interpret),
            query,
            key,
            value,
            scale=scale,
            **wanted,
            faster=cudnn.run if by_cudnn else None,
        )


# (query_tile, key_block) that the instructions and the shared memory of a Hopper GPU allow.
HOPPER_LIST_SIZES = {(128, 64), (128, 128), (128, 192), (192, 64), (192, 128)}


def unsupported_by_hopper(block_lists: BlockLists) -> str | None:
    sizes = (block_lists.query_tile, block_lists.key_block)
    if sizes in HOPPER_LIST_SIZES:
        return None
    return f"it needs block lists of one of the sizes {sorted(HOPPER_LIST_SIZES)} (queries, keys), not {sizes}"


# Fastest first: the order in which `implementation=None` tries them.
BACKENDS: dict[str, Any] = {
    "pallas_gpu": PallasBackend(pallas_gpu, unsupported_by_hopper),
    "pallas_tpu": PallasBackend(pallas_tpu, pallas_tpu.unsupported_lists),
    "cudnn": cudnn,
    "reference": reference,
    "chunked": chunked,
}


@dataclass(frozen=True)
class AttentionOptions:
    """How a model's attention is computed; by default exactly, with the fastest implementation. Hashable.

    Attributes:
      implementation: a name in BACKENDS; None takes the fastest that supports the call.
      block_lists: makes the lists for self-attention from the number of tokens (frames, height, width): a hashable
        function, such as block_lists.TemporalWindow(4). None: every token sees every token.
    """

    implementation: str | None = None
    block_lists: Callable[[tuple[int, int, int]], BlockLists] | None = None


# Above this many bytes of logits the reference is no longer the fastest, and soon does not fit.
REFERENCE_LOGITS_BYTES = 4 * 2**20


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float | None = None,
    block_lists: BlockLists | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Any:
    """softmax(query key^T scale) value per head, over all keys or over the blocks of keys that `block_lists` names.

    Differentiable with respect to query, key and value, in bounded memory but for the reference.

    Args:
      query: [B, Sq, H, D], bfloat16, float16 or float32.
      key, value: [B, Sk, H, D] in the same dtype. Lengths are free.
      scale: what the logits are multiplied by, positive; 1/sqrt(D) if None.
      block_lists: which blocks of keys each tile of queries sees; None: every query sees every key.
      return_lse: also return the logits' log-sum-exp (natural logarithm).
      implementation: a name in BACKENDS; None takes the fastest that supports the call on the default device.

    Returns:
      [B, Sq, H, D] in the query's dtype, and [B, H, Sq] float32 if return_lse. A query that sees no key gives 0 and
      -inf. Logits, softmax and accumulation are float32; the probabilities are rounded to the inputs' dtype before
      they meet the values.

    Raises:
      ValueError: shapes, dtypes, a scale or block lists that do not fit, an unknown implementation, or one that cannot
        run the call.
    """
    if scale is None:
        scale = query.shape[-1] ** -0.5
    check_arguments(query, key, value, scale, block_lists)
    if implementation is None:
        implementation = fastest(query, key, value, block_lists=block_lists, return_lse=return_lse)
    if implementation not in BACKENDS:
        raise ValueError(f"unknown attention implementation {implementation!r}; use one of {', '.join(BACKENDS)}")
    backend = BACKENDS[implementation]
    if reason := backend.supports(query, key, value, block_lists=block_lists, return_lse=return_lse):
        raise ValueError(f"attention implementation {implementation!r} cannot run here: {reason}; use another or None")
    return backend.attention(query, key, value, scale=scale, block_lists=block_lists, return_lse=return_lse)


def fastest(query: jax.Array, key: jax.Array, value: jax.Array, **options: Any) -> str:
    """The name of the fastest backend that can run this call on the default device; options as of `attention`."""
    batch, query_length, heads, _ = query.shape
    logits_bytes = 4 * batch * heads * query_length * key.shape[1]
    for name, backend in BACKENDS.items():
        if name == "reference" and logits_bytes > REFERENCE_LOGITS_BYTES:
            continue
        if backend.supports(query, key, value, **options) is None:
            return name
    raise AssertionError("unreachable: 'chunked' runs everywhere")


def check_arguments(
    query: jax.Array, key: jax.Array, value: jax.Array, scale: float, block_lists: BlockLists | None
) -> None:
    if query.ndim != 4 or key.shape != value.shape or key.shape != (query.shape[0], *key.shape[1:2], *query.shape[2:]):
        raise ValueError(
            "attention needs a query [B, Sq, H, D] and a key and value [B, Sk, H, D]; "
            f"it got {query.shape}, {key.shape} and {value.shape}"
        )
    if 0 in query.shape or 0 in key.shape:
        raise ValueError(f"attention needs at least one of everything; it got {query.shape} and {key.shape}")
    if not query.dtype == key.dtype == value.dtype or query.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(
            "attention needs query, key and value of one dtype, bfloat16, float16 or float32; "
            f"it got {query.dtype}, {key.dtype} and {value.dtype}"
        )
    if scale <= 0:
        raise ValueError(f"attention needs a positive scale, not {scale}; negate the query instead")
    if block_lists is not None:
        batch, query_length, heads, _ = query.shape
        block_lists.check(batch, heads, query_length, key.shape[1])
