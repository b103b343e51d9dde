"""The memory profiles on one GPU: seconds a step, peak memory, and what `wan-jax plan` predicts.

    python benchmarks/profiles.py --output result.json

Full-size T2V-A14B with made-up weights. Every part is a process of its own, with the memory that JAX may use limited:
first the programs are compiled into a cache (trying algorithms takes all the memory there is, which would hide the
peak), from shapes alone; then the runs find them there. What is done is in the output after every part.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

GIB = 2**30
PROMPT = "Two cats in boxing gear and bright gloves fight on a spotlighted stage."
# name -> (size, dtype of the VAE, profiles, limit in GiB, steps). With shift 5 the first two of three steps use the
# high-noise expert, so that the second is a step and nothing else.
PARTS: dict[str, tuple[str, str, tuple[str, ...], float | None, int]] = {
    "compile_480p": ("832x480", "float32", ("resident", "stream"), 23, 0),
    "resident_480p": ("832x480", "float32", ("resident",), None, 3),
    "swap_480p": ("832x480", "float32", ("swap",), 46, 3),
    "stream_480p": ("832x480", "float32", ("stream",), 23, 3),
    "compile_720p": ("1280x720", "bfloat16", ("resident",), 76, 0),
    "resident_720p": ("1280x720", "bfloat16", ("resident",), 76, 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, required=True, help="JSON file")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), metavar="PART")
    parser.add_argument("--seconds", type=float, default=200, help="for each part (default 200)")
    parser.add_argument("--demo", action="store_true", help="the demo's model, to try the script without a GPU")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    values = parser.parse_args()
    if values.part:
        print(json.dumps(run_part(values.part, values.demo)), flush=True)
        return

    total = gpu_bytes()
    report: dict[str, Any] = {"benchmark": "profiles", "gpu_bytes": total, "parts": {}}
    with tempfile.TemporaryDirectory() as cache:
        for part in values.parts:
            start = time.perf_counter()
            result = run_child(part, values, cache, total)
            report["parts"][part] = {**result, "process_seconds": time.perf_counter() - start}
            report["ratios"] = ratios(report["parts"])
            values.output.write_text(json.dumps(report, indent=1) + "\n")
            print(part, json.dumps(report["parts"][part]), flush=True)
    print("step time over resident:", json.dumps(report["ratios"]))


def gpu_bytes() -> int | None:
    """Memory of the first GPU; None without one."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]) * 2**20
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def run_child(part: str, values: argparse.Namespace, cache: str, total: int | None) -> dict[str, Any]:
    limit = PARTS[part][3]
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB": "80",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{limit * GIB / total:.4f}" if limit and total else "0.95",
    }
    command = [sys.executable, __file__, "--part", part, "--output", str(values.output)]
    try:
        done = subprocess.run(
            command + ["--demo"] * values.demo,
            env=environment,
            capture_output=True,
            text=True,
            timeout=values.seconds,
        )
        return json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired as error:
        return {"error": f"longer than {values.seconds:g} s", "stderr": str(error.stderr)[-1500:]}
    except (json.JSONDecodeError, IndexError):
        return {"error": f"exit code {done.returncode}", "stderr": done.stderr[-3000:]}


def ratios(parts: dict[str, Any]) -> dict[str, float]:
    def step(part: str) -> float | None:
        steps = parts.get(part, {}).get("step_seconds", [])
        return steps[1] if len(steps) > 1 else None

    resident = step("resident_480p")
    return {
        name: step(name) / resident  # type: ignore[operator]
        for name in ("swap_480p", "stream_480p")
        if resident is not None and step(name) is not None
    }


def run_part(part: str, demo: bool) -> dict[str, Any]:
    """One process's work."""
    started = time.perf_counter()
    import jax

    from wan_jax.diffusion.params import SamplingParams
    from wan_jax.planning.memory import Plan, memory_limit
    from wan_jax.presets import get_preset
    from wan_jax.runtime.offload import PROFILES
    from wan_jax.testing.models import DEMO

    size, vae_dtype, names, _, steps = PARTS[part]
    config = DEMO if demo else get_preset("t2v-a14b")
    settings = SamplingParams(
        PROMPT, size=(48, 32) if demo else size, frames=5 if demo else 81, steps=max(steps, 1), shift=5.0
    ).resolve(config)
    device = jax.devices()[0]
    result: dict[str, Any] = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "size": settings.size,
        "frames": settings.frames,
        "vae_dtype": vae_dtype,
        "memory_limit": memory_limit(device),
        "start_seconds": time.perf_counter() - started,
        "plan": {},
    }
    start = time.perf_counter()
    plan = Plan(config, settings, "bfloat16", vae_dtype)
    for name in names:
        profile = PROFILES[name]
        result["plan"][name] = plan.predict(profile).as_json() | {
            "workspace": dict(plan.workspace(profile)),
            "formula": plan.estimated_workspace(profile),
        }
    result["compile_seconds"] = time.perf_counter() - start
    if steps:
        result |= run_pipeline(config, settings, PROFILES[names[0]], vae_dtype, started)
    return result


