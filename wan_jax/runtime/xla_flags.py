"""What we tell JAX and XLA beyond their defaults: every flag, in one place, with its reason.

`configure` sets environment variables for the whole process. It must run before JAX starts, and never touches a
variable that the user has set. XLA_FLAGS stays the user's: XLA aborts on a flag that it does not know, and knows others
in every version. What single programs need goes in as their compiler options instead.

Left alone after a look at them:

- xla_gpu_autotune_level. XLA tries convolution algorithms and lets each take all the memory that is free, so that the
  peak that a process reports is that of compiling the VAE, not of running it. What does not fit is not chosen, so it
  compiles under any limit. Level 0 avoids that, but then cuDNN runs convolutions without workspace.
  (xla_gpu_redzone_scratch_max_megabytes, the bound that older versions had, is gone.)
- On one GPU xla_gpu_enable_latency_hiding_scheduler, xla_gpu_enable_pipelined_host_offloading,
  xla_gpu_enable_host_memory_offloading. Copies of streamed layers overlap without them (nn/stacked_layers.py).
"""

import os
import pathlib
import subprocess
import sys

from wan_jax.errors import InputError

# The encoder rounds where the original rounds; XLA may not skip that.
TEXT_ENCODER_OPTIONS: dict[str, bool | int | str] = {"xla_allow_excess_precision": False}

# The denoising step on NVIDIA GPUs: cuBLASLt computes all products, with biases and GELU in their epilogues. Where XLA
# may also take Triton it leaves GELU to a kernel of its own, 1 % of a forward. Triton won none of these products.
CUBLASLT_OPTIONS: dict[str, bool | int | str] = {"xla_gpu_enable_triton_gemm": False}

# Functions with many convolutions that run a few times only: trying algorithms would take longer than it saves.
ONCE_OPTIONS: dict[str, bool | int | str] = {"xla_gpu_autotune_level": 0}

# On several GPUs: the scheduler that starts an exchange as early and waits for it as late as data allow.
MESH_OPTIONS: dict[str, bool | int | str] = {"xla_gpu_enable_latency_hiding_scheduler": True}


def mesh_options() -> dict[str, bool | int | str]:
    """Compiler options of steps on several NVIDIA GPUs; what the user sets in XLA_FLAGS stays the user's."""
    flags = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in MESH_OPTIONS.items() if f"--{name}" not in flags}


def step_options(on_a_mesh: bool) -> dict[str, bool | int | str]:
    """Compiler options of the denoising step on NVIDIA GPUs, on one of them or on a mesh."""
    return CUBLASLT_OPTIONS | (mesh_options() if on_a_mesh else {})


def configure() -> None:
    """Sets what is not set yet. Call it before JAX starts: it has no effect on what JAX has already started with."""
    for name, value in _environment().items():
        os.environ.setdefault(name, value)


def check() -> None:
    """Raises InputError for XLA_FLAGS that XLA would abort the process for; nothing, where JAX has started already."""
    if not os.environ.get("XLA_FLAGS") or "jax" in sys.modules:
        return
    program = "from jaxlib import xla_client; xla_client.CompileOptions()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, errors="replace")
    last = next((line for line in done.stderr.splitlines() if "parse_flags_from_env" in line), None)
    if done.returncode and last is not None:
        reason = last.partition("] ")[2]
        raise InputError(f"XLA_FLAGS {os.environ['XLA_FLAGS']!r}: {reason}; leave out what this version does not know")


def notes() -> list[str]:
    """What a user of a GPU should know: that the CPU runs, or that nobody called `configure`."""
    import jax  # not above: the environment is set before JAX is imported

    from wan_jax.runtime.devices import fallback

    missing = [name for name in _environment() if name not in os.environ]
    if not missing or jax.default_backend() != "gpu":
        return fallback()
    return [f"{' and '.join(missing)} not set: call wan_jax.configure() before JAX starts to use all of the memory"]


def _environment() -> dict[str, str]:
    host_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        # JAX takes this part of a GPU when it starts; its own 0.75 leaves 60 of 80 GB. CUDA and cuDNN need the rest.
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
        # GiB. Pinned memory ends at 64 otherwise, and experts, text encoder and VAE take 64.3 (profiles swap, stream).
        # Not all there is: JAX pins in growing pieces, more than was asked for.
        "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB": str(max(80, host_memory * 3 // 4 // 2**30)),
    }


def use_compile_cache() -> None:
    """Keeps every compiled program across processes, unless JAX_COMPILATION_CACHE_DIR says where (empty: nowhere).

    The folder also keeps the results of autotuning (XLA's per-fusion autotune cache), so that a program that changed a
    little compiles faster. An executable of our own on disk would save tracing alone, under half a second a program.
    """
    for name, value in {
        "JAX_COMPILATION_CACHE_DIR": str(compile_cache_folder() or ""),
        # JAX leaves out what compiles in less than a second. There are hundreds of small programs: seconds a start.
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }.items():
        os.environ.setdefault(name, value)


def compile_cache_folder() -> pathlib.Path | None:
    """Where compiled programs are kept; None for nowhere."""
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path.home() / ".cache" / "wan_jax" / "compile"))
    return pathlib.Path(folder) if folder else None
