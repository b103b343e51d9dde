"""A forward, a decode and a text against compiled diffusers, in one run on one GPU, and what the time goes to.

    python -m benchmarks.denoiser --output DIR [--seconds 460] [--parts PART,...] [--sizes 1280x720 832x480]

T2V-A14B with random weights (speed does not depend on their values), 81 frames, batch 1. Every time is the median of
the runs after a warm-up. Parts run in the order given, and none starts after --seconds. The peer's parts run in
processes of their own. DIR/denoiser.json is written after every figure. Without --parts those run that make the quoted
figures:

    peer_vae     diffusers' VAE decode in bfloat16
    peer_forward diffusers' denoiser (compile_repeated_blocks, cuDNN attention)
    forward      our denoiser, compiled as in a denoising step
    vae          our decode in bfloat16
    text         two prompts of 512 tokens
    psnr         bfloat16 decode against float32

and by name:

    plain        the forward as XLA compiles it by itself: GELU in a kernel of its own
    cudnn        the forward with cuDNN's attention
    vae_float32  our decode in float32 with TF32 convolutions
    block        the parts of a layer
    trace        the kernels of one forward, by time
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

SIZES = ("1280x720", "832x480")
FRAMES = 81
RUNS = 3

Report = Callable[[str, dict[str, Any]], None]


def peer_vae(sizes: list[str], report: Report) -> None:
    import torch
    from diffusers import AutoencoderKLWan

    with torch.device("cuda"):
        vae: Any = AutoencoderKLWan()
    vae.eval()
    for size in sizes:
        report(f"vae {size}", timed_by_torch(partial(vae.decode, peer_latents(size), return_dict=False)))


def peer_forward(sizes: list[str], report: Report) -> None:
    import torch
    from diffusers import WanTransformer3DModel

    torch._dynamo.config.automatic_dynamic_shapes = False  # kernels for each size, as XLA's are
    # Dynamo cannot trace calls inside this context, only what they construct.
    with torch.device("cuda"):
        model: Any = WanTransformer3DModel(
            num_attention_heads=40, ffn_dim=13824, num_layers=40, cross_attn_norm=True, rope_max_seq_len=1024
        )
        text, timestep = torch.randn(1, 512, 4096), torch.tensor([500.0])
    model.eval()
    model.set_attention_backend("_native_cudnn")
    model.compile_repeated_blocks(fullgraph=True)
    for size in sizes:
        forward = partial(model, peer_latents(size), timestep, text, return_dict=False)
        report(f"forward {size}", timed_by_torch(forward))


def peer_latents(size: str) -> Any:
    import torch

    width, height = map(int, size.split("x"))
    return torch.randn(1, 16, (FRAMES - 1) // 4 + 1, height // 8, width // 8, device="cuda")


def timed_by_torch(call: Callable[[], Any]) -> dict[str, Any]:
    import torch

    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(1 + RUNS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(times[1:]),
        "runs": times[1:],
        "first_seconds": times[0],
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }


PEER_PARTS: dict[str, Callable[[list[str], Report], None]] = {"peer_vae": peer_vae, "peer_forward": peer_forward}


def run_peer(part: str, sizes: list[str]) -> None:
    """The process of a peer's part: one JSON line for each figure."""
    import diffusers
    import torch

    torch.set_default_dtype(torch.bfloat16)
    torch.set_grad_enabled(False)

    def report(name: str, found: dict[str, Any]) -> None:
        print(json.dumps({name: found}), flush=True)

    report("versions", {"torch": torch.__version__, "diffusers": diffusers.__version__})
    PEER_PARTS[part](sizes, report)


