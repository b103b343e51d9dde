"""Time in exchange, read from traces of the shape that XLA's profiler gives on NVIDIA GPUs."""

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from wan_bench import trace
from wan_bench.trace import alone, exchange_times, is_exchange, length, traced, union

pytestmark = pytest.mark.quick

# Names as in NCCL 2.29's symbols, demangled.
SEND = "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)"
GATHER = "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
REDUCE = "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
ATTENTION = "mosaic_gpu_attention_kernel"
PRODUCT = "nvjet_sm90_tst_192x192_64x4_1x2_h_bz_coopB_bias_TNN"


class Plane:
    """Text of a plane of an XSpace: lines of (name, start and end in microseconds, stats)."""

    def __init__(self, name):
        self.name, self.names, self.stats, self.lines = name, {}, {}, []

    def line(self, name, events):
        texts = []
        for event, start, end, *stats in events:
            number = self.names.setdefault(event, len(self.names) + 1)
            known = " ".join(
                f'stats {{ metadata_id: {self.stats.setdefault(stat, len(self.stats) + 1)} str_value: "{value}" }}'
                for stat, value in dict(*stats).items()
            )
            place = f"offset_ps: {start * 10**6} duration_ps: {(end - start) * 10**6}"
            texts.append(f"events {{ metadata_id: {number} {place} {known} }}")
        self.lines.append(f'lines {{ id: {len(self.lines) + 1} name: "{name}" timestamp_ns: 5 {" ".join(texts)} }}')
        return self

    def __str__(self):
        def table(kind, names):
            return "".join(
                f'{kind} {{ key: {number} value {{ id: {number} name: "{name}" }} }} ' for name, number in names.items()
            )

        tables = table("event_metadata", self.names) + table("stat_metadata", self.stats)
        return f'planes {{ name: "{self.name}" {" ".join(self.lines)} {tables} }}'


def read(*planes):
    return exchange_times(ProfileData.from_text_proto("\n".join(map(str, planes))))


def gpu(number):
    """10-40 all-to-all, 20-60 attention, 60-70 all-gather, 65-80 a copy to the other GPU, 80-100 a product."""
    peer = {"memcpy_details": f"kind_src:device kind_dst:device size:96768000 dest:{1 - number} async:1"}
    own = {"memcpy_details": f"kind_src:device kind_dst:device size:96768000 dest:{number} async:1"}
    plane = Plane(f"/device:GPU:{number}")
    plane.line("Stream #13(Kernel,MemcpyD2D)", [(ATTENTION, 20, 60), (PRODUCT, 80, 100), ("MemcpyD2D", 100, 105, own)])
    plane.line("Stream #18(Kernel)", [(SEND, 10, 40, {"hlo_op": "all-to-all-start.4"}), (GATHER, 60, 70)])
    plane.line("Stream #21(MemcpyD2D)", [("MemcpyD2D", 65, 80, peer)])
    # Summaries, which would count everything twice.
    return plane.line("XLA Ops", [("all-to-all-start.4", 10, 40), ("custom-call.2", 20, 60), (REDUCE, 0, 1000)])


def test_exchange_of_two_gpus():
    times = read(Plane("/host:CPU").line("python", [(SEND, 0, 1000)]), gpu(0), gpu(1), Plane("/device:GPU:2"))
    assert times["exchange_seconds"] == pytest.approx(50e-6)  # 10 to 40 and 60 to 80
    assert times["exchange_alone_seconds"] == pytest.approx(30e-6)  # 10 to 20 and 60 to 80
    kinds = {"ncclDevKernel_SendRecv": 30e-6, "ncclDevKernel_AllGather_RING_LL": 10e-6, "MemcpyD2D": 15e-6}
    assert times["exchange_kinds"] == pytest.approx(kinds)


def test_a_trace_that_does_not_say():
    assert read(Plane("/host:CPU").line("python", [(SEND, 0, 10)])) == {
        "exchange": "not measured: the trace has no events of GPUs"
    }
    plane = Plane("/device:GPU:0").line("Stream #13(Kernel)", [(ATTENTION, 0, 10), (PRODUCT, 10, 20)])
    assert read(plane) == {"exchange": "not measured: none of the 2 events of GPUs is an exchange"}


def test_which_events_exchange():
    for name in (SEND, GATHER, REDUCE, "ncclSymkDevKernel_AllReduce_RSxLD_AGxST_sum_bf16", "MemcpyP2P"):
        assert is_exchange(name, {}, 0)
    assert is_exchange("all_reduce_kernel", {"hlo_op": "all-reduce-start.1"}, 0)  # of XLA's own
    assert not is_exchange("loop_transpose_fusion_2", {"hlo_op": "loop_transpose_fusion.2"}, 0)
    assert not is_exchange("MemcpyD2D", {"memcpy_details": "kind_src:device kind_dst:device size:1 dest:3 async:1"}, 3)
    for name in ("MemcpyD2D", "MemcpyH2D", "MemcpyD2H", "Memset", ATTENTION, PRODUCT):
        assert not is_exchange(name, {}, 0)


def test_intervals():
    """[0, 4] and [6, 10] exchange, [2, 7] and [9, 12] compute."""
    exchanges, others = [(6, 10), (0, 3), (1, 4)], [(2, 7), (9, 12)]
    assert union(exchanges) == [(0, 4), (6, 10)]
    assert length(union(exchanges)) == 8
    assert alone(exchanges, others) == 4  # [0, 2] and [7, 9]


def test_a_real_trace_of_a_cpu_and_failures_are_said(monkeypatch):
    assert traced(lambda: jax.block_until_ready(jnp.ones(3) + 1)) == {
        "exchange": "not measured: the trace has no events of GPUs"
    }

    def fail(_):
        raise RuntimeError("CUPTI\nsays no")

    monkeypatch.setattr(trace, "exchange_times", fail)
    assert traced(lambda: None) == {"exchange": "not measured: RuntimeError: CUPTI says no"}
