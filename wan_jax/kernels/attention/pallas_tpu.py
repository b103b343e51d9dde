"""Space-time attention for TPUs: a Pallas kernel in the manner of FlashAttention-2, with the contract of pallas_gpu.

A grid of (batch, head, tile of queries). Within it a loop streams the blocks of keys and values that the tile sees, all
or the listed ones, from HBM, one block ahead. Everything is computed transposed, logits [keys, queries] and output
[D, queries]: what belongs to a query (maximum, sum, range of keys) is then a row, and a reduction over keys adds whole
registers instead of the lanes of one. Arrays are head-major inside; the transposition also pads the keys to whole
blocks, so no block needs care but for its mask.

Milakov and Gimelshein, arXiv 1805.02867; Dao, FlashAttention-2, arXiv 2307.08691.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from wan_jax.kernels.attention.block_lists import BlockLists
from wan_jax.kernels.precision import matmul_precision

LOG2_E = math.log2(math.e)
LOWEST = -1e30  # where a running maximum starts: finite, so that LOWEST - LOWEST is 0 and never NaN
ROWS, LANES = 16, 128  # the tile in which registers and memory hold a bfloat16 matrix; float32's has 8 rows
WIDEST_HEAD = 256


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What may change the speed and never the result.

    Attributes:
      query_tile: queries of one grid step.
      key_block: keys of one step of its loop. Both in multiples of 16.
    """

    query_tile: int
    key_block: int

    def __post_init__(self):
        if self.query_tile % ROWS or self.key_block % ROWS:
            raise ValueError(f"{self} needs multiples of {ROWS}")


def default_tuning(query_length: int, key_length: int, head_dim: int) -> Tuning:
    """Nearly the best that the compiler schedules, and no more than the sequences need.

    Counted in libtpu's schedules, not measured: 202 logits a cycle on v5e and 329 on v6e at head_dim 128 in bfloat16;
    512 x 512 gives 183 and 258, 4096 x 512 gives 204 and 372 for twice the code.
    """

    def needed(length: int) -> int:
        return pl.cdiv(length, LANES) * LANES

    widest_tile = 2048 if head_dim <= 128 else 1024  # float32 and wider heads do not fit the 16 MB of TPU v4 otherwise
    return Tuning(min(widest_tile, needed(query_length)), min(512, needed(key_length)))


def supports(query: jax.Array, key: jax.Array, value: jax.Array) -> str | None:
    """Why this kernel cannot run this call here, or None."""
    del key, value
    device = jax.devices()[0]
    if device.platform != "tpu":
        return f"it needs a TPU and JAX runs on {device.device_kind}"
    return unsupported_shape(query)


def unsupported_shape(query: jax.Array) -> str | None:
    if query.dtype not in (jnp.bfloat16, jnp.float32):
        return f"it needs bfloat16 or float32 and the query is {query.dtype}"
    if query.shape[-1] > WIDEST_HEAD:
        return f"it needs a head_dim of at most {WIDEST_HEAD}, not {query.shape[-1]}"
    return None