class Run:
    """The report, and the time that is left."""

    def __init__(self, folder: pathlib.Path, seconds: float, sizes: list[str]):
        self.path = folder / "denoiser.json"
        self.until = time.monotonic() + seconds
        self.sizes = sizes
        self.report: dict[str, Any] = {
            "benchmark": "denoiser",
            "frames": FRAMES,
            "weights": "random",
            "peer": {},
            "rows": [],
        }

    def left(self) -> float:
        return self.until - time.monotonic()

    def save(self) -> None:
        self.path.write_text(json.dumps(self.report, indent=1) + "\n")

    def peer(self, part: str) -> None:
        """Runs a part of the peer with a limit of its own; what it has printed until then counts."""
        command = [sys.executable, "-m", "benchmarks.denoiser", "--peer", part, "--sizes", *self.sizes]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        watch = threading.Timer(min(240.0, self.left()), process.kill)
        watch.start()
        assert process.stdout
        for line in process.stdout:
            if line.startswith("{"):
                self.report["peer"] |= json.loads(line)
                self.save()
                print("diffusers", line.strip()[:160], flush=True)
        process.wait()
        watch.cancel()
        if process.returncode:
            raise RuntimeError(f"the process ended with {process.returncode}")

    def add(self, group: str, row: dict[str, Any], peer: str | None = None) -> None:
        row = {"group": group, **row}
        versus = self.report["peer"].get(peer, {}).get("seconds")
        if versus:
            row |= {"peer_seconds": versus, "over_peer": row["seconds"] / versus}
        self.report["rows"].append(row)
        self.save()
        rate = f"{row['tflop_per_second']:7.1f} TFLOP/s" if "tflop_per_second" in row else ""
        memory = f"{row['memory_bytes'] / 2**30:6.2f} GiB" if row.get("memory_bytes") else ""
        ratio = f"x{row['over_peer']:.3f} of diffusers" if versus else ""
        print(f"{group:<22} {row['name']:<32} {row['seconds']:9.5f} s {rate:>15} {memory:>10} {ratio}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path(os.environ.get("OUT", "benchmarks/results"))
    )
    parser.add_argument("--seconds", type=float, default=460, help="start nothing new after this long")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), help="the first is the more important")
    parser.add_argument("--parts", default=",".join(QUOTED), help=", ".join([*PEER_PARTS, *PARTS]))
    parser.add_argument("--preset", default="t2v-a14b", help="demo: to try the script without a GPU")
    parser.add_argument("--peer", choices=PEER_PARTS, help=argparse.SUPPRESS)
    values = parser.parse_args()
    if values.peer:
        run_peer(values.peer, values.sizes)
        return
    parts = values.parts.split(",")
    if unknown := set(parts) - {*PEER_PARTS, *PARTS}:
        parser.error(f"unknown parts {', '.join(sorted(unknown))}")
    run = Run(values.output, values.seconds, values.sizes)
    for part in parts:
        start = time.monotonic()
        try:
            if part in PEER_PARTS:
                run.peer(part)
            else:
                add_device_facts(run)
                PARTS[part](run, values.preset)
        except Exception as error:  # the other parts go on
            print(f"{part}: {type(error).__name__}: {' '.join(str(error).split())[:600]}", flush=True)
        print(f"({part}: {time.monotonic() - start:.0f} s, {run.left():.0f} s left)", flush=True)


def add_device_facts(run: Run) -> None:
    """Before the first part of ours: JAX takes the GPU's memory when it starts, and the peer needs it."""
    from wan_bench.parts import device_facts

    if "device" not in run.report:
        run.report |= device_facts()
        print(f"matmul {run.report['matmul_tflop_per_second']:.1f} TFLOP/s", flush=True)


def benches(run: Run, preset: str, group: str, sizes: list[str] | None = None, **choices: Any) -> Iterator[Any]:
    """A Bench for each size, whose rows go into the report; stops when time is up."""
    from wan_bench.parts import Bench, get_config
    from wan_jax.diffusion.params import SamplingParams

    config = get_config(preset)
    matmul = run.report["matmul_tflop_per_second"] * 1e12
    for size in sizes or run.sizes:
        if run.left() < 0:
            print(f"{group} {size}: out of time", flush=True)
            return
        settings = SamplingParams(size=size, frames=FRAMES).resolve(config)

        def on_row(row: Any, size: str = size) -> None:
            run.add(f"{group} {size}", row.as_json(matmul), f"{group} {size}")

        yield Bench(config, settings, on_row=on_row, **{"repeats": RUNS, **choices})


_models: list[Any] = []


def denoiser(bench: Any, implementation: str | None = None) -> Any:
    """With random weights, the same for all parts."""
    from wan_jax.kernels.attention import AttentionOptions
    from wan_jax.models.denoiser import Denoiser
    from wan_jax.testing.models import random_model

    if not _models:
        _models.append(random_model(Denoiser, bench.config.denoiser, "bfloat16"))
    return _models[0].with_attention(AttentionOptions(implementation))


