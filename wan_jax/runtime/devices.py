"""Which devices there are, what they have room for, and what they can do, measured."""

import contextlib
import os
import shutil
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from wan_jax.errors import InputError


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


def find_devices() -> list[jax.Device]:
    """JAX's devices; starts them if nothing has.

    Raises:
        InputError: there are none of the kind that is asked for.
    """
    try:
        return jax.devices()
    except Exception as error:  # JAX raises AssertionError, too
        asked = asked_platforms()
        reason = " ".join(str(error).split()) or "it is not installed"
        raise InputError(
            f"no device of JAX_PLATFORMS={asked}: {reason}; unset it to take what there is, or install what is asked "
            f'for: pip install "wan_jax[cuda12]" or "wan_jax[tpu]"'
            if asked
            else f"no device: {reason}; JAX_PLATFORMS=cpu runs on the CPU"
        ) from error


def asked_platforms() -> str:
    """The platforms that JAX was asked for; empty where it chooses."""
    return jax.config.jax_platforms or ""  # type: ignore[attr-defined]


def describe() -> str:
    """Which devices run, in a few words."""
    found = find_devices()
    memory = (
        (found[0].memory_stats() or {}).get("bytes_limit") if found[0].process_index == jax.process_index() else None
    )
    room = f" with {memory / 2**30:.1f} GiB for JAX" if memory else ""
    processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"runs on {found[0].device_kind}{room}, the first of {len(found)}{processes}"


def accelerators() -> list[str]:
    """Signs of an accelerator, whether or not JAX uses it: its device files, and JAX's plugins for it."""
    files = [name for name in ("/dev/nvidia0", "/dev/accel0", "/dev/vfio/0", "/dev/kfd") if os.path.exists(name)]
    return files + [f"plugin {each.name}" for each in entry_points(group="jax_plugins")]


def fallback() -> list[str]:
    """A warning where the CPU runs although there are signs of an accelerator, and nobody asked for the CPU."""
    if find_devices()[0].platform != "cpu" or asked_platforms() or not (signs := accelerators()):
        return []
    return [
        f"runs on the CPU although there is {' and '.join(signs)}: see wan-jax doctor; JAX_PLATFORMS=cuda says why JAX "
        "does not use it, JAX_PLATFORMS=cpu that the CPU is meant"
    ]


def host_memory() -> int | None:
    """Bytes of the host, or of the container where that has less; None where neither says."""
    limits = []
    with contextlib.suppress(ValueError, OSError, AttributeError):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(ValueError, OSError):  # "max"
            limits.append(int(Path(name).read_text()))
    return min(limits, default=None)


def free_disk(folder: str | Path) -> int:
    """Free bytes where a folder is, or would be made."""
    path = Path(folder).expanduser().absolute()
    return shutil.disk_usage(next(each for each in (path, *path.parents) if each.is_dir())).free


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host for what it pins, had no room."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error))


def out_of_memory(error: BaseException) -> str:
    """Which memory is out, in a few words."""
    (text, *_) = str(error).strip().splitlines() or [""]
    host = isinstance(error, MemoryError) or "host" in text.lower()
    return f"out of {'host' if host else 'device'} memory ({text.removeprefix('RESOURCE_EXHAUSTED: ')})"


def explain(error: BaseException) -> str | None:
    """What is wrong with the devices where that is why something failed, in one line with what to do."""
    if is_out_of_memory(error):
        return f"{out_of_memory(error)}; wan-jax plan says which profile, size and mesh fit"
    try:
        find_devices()
    except InputError as none:
        return str(none)
    return None


def download_folder() -> Path:
    """Where huggingface_hub keeps what it downloads."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)
