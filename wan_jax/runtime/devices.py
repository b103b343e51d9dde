"""What a device can do, measured."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


def seconds_of(call: Callable[[], Any], repeats: int, calls: int = 1) -> list[float]:
    """Seconds that `call` takes, `repeats` times, each the mean of `calls` calls on end; one run to warm up."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            result = call()
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / calls)
    return times


def bytes_of_a_device(tree: Any) -> int:
    """What the first device has of some arrays."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def matmul_rate() -> float:
    """FLOP/s of a square bfloat16 product, ten on end."""
    size = 512 if jax.default_backend() == "cpu" else 8192
    x, y = (jax.random.normal(jax.random.key(seed), (size, size)).astype(jnp.bfloat16) for seed in range(2))
    product = jax.jit(jnp.dot).lower(x, y).compile()
    return 2 * size**3 / statistics.median(seconds_of(partial(product, x, y), repeats=5, calls=10))


def peak_bytes() -> int | None:
    """The most device memory used so far, over all devices of this process; None where the backend does not say."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    return max((peak for peak in peaks if peak is not None), default=None)