def time_forward(
    run: Run, preset: str, name: str, *, implementation: str | None = None, as_in_a_step: bool = True
) -> None:
    from wan_bench import parts

    for bench in benches(run, preset, "forward"):
        model = denoiser(bench, implementation)
        parts.time_forward(bench, name, model, parts.denoiser_inputs(bench, model), as_in_a_step)


def time_vae(run: Run, preset: str, dtype: str) -> None:
    from wan_bench.parts import bench_decode

    for bench in benches(run, preset, "vae", vae_dtype=dtype):
        bench_decode(bench)


def text(run: Run, preset: str) -> None:
    from wan_bench.parts import bench_text

    for bench in benches(run, preset, "text", run.sizes[:1]):
        bench_text(bench)


def psnr(run: Run, preset: str) -> None:
    """Of the first five frames in the smallest size, with the same weights: bfloat16, and TF32, against float32."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from wan_bench.parts import get_config, normal
    from wan_jax.models.vae import VAE
    from wan_jax.parameters import named_parameters, with_parameters
    from wan_jax.testing.models import random_model

    config = get_config(preset).vae
    for bench in benches(run, preset, "psnr", run.sizes[-1:]):
        exact = random_model(VAE, config, "float32")
        rounded = {name: array.astype(jnp.bfloat16) for name, array in named_parameters(exact).items()}
        half = with_parameters(lambda: VAE(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), rounded)
        latents = normal((1, *bench.latents_shape))[:, :, :2]

        def decode(model: VAE, precision: str, latents: jax.Array = latents) -> np.ndarray:
            with jax.default_matmul_precision(precision):
                return np.clip(np.asarray(jax.jit(lambda model, z: model.decode(z))(model, latents)), -1, 1)

        truth = decode(exact, "float32")
        for name, frames in (("bfloat16", decode(half, "tensorfloat32")), ("TF32", decode(exact, "tensorfloat32"))):
            decibel = float(10 * np.log10(4 / max(np.mean((frames - truth) ** 2), 1e-20)))
            run.report.setdefault("psnr", {})[f"{name} against float32"] = decibel
            print(f"PSNR {name} against float32: {decibel:.2f} dB (signal {truth.std():.3f})", flush=True)
        run.save()


def block(run: Run, preset: str) -> None:
    from wan_bench.parts import denoiser_parts

    for bench in benches(run, preset, "block", run.sizes[:1], repeats=5):
        denoiser_parts(bench, denoiser(bench))


def trace(run: Run, preset: str) -> None:
    """The profiler's view of one forward at the first size: kernels, calls and seconds."""
    import jax

    from wan_bench import parts

    for bench in benches(run, preset, "trace", run.sizes[:1], repeats=1):
        model = denoiser(bench)
        inputs = parts.denoiser_inputs(bench, model)
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                parts.time_forward(bench, "twice, traced", model, inputs)
            files = list(pathlib.Path(folder).rglob("*.xplane.pb"))
            data = jax.profiler.ProfileData.from_file(str(files[0]))
        kernels: dict[str, list[float]] = {}
        for plane in data.planes:
            if plane.name.startswith("/device:GPU"):
                for line in plane.lines:
                    if line.name.startswith("Stream"):
                        for event in line.events:
                            kernels.setdefault(event.name, []).append(event.duration_ns / 1e9)
        ranked = sorted(kernels.items(), key=lambda item: -sum(item[1]))[:40]
        run.report["trace"] = [{"kernel": name, "calls": len(times), "seconds": sum(times)} for name, times in ranked]
        run.save()
        for name, times in ranked[:30]:
            print(f"{sum(times):9.5f} s {len(times):6d} calls  {name[:110]}", flush=True)


PARTS: dict[str, Callable[[Run, str], None]] = {
    "forward": partial(time_forward, name="ours"),
    "vae": partial(time_vae, dtype="bfloat16"),
    "text": text,
    "psnr": psnr,
    "plain": partial(time_forward, name="plain", as_in_a_step=False),
    "cudnn": partial(time_forward, name="cuDNN attention", implementation="cudnn"),
    "vae_float32": partial(time_vae, dtype="float32"),
    "block": block,
    "trace": trace,
}
QUOTED = ("peer_vae", "peer_forward", "forward", "vae", "text", "psnr")


if __name__ == "__main__":
    main()