def run_pipeline(config, settings, profile, vae_dtype: str, started: float) -> dict[str, Any]:
    import jax
    import numpy as np

    from wan_jax.parallel.placement import Placement
    from wan_jax.runtime.devices import peak_bytes
    from wan_jax.runtime.events import StageDone, StepDone

    start = time.perf_counter()
    pipeline = made_up_pipeline(config, Placement(offload=profile), vae_dtype)
    result: dict[str, Any] = {"profile": profile.name, "weights_seconds": time.perf_counter() - start}
    peaks = {"weights": peak_bytes()}

    denoiser = next(iter(pipeline.denoisers.values()))
    start = time.perf_counter()
    with pipeline.memory.on_device(denoiser) as running:
        jax.block_until_ready(jax.tree.leaves(running))
        seconds = time.perf_counter() - start
        copied = {id(array) for array in jax.tree.leaves(denoiser)}
        moved = sum(array.nbytes for array in jax.tree.leaves(running) if id(array) not in copied)
    result["copy"] = {"bytes": moved, "seconds": seconds}

    step_seconds: list[float] = []

    def listen(event: Any) -> None:
        if isinstance(event, StepDone):
            step_seconds.append(event.seconds)
            result.setdefault("first_step_after_start", time.perf_counter() - started)
            peaks["denoise"] = peak_bytes()
        elif isinstance(event, StageDone) and event.stage == "text":
            peaks["text"] = peak_bytes()

    start = time.perf_counter()
    made = next(pipeline.results([settings], on_event=listen))
    result["denoise_wall_seconds"] = time.perf_counter() - start
    start = time.perf_counter()
    frames = np.concatenate(list(made.frames()))
    result["decode_wall_seconds"] = time.perf_counter() - start
    peaks["decode"] = peak_bytes()
    return result | {
        "step_seconds": step_seconds,
        "seconds": dict(made.seconds),
        "peak_bytes": peaks,
        "frames_shape": frames.shape,
        "latents_std": float(np.std(made.latents)),
    }


def made_up_pipeline(config, placement, vae_dtype: str):
    """Weights at once: each parameter's layers are one random layer."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from wan_jax.models.denoiser import Denoiser
    from wan_jax.models.text_encoder import TextEncoder
    from wan_jax.models.vae import VAE
    from wan_jax.parameters import abstract_parameters, with_parameters
    from wan_jax.pipeline import WanPipeline
    from wan_jax.testing.tokenizer import train_small_tokenizer
    from wan_jax.text.tokenizer import Tokenizer

    noise = np.random.default_rng(0).standard_normal(1 << 24, np.float32)

    def parameter(name: str, info) -> jax.Array:
        shape = info.shape[1:] if info.stacked else info.shape
        count = int(np.prod(shape))
        values = np.resize(noise[: min(count, noise.size)], count).reshape(shape)
        fan_in = int(np.prod(shape[:-1])) or 1
        kind = name.rpartition(".")[2]
        layer = {"scale": 1 + 0.1 * values, "bias": 0.1 * values}.get(kind, values * np.float32(fan_in**-0.5))
        array = jnp.asarray(layer.astype(info.dtype))
        if info.stacked:
            array = jnp.broadcast_to(array, info.shape)
        return jax.block_until_ready(jax.device_put(array, placement.parameter_sharding(())))

    def model(make, model_config, dtype: str):
        def build():
            return make(model_config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))

        tree = abstract_parameters(build)
        return with_parameters(build, {name: parameter(name, info) for name, info in tree.items()})

    with tempfile.TemporaryDirectory() as folder:
        train_small_tokenizer([PROMPT], 512, folder)
        tokenizer = Tokenizer.from_pretrained(folder)
    return WanPipeline(
        config,
        tokenizer=tokenizer,
        text_encoder=model(TextEncoder, config.text_encoder, "bfloat16"),
        denoisers={name: model(Denoiser, config.denoiser, "bfloat16") for name in config.experts},
        vae=model(VAE, config.vae, vae_dtype),
        placement=placement,
    )


if __name__ == "__main__":
    main()
