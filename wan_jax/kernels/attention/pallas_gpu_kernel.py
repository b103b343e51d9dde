"""Space-time attention for Hopper GPUs: a Pallas Mosaic-GPU kernel in the manner of FlashAttention-3.

One block of threads (CTA) computes 128 query rows of one head (or 192): consumer warpgroups of 64 rows each, and a
producer warpgroup that streams key and value blocks through shared memory with TMA. Arrays stay [B, S, H, D]
throughout: TMA cuts a head out of them, fills rows past the end with zeros and clips writes, so nothing is padded or
transposed. The key blocks that need a mask (the last, if the length is not a multiple of the block) are visited first;
the loop over the others has no condition in it.

Shah et al., FlashAttention-3, arXiv 2407.08608.
"""

import dataclasses
import functools
import importlib
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

JAX_NEEDED = (0, 11, 0)
# Older versions have the module, without what is needed here.
plgpu: Any = (
    importlib.import_module("jax.experimental.pallas.mosaic_gpu") if jax.__version_info__ >= JAX_NEEDED else None
)

WARPGROUP_ROWS = 64  # rows of one Hopper matrix instruction
CONSUMERS = {"free": 3, "ping_pong": 2, "two_stage_ping_pong": 2}  # warpgroups, by schedule
CONSUMER_REGISTERS = {2: 240, 3: 160}  # per thread; with the producer's all of the 65,536
PRODUCER_REGISTERS = 24
LOG2_E = math.log2(math.e)
TOTAL_LIMIT = 2.0**96  # of a row's sum: leaves 2^31 for the values in the float32 accumulator


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What may change the speed and never the result.

    Attributes:
      schedule: how softmax hides under matrix products. "free": three consumer warpgroups, as it comes. The others have
        two. "ping_pong": one's softmax under the other's products. "two_stage_ping_pong": also under its own product:
        softmax of block i + 1 beside value block i.
      key_block: keys per step, a multiple of 64.
      stages: key (and value) blocks in shared memory at once.
      running_maximum: subtract each row's maximum so far from the logits, as usual. False: that of the first block
        throughout, which saves a quarter of the instructions; a CTA whose sums outgrow TOTAL_LIMIT finds out at its
        end and starts again with a running maximum.
    """

    schedule: Literal["free", "ping_pong", "two_stage_ping_pong"] = "free"
    key_block: int = 128
    stages: int = 2
    running_maximum: bool = False

    def __post_init__(self):
        if self.schedule not in CONSUMERS or self.key_block % 64 or self.stages < 2:
            raise ValueError(f"{self} needs one of {sorted(CONSUMERS)}, key_block in 64s, and 2 or more stages")

    @property
    def consumers(self) -> int:
        """Warpgroups of 64 query rows in a CTA."""
        return CONSUMERS[self.schedule]

    @property
    def query_tile(self) -> int:
        """Query rows in a CTA."""
        return self.consumers * WARPGROUP_ROWS


@functools.partial(jax.jit, static_argnames=("key_length", "scale", "tuning", "return_lse", "interpret"))
def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    list_arrays: tuple[jax.Array, ...],
    *,
    key_length: int,
    scale: float,
    tuning: Tuning,
    return_lse: bool,
    interpret: Any,
) -> list[jax.Array]:
    """Runs the kernel: [output [B, Sq, H, D]] or [output, lse [B, H, Sq rounded up to whole tiles]]."""
    batch, query_length, heads, head_dim = query.shape
    key_block, stages = tuning.key_block, tuning.stages
    consumers, query_tile = tuning.consumers, tuning.query_tile
    tiles = pl.cdiv(query_length, query_tile)
    blocks = pl.cdiv(key_length, key_block)
    has_lists, has_ranges = bool(list_arrays), len(list_arrays) > 2
    last_is_unfinished = key_length % key_block > 0
    running_maximum = tuning.running_maximum or has_ranges
    scale_log2 = scale * LOG2_E  # exp(x scale) = 2^(x scale_log2)
    wgmma_layout = plgpu.Layout.WGMMA
    row_layout = wgmma_layout.reduce(1)

    def kernel(*refs, smem, ready, free, turn, checked):
        query_ref, key_ref, value_ref, *list_refs = refs[: 3 + len(list_arrays)]
        output_ref, *lse_ref = refs[3 + len(list_arrays) :]
        query_smem, key_smem, value_smem, row_smem, probability_smem = smem
        overflow_smem, lse_smem = row_smem.at[0], row_smem.at[1]
        query_ready, key_ready, value_ready = ready
        key_free, value_free = free
        b, h, warpgroup = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("warpgroup")
        tile = lax.axis_index("tile")

        def of_this_tile(ref, *index):
            return ref[b if ref.shape[0] > 1 else 0, h if ref.shape[1] > 1 else 0, tile, *index]

        def block_at(step):
            """The key block of a step: as listed, or the last one and then the others in order."""
            if not has_lists:
                return lax.rem(step + (blocks - 1), blocks)
            block = of_this_tile(list_refs[0], step)
            return lax.max(block, ~block) if has_ranges and last_is_unfinished else block

        def slot_of(step):
            return lax.rem(step, jnp.int32(stages))

        def overflowed():
            """Whether a sum of this CTA's rows left the range. All threads see the same."""
            return overflow_smem[...].max() > 0.5

        steps = of_this_tile(list_refs[1]) if has_lists else blocks

        @pl.when(warpgroup == consumers)
        def produce():
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

            def stream():
                @pl.loop(0, steps)
                def load(step):
                    slot, keys = slot_of(step), pl.ds(block_at(step) * key_block, key_block)
                    for source, smem, ready, free in (
                        (key_ref, key_smem, key_ready, key_free),
                        (value_ref, value_smem, value_ready, value_free),
                    ):
                        pl.when(step >= stages)(functools.partial(plgpu.barrier_wait, free.at[slot]))
                        plgpu.copy_gmem_to_smem(source.at[b, keys, h], smem.at[slot], ready.at[slot])

                # A second stream must find every slot free, as the first did.
                @pl.loop(lax.max(steps - stages, 0), steps)
                def drain(step):
                    plgpu.barrier_wait(key_free.at[slot_of(step)])
                    plgpu.barrier_wait(value_free.at[slot_of(step)])

            def stream_again():
                plgpu.barrier_wait(checked)
                pl.when(overflowed())(stream)

            stream()
            if not running_maximum:
                pl.when(steps > 0)(stream_again)

        @pl.when(warpgroup < consumers)
        def consume():
            plgpu.set_max_registers(CONSUMER_REGISTERS[consumers], action="increase")
            rows = pl.ds((tile * consumers + warpgroup) * WARPGROUP_ROWS, WARPGROUP_ROWS)
            queries = query_smem.at[warpgroup]
            plgpu.copy_gmem_to_smem(query_ref.at[b, rows, h], queries, query_ready.at[warpgroup])
            plgpu.barrier_wait(query_ready.at[warpgroup])
            if has_ranges:
                first_key, stop_key = (
                    plgpu.load(ref.at[rows], layout=row_layout, optimized=False) for ref in list_refs[3:]
                )
                partial_steps = of_this_tile(list_refs[2])

            def across(row_values, width):
                return lax.broadcast_in_dim(row_values, (WARPGROUP_ROWS, width), [0])

            def start_logits(logits_ref, slot):
                plgpu.wgmma(logits_ref, queries, key_smem.at[slot].T)

            def start_values(output_acc, output, probabilities, slot):
                """Begins output + probabilities @ values."""
                if interpret is None:
                    output_acc[...] = output
                else:  # The interpreter starts accumulators from zero and takes no operand from registers.
                    probability_smem[warpgroup] = probabilities
                    plgpu.commit_smem()
                    probabilities = probability_smem.at[warpgroup]
                plgpu.wgmma(output_acc, probabilities, value_smem.at[slot])

            def finish_values(output_acc, output):
                return output_acc[...] if interpret is None else output_acc[...] + output

            def add_up(probabilities):
                """Row sums; with registers to spare 8 partial ones, [rows, 8]: no exchange between threads."""
                if consumers == 3:
                    return probabilities.sum(axis=1)
                return functools.reduce(jnp.add, (probabilities[:, i : i + 8] for i in range(0, key_block, 8)))

            def softmax(logits, maximum, total, step, partial, running):
                """Online, base 2: (probabilities bf16, maximum, total, factor for what came before or None)."""
                if partial:
                    keys = plgpu.broadcasted_iota(jnp.int32, (key_block,), 0, layout=wgmma_layout.reduce(0))
                    keys = lax.broadcast_in_dim(keys + block_at(step) * key_block, logits.shape, [1])
                    visible = keys < key_length
                    if has_ranges:
                        in_range = (across(first_key, key_block) <= keys) & (keys < across(stop_key, key_block))
                        # Key ranges do not apply to the marked block; see pallas_gpu.kernel_arrays.
                        is_marked = of_this_tile(list_refs[0], step) < 0
                        visible = in_range | (visible & is_marked) if last_is_unfinished else in_range
                    logits = jnp.where(visible, logits, -jnp.inf)
                if not running:
                    probabilities = jnp.exp2(logits * scale_log2 - across(maximum, key_block))
                    return probabilities.astype(jnp.bfloat16), maximum, total + add_up(probabilities), None
                new_maximum = jnp.maximum(maximum, logits.max(axis=1) * scale_log2)
                offset = new_maximum
                if partial and has_ranges:  # A row may have seen nothing yet: no inf - inf.
                    offset = jnp.where(new_maximum == -jnp.inf, 0.0, new_maximum)
                probabilities = jnp.exp2(logits * scale_log2 - across(offset, key_block))
                factor = jnp.exp2(maximum - offset)
                total = total * (across(factor, 8) if total.ndim == 2 else factor) + add_up(probabilities)
                return probabilities.astype(jnp.bfloat16), new_maximum, total, factor

            def store(ref, row, values):
                ref[row] = values

            def rescale(output, factor):
                return output if factor is None else output * across(factor, head_dim)

            def ping_pong(running):
                alternate = tuning.schedule == "ping_pong"

                def swap():
                    if alternate:
                        plgpu.barrier_arrive(turn)
                        plgpu.barrier_wait(turn)

                def body(step, carry, partial=False, running=running):
                    output, maximum, total = carry
                    slot = slot_of(step)

                    def compute_logits(logits_ref):
                        start_logits(logits_ref, slot)
                        swap()
                        return logits_ref[...]

                    logits = pl.run_scoped(compute_logits, plgpu.ACC((WARPGROUP_ROWS, key_block)))
                    plgpu.barrier_arrive(key_free.at[slot])
                    probabilities, maximum, total, factor = softmax(logits, maximum, total, step, partial, running)
                    output = rescale(output, factor)
                    output, probabilities, maximum, total = lax.optimization_barrier(
                        (output, probabilities, maximum, total)
                    )
                    if alternate:
                        plgpu.barrier_arrive(turn)
                    plgpu.barrier_wait(value_ready.at[slot])
                    if alternate:
                        plgpu.barrier_wait(turn)

                    def add_values(output_acc):
                        start_values(output_acc, output, probabilities, slot)
                        pl.when(step + 1 < steps)(lambda: plgpu.barrier_wait(key_ready.at[slot_of(step + 1)]))
                        return finish_values(output_acc, output)

                    output = pl.run_scoped(add_values, plgpu.ACC((WARPGROUP_ROWS, head_dim)))
                    plgpu.barrier_arrive(value_free.at[slot])
                    return output, maximum, total

                plgpu.barrier_wait(key_ready.at[0])
                pl.when(warpgroup == 1)(swap)
                carry = run_steps(body, 0, initial())
                pl.when(warpgroup == 0)(swap)
                return carry

            def two_stage(running):
                def body(step, carry, partial=False):
                    """Logits of this step beside the values of the one before."""
                    output, probabilities, maximum, total = carry
                    slot, slot_before = slot_of(step), slot_of(step - 1)
                    plgpu.barrier_wait(key_ready.at[slot])
                    plgpu.barrier_wait(turn.at[warpgroup])

                    def overlap(logits_ref, output_acc):
                        start_logits(logits_ref, slot)
                        start_values(output_acc, output, probabilities, slot_before)
                        plgpu.barrier_arrive(turn.at[1 - warpgroup])
                        logits = plgpu.wgmma_accumulator_load(logits_ref, wait_n=1)
                        plgpu.barrier_arrive(key_free.at[slot])
                        after = softmax(logits, maximum, total, step, partial, running)
                        # This wait keeps the compiler from moving the next one above the exponentials.
                        plgpu.barrier_wait(value_ready.at[slot])
                        return finish_values(output_acc, output), *after

                    logits_type = plgpu.ACC((WARPGROUP_ROWS, key_block))
                    output, probabilities, maximum, total, factor = pl.run_scoped(
                        overlap, logits_type, plgpu.ACC((WARPGROUP_ROWS, head_dim))
                    )
                    plgpu.barrier_arrive(value_free.at[slot_before])
                    return rescale(output, factor), probabilities, maximum, total

                pl.when(warpgroup == 1)(lambda: plgpu.barrier_arrive(turn.at[0]))
                plgpu.barrier_wait(key_ready.at[0])

                def first_logits(logits_ref):
                    start_logits(logits_ref, 0)
                    return logits_ref[...]

                logits = pl.run_scoped(first_logits, plgpu.ACC((WARPGROUP_ROWS, key_block)))
                plgpu.barrier_arrive(key_free.at[0])
                output, maximum, total = initial()
                probabilities, maximum, total, _ = softmax(logits, maximum, total, 0, last_is_unfinished, running=True)
                plgpu.barrier_wait(value_ready.at[0])
                output, probabilities, maximum, total = run_steps(body, 1, (output, probabilities, maximum, total))
                last = slot_of(jnp.int32(steps - 1))

                def last_values(output_acc):
                    start_values(output_acc, output, probabilities, last)
                    return finish_values(output_acc, output)

                output = pl.run_scoped(last_values, plgpu.ACC((WARPGROUP_ROWS, head_dim)))
                plgpu.barrier_arrive(value_free.at[last])
                pl.when(warpgroup == 0)(lambda: plgpu.barrier_wait(turn.at[0]))
                return output, maximum, total

            def initial():
                output = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, head_dim), jnp.float32), wgmma_layout)
                maximum = plgpu.layout_cast(jnp.full((WARPGROUP_ROWS,), -jnp.inf, jnp.float32), row_layout)
                shape, layout = (
                    ((WARPGROUP_ROWS,), row_layout) if consumers == 3 else ((WARPGROUP_ROWS, 8), wgmma_layout)
                )
                return output, maximum, plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)

            def run_steps(body, start, carry):
                """body over the steps from `start` on, those with partial blocks first."""
                if has_ranges:
                    carry = lax.fori_loop(start, partial_steps, functools.partial(body, partial=True), carry)
                    start = lax.max(jnp.int32(start), partial_steps)
                elif start == 0:
                    carry, start = body(jnp.int32(0), carry, partial=last_is_unfinished, running=True), 1
                return lax.fori_loop(start, steps, body, carry)

            def write(output, lse):
                query_smem[warpgroup] = output.astype(jnp.bfloat16)  # this warpgroup is done with its queries
                if return_lse:
                    lse_smem[warpgroup] = lse
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(query_smem.at[warpgroup], output_ref.at[b, rows, h])
                if return_lse:
                    plgpu.copy_smem_to_gmem(lse_smem.at[warpgroup], lse_ref[0].at[b, h, rows])
                plgpu.wait_smem_to_gmem(0)

            def run(running):
                schedule = ping_pong if tuning.schedule in ("free", "ping_pong") else two_stage
                output, maximum, total = schedule(running)
                return output, maximum, total if total.ndim == 1 else total.sum(axis=1)

            def attend():
                output, maximum, total = run(running_maximum)
                if not running_maximum:
                    overflow = jnp.where(total > TOTAL_LIMIT, 1.0, 0.0)
                    store(overflow_smem, warpgroup, overflow)
                    if consumers == 3:  # the fourth row fills up to a multiple of the threads
                        pl.when(warpgroup == 0)(lambda: store(overflow_smem, 3, overflow))
                    plgpu.barrier_arrive(checked)
                    plgpu.barrier_wait(checked)
                    output, maximum, total = lax.cond(
                        overflowed(), lambda: run(running=True), lambda: (output, maximum, total)
                    )
                share = jnp.where(total > 0.0, 1.0 / total, 0.0)
                lse = jnp.where(total > 0.0, maximum * (1 / LOG2_E) + jnp.log(total), -jnp.inf)
                write(output * across(share, head_dim), lse)

            def attend_nothing():
                output, nothing, _ = initial()
                write(output, nothing)

            if has_lists:
                lax.cond(steps > 0, attend, attend_nothing)
            else:
                attend()

    def smem(*shape, dtype=jnp.bfloat16):
        swizzle = plgpu.find_swizzle(shape[-1] * 16)
        transforms = (plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle))
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    free = plgpu.Barrier(num_arrivals=consumers, num_barriers=stages)
    turn = plgpu.Barrier(num_barriers=2) if tuning.schedule == "two_stage_ping_pong" else plgpu.Barrier(num_arrivals=2)
    output_types = [jax.ShapeDtypeStruct(query.shape, query.dtype)]
    if return_lse:
        output_types.append(jax.ShapeDtypeStruct((batch, heads, tiles * query_tile), jnp.float32))
    return plgpu.kernel(
        kernel,
        out_type=output_types,
        scratch_types={
            "smem": (
                smem(consumers, WARPGROUP_ROWS, head_dim),
                smem(stages, key_block, head_dim),
                smem(stages, key_block, head_dim),
                plgpu.SMEM((2, 2 * pl.cdiv(consumers, 2), WARPGROUP_ROWS), jnp.float32),
                smem(consumers, WARPGROUP_ROWS, key_block) if interpret is not None else None,
            ),
            "ready": (
                plgpu.Barrier(num_barriers=consumers),
                plgpu.Barrier(num_barriers=stages),
                plgpu.Barrier(num_barriers=stages),
            ),
            "free": (free, free),
            "turn": turn,
            "checked": plgpu.Barrier(num_arrivals=consumers),
        },
        grid=(batch, heads, tiles),
        grid_names=("batch", "head", "tile"),
        num_threads=consumers + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=16),
        interpret=interpret,
    )(query, key, value, *list_arrays)