def unsupported_lists(block_lists: BlockLists) -> str | None:
    if block_lists.query_tile % ROWS or block_lists.key_block % ROWS:
        sizes = f"{block_lists.query_tile} queries and {block_lists.key_block} keys"
        return f"it needs block lists for tiles and blocks in multiples of {ROWS}, not {sizes}"
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

    Logits, softmax and sums are float32; probabilities meet the values in the inputs' dtype, unnormalised.

    Args:
      query: [B, Sq, H, D], bfloat16 or float32, D at most 256.
      key, value: [B, Sk, H, D] in the same dtype. Lengths are free.
      scale: what the logits are multiplied by; 1/sqrt(D) if None.
      block_lists: which key blocks each tile of queries sees; its sizes are used. Lists for tiles and blocks of 512 or
        more are much faster here than those of 128 that suit GPUs.
      return_lse: also return the logits' log-sum-exp (natural logarithm).
      tuning: how to run; a default if None.
      interpret: pltpu.InterpretParams to run on the CPU.

    Returns:
      [B, Sq, H, D] in the query's dtype, and [B, H, Sq] float32 if return_lse. A query that sees no key gives 0 and
      -inf.

    Raises:
      ValueError: shapes, dtypes or block lists that do not fit.
    """
    batch, query_length, heads, head_dim = query.shape
    key_length = key.shape[1]
    if reason := unsupported_shape(query) or (block_lists is not None and unsupported_lists(block_lists)):
        raise ValueError(f"the pallas_tpu attention cannot run this call: {reason}")
    if key.shape != value.shape or key.shape != (batch, key_length, heads, head_dim):
        raise ValueError(f"attention of a query {query.shape} needs key and value [B, Sk, H, D]; got {key.shape}")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"attention needs one dtype; got {query.dtype}, {key.dtype} and {value.dtype}")
    if key_length == 0 or query_length == 0:
        raise ValueError(f"attention needs at least one query and one key; got {query.shape} and {key.shape}")
    if block_lists is not None:
        block_lists.check(batch, heads, query_length, key_length)
        tuning = Tuning(block_lists.query_tile, block_lists.key_block)
    elif tuning is None:
        tuning = default_tuning(query_length, key_length, head_dim)
    output, *lse = forward(
        query,
        key,
        value,
        () if block_lists is None else kernel_arrays(block_lists),
        scale=head_dim**-0.5 if scale is None else float(scale),
        tuning=tuning,
        return_lse=return_lse,
        interpret=interpret,
    )
    return (output, lse[0]) if return_lse else output


def kernel_arrays(lists: BlockLists) -> tuple[jax.Array, ...]:
    """The block lists as the kernel reads them: a row, or two, for each tile.

    (indices [B or 1, H or 1, tiles, 1, blocks], counts of all and of partial blocks [B or 1, H or 1, tiles, 1, 2]) and,
    if the lists have key ranges, these [tiles, 2, query_tile].
    """
    tiles, blocks = lists.indices.shape[-2:]
    lead = (1,) * (4 - lists.indices.ndim) + lists.indices.shape[:-2]
    indices = lists.indices.astype(jnp.int32).reshape(*lead, tiles, 1, blocks)
    partial_counts = jnp.zeros_like(lists.counts) if lists.partial_counts is None else lists.partial_counts
    counts = jnp.stack([lists.counts, partial_counts], -1).astype(jnp.int32).reshape(*lead, tiles, 1, 2)
    if lists.key_ranges is None:
        return indices, counts
    padding = tiles * lists.query_tile - len(lists.key_ranges)
    ranges = jnp.pad(lists.key_ranges.astype(jnp.int32), ((0, padding), (0, 0)))
    return indices, counts, ranges.reshape(tiles, lists.query_tile, 2).swapaxes(1, 2)


@functools.partial(jax.jit, static_argnames=("scale", "tuning", "return_lse", "interpret"))
def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    list_arrays: tuple[jax.Array, ...],
    *,
    scale: float,
    tuning: Tuning,
    return_lse: bool,
    interpret: Any,
) -> list[jax.Array]:
    """Runs the kernel: [output [B, Sq, H, D]] or [output, lse [B, H, Sq]]."""
    batch, query_length, heads, head_dim = query.shape
    key_length = key.shape[1]
    query_tile, key_block = tuning.query_tile, tuning.key_block
    tiles, blocks = pl.cdiv(query_length, query_tile), pl.cdiv(key_length, key_block)
    has_lists, has_ranges = bool(list_arrays), len(list_arrays) > 2
    is_ragged = key_length % key_block > 0
    precision = matmul_precision(query.dtype)

    def product(x, y, x_axis, y_axis):
        """Float32 product of two matrices, summed over an axis of each."""
        axes = (((x_axis,), (y_axis,)), ((), ()))
        return lax.dot_general(x, y, axes, precision=precision, preferred_element_type=jnp.float32)

    def kernel(query_ref, key_hbm, value_hbm, list_refs, output_ref, lse_ref, scratch):
        key_buffers, value_buffers, ready, maximum_ref, total_ref, sum_ref = scratch
        b, h = pl.program_id(0), pl.program_id(1)
        steps, partial_steps = (list_refs[1][0, 0], list_refs[1][0, 1]) if has_lists else (blocks, 0)

        def block_at(step):
            return list_refs[0][0, step] if has_lists else step

        def copies(step):
            """The copies of a step's keys and values into one of the two buffers."""
            rows = pl.ds(pl.multiple_of(block_at(step) * key_block, key_block), key_block)
            for i, (source, buffers) in enumerate(((key_hbm, key_buffers), (value_hbm, value_buffers))):
                yield pltpu.make_async_copy(source.at[b, h, rows], buffers.at[step % 2], ready.at[i, step % 2])

        def start_copies(step):
            for copy in copies(step):
                copy.start()

        def attend(step, masked):
            keys, values = key_buffers[step % 2], value_buffers[step % 2]
            logits = product(keys, query_ref[...], 1, 1) * (scale * LOG2_E)  # [key_block, query_tile], base 2
            if masked:
                position = block_at(step) * key_block + lax.broadcasted_iota(jnp.int32, logits.shape, 0)
                visible = position < key_length
                if has_ranges:
                    first, stop = list_refs[2][:1], list_refs[2][1:]
                    visible &= ((first <= position) & (position < stop)) | (step >= partial_steps)
                logits = jnp.where(visible, logits, -jnp.inf)
            maximum = jnp.maximum(maximum_ref[...], logits.max(axis=0, keepdims=True))
            weights = jnp.exp2(logits - maximum)
            rescale = jnp.exp2(maximum_ref[...] - maximum)
            maximum_ref[...] = maximum
            total_ref[...] = total_ref[...] * rescale + weights.sum(axis=0, keepdims=True)
            sum_ref[...] = sum_ref[...] * rescale + product(values, weights.astype(values.dtype), 0, 0)

        maximum_ref[...] = jnp.full_like(maximum_ref, LOWEST)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        pl.when(steps > 0)(lambda: start_copies(0))

        @pl.loop(0, steps)
        def stream(step):
            pl.when(step + 1 < steps)(lambda: start_copies(step + 1))
            for copy in copies(step):
                copy.wait()
            if not (is_ragged or has_ranges):
                attend(step, masked=False)
                return
            masked = step < partial_steps
            if is_ragged:
                masked |= block_at(step) == blocks - 1
            pl.when(masked)(lambda: attend(step, masked=True))
            pl.when(~masked)(lambda: attend(step, masked=False))

        total = total_ref[...]
        output = sum_ref[...] * jnp.where(total > 0, 1 / total, 0)
        output_ref[...] = output.T.astype(output_ref.dtype)
        if return_lse:
            lse_ref[...] = maximum_ref[...] * (1 / LOG2_E) + jnp.log(total)

    def list_spec(array):
        """A tile's row of indices or counts, into the memory of scalars."""
        of_batch, of_heads = array.shape[0] > 1, array.shape[1] > 1
        return pl.BlockSpec(
            (None, None, None, *array.shape[3:]),
            lambda b, h, tile: (b if of_batch else 0, h if of_heads else 0, tile, 0, 0),
            memory_space=pltpu.SMEM,
        )

    list_specs = [list_spec(array) for array in list_arrays[:2]]
    if has_ranges:
        list_specs.append(pl.BlockSpec((None, 2, query_tile), lambda b, h, tile: (tile, 0, 0)))
    tile_spec = pl.BlockSpec((None, None, query_tile, head_dim), lambda b, h, tile: (b, h, tile, 0))
    lse_spec = pl.BlockSpec((None, None, None, 1, query_tile), lambda b, h, tile: (b, h, tile, 0, 0))
    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    blocks_buffer = pltpu.VMEM((2, key_block, head_dim), query.dtype)
    row = pltpu.VMEM((1, query_tile), jnp.float32)
    output_type = jax.ShapeDtypeStruct((batch, heads, query_length, head_dim), query.dtype)
    lse_type = jax.ShapeDtypeStruct((batch, heads, tiles, 1, query_tile), jnp.float32)
    output, lse = pl.pallas_call(
        kernel,
        grid=(batch, heads, tiles),
        in_specs=[tile_spec, in_hbm, in_hbm, list_specs],
        out_specs=[tile_spec, lse_spec if return_lse else None],
        out_shape=[output_type, lse_type if return_lse else None],
        scratch_shapes=[
            [
                blocks_buffer,
                blocks_buffer,
                pltpu.SemaphoreType.DMA((2, 2)),
                row,
                row,
                pltpu.VMEM((head_dim, query_tile), jnp.float32),
            ]
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
        interpret=interpret or False,
    )(head_major(query), *(head_major(x, blocks * key_block) for x in (key, value)), list(list_arrays))
    lse = [lse.reshape(batch, heads, -1)[..., :query_length]] if return_lse else []
    return [output.swapaxes(1, 2), *lse]


def head_major(x: jax.Array, length: int | None = None) -> jax.Array:
    """[B, S, H, D] -> [B, H, S or `length`, D], the end filled with zeros."""
    padding = 0 if length is None else length - x.shape[1]
    return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, padding), (0, 0)))
