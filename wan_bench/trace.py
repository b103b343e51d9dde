"""The time that GPUs spend in exchange with each other, from a profiler trace.

A trace of JAX on NVIDIA GPUs (XLA's CUPTI collector, XSpace) has a plane "/device:GPU:0" for each device, with a line
"Stream #13(Kernel)" for each stream beside lines that only summarise ("XLA Ops", "XLA Modules", "Steps"). An event is:

    ncclDevKernel_SendRecv(...)                    all-to-all, collective-permute, by NCCL
    ncclDevKernel_AllGather_RING_LL(...)           all-gather
    ncclDevKernel_AllReduce_Sum_bf16_RING_LL(...)  all-reduce (_Sum_f32_..., _TREE_LL, ...)
    ncclSymkDevKernel_...                          the same in registered memory
    MemcpyP2P                                      a copy engine, from GPU to GPU
    MemcpyD2D                                      a copy within a GPU; between two where its stat "memcpy_details" has
                                                   another device as "dest:"
    anything else                                  a kernel, an exchange where its stat "hlo_op" is a collective of XLA
                                                   (kernels of XLA's own)
"""

import pathlib
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

Interval = tuple[float, float]

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "ragged-all-to-all", "reduce-scatter")


@dataclass
class Times:
    """What one device did in a trace, in nanoseconds."""

    exchanges: list[Interval] = field(default_factory=list)
    others: list[Interval] = field(default_factory=list)


def traced(call: Callable[[], Any]) -> dict[str, Any]:
    """Runs `call` under the profiler; see `exchange_times`. What goes wrong is said and not raised."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                call()
            files = sorted(pathlib.Path(folder).rglob("*.xplane.pb"))
            if not files:
                return _not_measured("the profiler wrote no trace")
            return exchange_times(jax.profiler.ProfileData.from_file(str(files[0])))
    except Exception as error:
        return _not_measured(" ".join(f"{type(error).__name__}: {error}".split())[:300])


def exchange_times(trace: jax.profiler.ProfileData) -> dict[str, Any]:
    """Seconds of exchange, and of exchange with nothing beside it, means over the GPUs; seconds of each kind.

    {"exchange": "not measured: ..."} where the trace does not say.
    """
    devices: list[Times] = []
    kinds: defaultdict[str, float] = defaultdict(float)
    for plane in trace.planes:
        match = re.fullmatch(r"/device:GPU:(\d+)", plane.name)
        if not match:
            continue
        times = Times()
        for line in plane.lines:
            for event in line.events if line.name.startswith("Stream") else ():
                interval = event.start_ns, event.start_ns + event.duration_ns
                if is_exchange(event.name, dict(event.stats), int(match[1])):
                    times.exchanges.append(interval)
                    kinds[event.name.partition("(")[0]] += event.duration_ns / 1e9
                else:
                    times.others.append(interval)
        if times.exchanges or times.others:
            devices.append(times)
    if not devices:
        return _not_measured("the trace has no events of GPUs")
    if not kinds:
        count = sum(len(each.others) for each in devices)
        return _not_measured(f"none of the {count} events of GPUs is an exchange")
    return {
        "exchange_seconds": float(np.mean([length(union(each.exchanges)) for each in devices])) / 1e9,
        "exchange_alone_seconds": float(np.mean([alone(each.exchanges, each.others) for each in devices])) / 1e9,
        "exchange_kinds": {name: seconds / len(devices) for name, seconds in kinds.items()},
    }


def _not_measured(why: str) -> dict[str, Any]:
    return {"exchange": f"not measured: {why}"}


def is_exchange(name: str, stats: Mapping[str, Any], device: int) -> bool:
    """Whether an event of a stream sends to another GPU, or receives."""
    if "nccl" in name.lower() or name == "MemcpyP2P":
        return True
    if name.startswith("Memcpy"):
        destination = re.search(r"dest:(\d+)", str(stats.get("memcpy_details", "")))
        return name == "MemcpyD2D" and destination is not None and int(destination[1]) != device
    return str(stats.get("hlo_op", "")).startswith(COLLECTIVES)


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same time in intervals that do not overlap."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)


def alone(some: Sequence[Interval], others: Sequence[Interval]) -> float:
    """How long some of `some` run and none of `others`."""
    return length(union([*some, *others])) - length(union(others))
