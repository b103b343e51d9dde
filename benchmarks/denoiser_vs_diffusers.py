"""A forward, a decode and a text against compiled diffusers, and what could still change them, in one run on one GPU.

    python -m benchmarks.denoiser_vs_diffusers --output DIR [--seconds 460] [--parts PART,...]

T2V-A14B with random weights, 81 frames, batch 1. Parts run in the order given, and none starts after --seconds. The
peer runs in a process of its own. DIR/denoiser_vs_diffusers.json is written after every figure.

    peer         diffusers: VAE decode in bfloat16, denoiser (compile_repeated_blocks, cuDNN attention)
    forward      our denoiser with the attention that it takes by itself
    vae          our decode in bfloat16
    text         two prompts of 512 tokens
    cudnn        the forward with cuDNN's attention
    vae_knobs    two latent frames a step; two frames at once through the layers of full time resolution
    block        the parts of a layer, and other ways to write them
    cublas       the forward with XLA's Triton products off: biases move into cuBLASLt's epilogues
    convolution  the VAE's 3x3x3 convolution, one frame at a time, in four formulations
    vae_float32  our decode in float32 with TF32 convolutions
    psnr         bfloat16 decode against float32
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


def peer_parts(sizes: list[str], report: Callable[[str, dict[str, Any]], None]) -> None:
    """Measures diffusers in this process; the largest size first, the VAE before the denoiser."""
    import diffusers
    import torch
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    def timed(call: Callable[[], Any], runs: int = RUNS) -> dict[str, Any]:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        first, times = time.perf_counter() - start, []
        for _ in range(runs):
            start = time.perf_counter()
            call()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return {
            "seconds": statistics.median(times),
            "runs": times,
            "first_seconds": first,
            "peak_bytes": torch.cuda.max_memory_allocated(),
        }

    def latents(size: str) -> torch.Tensor:
        width, height = map(int, size.split("x"))
        return torch.randn(1, 16, (FRAMES - 1) // 4 + 1, height // 8, width // 8)

    torch.set_default_dtype(torch.bfloat16)
    torch.set_grad_enabled(False)
    torch._dynamo.config.automatic_dynamic_shapes = False  # kernels for each size, as XLA's are
    with torch.device("cuda"):
        report("versions", {"torch": torch.__version__, "diffusers": diffusers.__version__})
        vae: Any = AutoencoderKLWan()
        for size in sizes:
            report(f"vae {size}", timed(partial(vae.eval().decode, latents(size), return_dict=False), 2))
        del vae
        torch.cuda.empty_cache()
        model: Any = WanTransformer3DModel(
            num_attention_heads=40, ffn_dim=13824, num_layers=40, cross_attn_norm=True, rope_max_seq_len=1024
        )
        model.eval()
        model.set_attention_backend("_native_cudnn")
        model.compile_repeated_blocks(fullgraph=True)
        text, timestep = torch.randn(1, 512, 4096), torch.tensor([500.0])
        for size in sizes:
            x = latents(size)
            report(f"forward {size}", timed(partial(model, x, timestep, text, return_dict=False), 2))


class Run:
    """The report, and the time that is left."""

    def __init__(self, folder: pathlib.Path, seconds: float, sizes: list[str]):
        self.path = folder / "denoiser_vs_diffusers.json"
        self.until = time.monotonic() + seconds
        self.sizes = sizes
        self.report: dict[str, Any] = {"benchmark": "denoiser_vs_diffusers", "frames": FRAMES, "peer": {}, "rows": []}

    def left(self) -> float:
        return self.until - time.monotonic()

    def save(self) -> None:
        self.path.write_text(json.dumps(self.report, indent=1) + "\n")

    def peer(self) -> None:
        """Runs the peer with a limit of its own; what it has printed until then counts."""
        command = [sys.executable, "-m", "benchmarks.denoiser_vs_diffusers", "--peer", "--sizes", *self.sizes]
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
            print(f"the peer ended with {process.returncode}", flush=True)

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
        print(f"{group:<22} {row['name']:<44} {row['seconds']:9.5f} s {rate:>15} {memory:>10} {ratio}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path(os.environ.get("OUT", "benchmarks/results"))
    )
    parser.add_argument("--seconds", type=float, default=460, help="start nothing new after this long")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), help="the first is the more important")
    parser.add_argument("--parts", default=",".join(["peer", *PARTS]))
    parser.add_argument("--preset", default="t2v-a14b", help="demo: to try the script without a GPU")
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    values = parser.parse_args()
    if values.peer:
        peer_parts(values.sizes, lambda name, row: print(json.dumps({name: row}), flush=True))
        return
    run = Run(values.output, values.seconds, values.sizes)
    parts = values.parts.split(",")
    if "peer" in parts:
        run.peer()

    from wan_jax import bench

    run.report |= bench.device_facts()
    print(f"matmul {run.report['matmul_tflop_per_second']:.1f} TFLOP/s, {run.left():.0f} s left", flush=True)
    for part in parts:
        if part in PARTS:
            start = time.monotonic()
            try:
                PARTS[part](run, values.preset)
            except Exception as error:  # the other parts go on
                print(f"{part}: {type(error).__name__}: {' '.join(str(error).split())[:600]}", flush=True)
            print(f"({part}: {time.monotonic() - start:.0f} s, {run.left():.0f} s left)", flush=True)


def benches(run: Run, preset: str, group: str, sizes: list[str] | None = None, **choices: Any) -> Iterator[Any]:
    """A Bench for each size, whose rows go into the report; stops when time is up."""
    from wan_jax.bench import Bench, get_config
    from wan_jax.settings import Settings, parse_size

    config = get_config(preset)
    matmul = run.report["matmul_tflop_per_second"] * 1e12
    for size in sizes or run.sizes:
        if run.left() < 0:
            print(f"{group} {size}: out of time", flush=True)
            return
        settings = Settings.resolve(config, size=parse_size(size), frames=FRAMES)
        peer = f"{group.split()[0]} {size}" if group != "text" else group

        def on_row(row: Any, size: str = size, peer: str = peer) -> None:
            run.add(f"{group} {size}", row.as_json(matmul), peer)

        yield Bench(config, settings, on_row=on_row, **{"repeats": RUNS, **choices})


_models: dict[str, Any] = {}  # the denoiser, which several parts use


def denoiser(bench: Any) -> Any:
    from wan_jax.demo import random_model
    from wan_jax.models.denoiser import Denoiser

    if "denoiser" not in _models:
        start = time.monotonic()
        _models["denoiser"] = random_model(Denoiser, bench.config.denoiser, "bfloat16")
        print(f"(random weights: {time.monotonic() - start:.1f} s)", flush=True)
    return _models["denoiser"]


def time_forward(bench: Any, name: str, implementation: str | None, options: dict[str, Any] | None = None) -> None:
    import jax.numpy as jnp
    from flax import nnx

    from wan_jax.bench import denoiser_inputs
    from wan_jax.models.denoiser import Denoiser
    from wan_jax.plan import denoiser_flops

    model = denoiser(bench)
    _, parameters = nnx.split(model)
    make = partial(Denoiser, bench.config.denoiser, dtype=jnp.bfloat16, attention_implementation=implementation)
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    flops = denoiser_flops(bench.config.denoiser, bench.tokens)

    def run_forward(parameters: Any, *inputs: Any) -> Any:
        return nnx.merge(graphdef, parameters)(*inputs)

    bench.time(name, run_forward, parameters, *denoiser_inputs(bench, model), flops=flops, options=options)


def forward(run: Run, preset: str) -> None:
    for bench in benches(run, preset, "forward", repeats=2):
        time_forward(bench, "ours", None)


def cudnn(run: Run, preset: str) -> None:
    for bench in benches(run, preset, "forward", run.sizes[:1], repeats=2):
        time_forward(bench, "cuDNN attention", "cudnn")


def cublas(run: Run, preset: str) -> None:
    for bench in benches(run, preset, "forward", run.sizes[:1], repeats=2):
        time_forward(bench, "products by cuBLASLt", None, {"xla_gpu_enable_triton_gemm": False})


def vae(run: Run, preset: str) -> None:
    from wan_jax.bench import bench_vae

    for bench in benches(run, preset, "vae", vae_dtype="bfloat16"):
        bench_vae(bench)


def vae_float32(run: Run, preset: str) -> None:
    from wan_jax.bench import bench_vae

    for bench in benches(run, preset, "vae", repeats=2):
        bench_vae(bench)


def vae_knobs(run: Run, preset: str) -> None:
    from wan_jax.bench import bench_vae
    from wan_jax.models import vae as module

    module.FRAMES_AT_ONCE = 2
    for bench in benches(run, preset, "vae 2 frames at once,", run.sizes[:1], vae_dtype="bfloat16", repeats=2):
        bench_vae(bench)
    module.FRAMES_AT_ONCE = 1
    for bench in benches(run, preset, "vae", run.sizes[:1], vae_dtype="bfloat16", repeats=2):
        bench_vae(bench, chunk=2)


def psnr(run: Run, preset: str) -> None:
    """Of the first five frames in the smallest size, between float32 and bfloat16 with the same weights."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from wan_jax.bench import get_config, normal
    from wan_jax.demo import random_model
    from wan_jax.models.parameters import named_parameters, with_parameters
    from wan_jax.models.vae import VAE

    config = get_config(preset).vae

    def build_half() -> VAE:
        return VAE(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))

    for bench in benches(run, preset, "psnr", run.sizes[-1:]):
        exact = random_model(VAE, config, "float32")
        rounded = {name: array.astype(jnp.bfloat16) for name, array in named_parameters(exact).items()}
        half = with_parameters(build_half, rounded)
        latents = normal((1, *bench.latents_shape))[:, :, :2]
        decode = jax.jit(lambda model, latents: model.decode(latents))
        with jax.default_matmul_precision("tensorfloat32"):
            expected, actual = (np.asarray(decode(model, latents)) for model in (exact, half))
        with jax.default_matmul_precision("float32"):
            truth = np.asarray(jax.jit(lambda model, latents: model.decode(latents))(exact, latents))
        for name, frames, reference in (
            ("bfloat16 against TF32", actual, expected),
            ("bfloat16 against float32", actual, truth),
            ("TF32 against float32", expected, truth),
        ):
            error = np.mean((np.clip(frames, -1, 1) - np.clip(reference, -1, 1)) ** 2)
            decibel = float(10 * np.log10(4 / max(error, 1e-20)))
            run.report.setdefault("psnr", {})[name] = decibel
            print(f"PSNR {name}: {decibel:.2f} dB (signal {reference.std():.3f})", flush=True)
        run.save()


def text(run: Run, preset: str) -> None:
    from wan_jax.bench import bench_text

    for bench in benches(run, preset, "text", run.sizes[:1]):
        bench_text(bench)


def block(run: Run, preset: str) -> None:
    """The parts of a layer at the first size, then other ways to write some of them."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    from wan_jax.bench import denoiser_parts, normal
    from wan_jax.models.denoiser import gelu, rotary_tables, rotate
    from wan_jax.models.layers import RMSNorm

    def rotate_stacked(x: jax.Array, rotary: tuple[jax.Array, jax.Array]) -> jax.Array:
        cos, sin = rotary
        pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
        real, imaginary = pairs[..., 0], pairs[..., 1]
        turned = jnp.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], axis=-1)
        return turned.reshape(x.shape).astype(x.dtype)

    def norm_in_two_passes(norm: RMSNorm, x: jax.Array) -> jax.Array:
        # The barrier keeps the statistics apart, so that the rest is one pass with the rotation.
        x32 = x.astype(jnp.float32)
        scale = lax.optimization_barrier(lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + norm.eps))
        return (x32 * scale).astype(x.dtype) * norm.scale[...]

    def run_query(norm: Callable, turn: Callable, attention: Any, y: jax.Array, rotary: Any) -> jax.Array:
        # With a bias before it, as after the product.
        return turn(attention.split_heads(norm(attention.query_norm, y + attention.query.bias[...])), rotary)

    for bench in benches(run, preset, "block", run.sizes[:1], repeats=5):
        denoiser_parts(bench, denoiser(bench))
        config, length = bench.config.denoiser, bench.tokens
        layer = jax.tree.map(lambda leaf: leaf[0], denoiser(bench).blocks)
        attention, mlp = layer.self_attention, layer.feed_forward
        y = normal((1, length, config.dim), jnp.bfloat16)
        rotary = rotary_tables(bench.grid, config.head_dim)
        triton_off = {"xla_gpu_enable_triton_gemm": False} if jax.default_backend() == "gpu" else None

        for name, norm, turn in (
            ("query norm, rotary", lambda norm, x: norm(x), rotate),
            ("query norm, rotary stacked", lambda norm, x: norm(x), rotate_stacked),
            ("query norm in two passes, rotary", norm_in_two_passes, rotate),
        ):
            bench.time(name, partial(run_query, norm, turn), attention, y, rotary)
        square, wide = 2.0 * length * config.dim**2, 2.0 * length * config.dim * config.ffn_dim
        for suffix, options in (("", None), (", cuBLASLt", triton_off)):
            bench.time(f"value{suffix}", lambda a, y: a.value(y), attention, y, flops=square, options=options)
            bench.time(f"up, GELU{suffix}", lambda m, y: gelu(m.up(y)), mlp, y, flops=wide, options=options)
        bench.time(
            "up, GELU in the epilogue, cuBLASLt",
            lambda m, y: jax.nn.gelu(m.up(y), approximate=True),
            mlp,
            y,
            flops=wide,
            options=triton_off,
        )
        kernels = jnp.concatenate([getattr(attention, n).kernel[...] for n in ("query", "key", "value")], axis=1)
        bench.time("query, key, value at once", lambda w, y: y @ w, kernels, y, flops=3 * square)


def convolution(run: Run, preset: str) -> None:
    """A frame through a causal 3x3x3 convolution, without its norm: what the formulations cost on a GPU.

    "taps": what vae.py does, three 2-D convolutions and sums of their results. "outputs together": one 2-D convolution
    with three times the outputs. "inputs together": one 2-D convolution over three frames side by side in channels.
    "3-D": one convolution over three frames, for which XLA must be told to keep channels last.
    """
    import jax
    import jax.numpy as jnp
    from jax import lax

    from wan_jax.bench import normal
    from wan_jax.models.streaming import overlap_add
    from wan_jax.models.vae import spatial_conv, time_taps

    def taps(x, past, kernel):
        totals, future = overlap_add(time_taps(x, kernel), past)
        return totals[0].astype(x.dtype), tuple(frame.astype(x.dtype) for frame in future)

    def outputs_together(x, past, kernel):
        channels = kernel.shape[-1]
        y = spatial_conv(x, jnp.concatenate(list(kernel), axis=-1), padding=(1, 1))
        totals, future = overlap_add([y[..., n * channels : (n + 1) * channels] for n in range(3)], past)
        return totals[0].astype(x.dtype), tuple(frame.astype(x.dtype) for frame in future)

    def inputs_together(x, past, kernel):
        y = spatial_conv(jnp.concatenate([*past, x], axis=-1), jnp.concatenate(list(kernel), axis=-2), padding=(1, 1))
        return y, (past[1], x)

    def three_dimensional(x, past, kernel):
        y = lax.conv_general_dilated(
            jnp.concatenate([*past, x], axis=1),
            kernel,
            (1, 1, 1),
            ((0, 0), (1, 1), (1, 1)),
            dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        )
        return y, (past[1], x)

    for bench in benches(run, preset, "convolution", run.sizes[:1], repeats=5):
        width, height = bench.settings.size
        base = bench.config.vae.base_dim
        for scale, channels in ((1, base), (2, 2 * base), (4, 4 * base)):
            h, w = height // scale, width // scale
            x, *past = (normal((1, 1, h, w, channels), jnp.bfloat16, seed) for seed in range(3))
            kernel = normal((3, 3, 3, channels, channels), jnp.bfloat16) * (27 * channels) ** -0.5
            flops = 2.0 * 27 * h * w * channels**2
            for name, function in (
                ("taps", taps),
                ("outputs together", outputs_together),
                ("inputs together", inputs_together),
                ("3-D", three_dimensional),
            ):
                if run.left() < 0:
                    return
                on_gpu = jax.default_backend() == "gpu"
                options = {"xla_gpu_force_conv_nhwc": True} if name == "3-D" and on_gpu else None
                bench.time(
                    f"{channels} at {w}x{h}: {name}", function, x, tuple(past), kernel, flops=flops, options=options
                )


def trace(run: Run, preset: str) -> None:
    """The profiler's view of one forward at the first size: kernels, calls and seconds."""
    import jax

    from wan_jax.bench import denoiser_inputs

    for bench in benches(run, preset, "trace", run.sizes[:1]):
        model = denoiser(bench)
        inputs = denoiser_inputs(bench, model)
        compiled = jax.jit(lambda model, *inputs: model(*inputs)).lower(model, *inputs).compile()
        jax.block_until_ready(compiled(model, *inputs))
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                jax.block_until_ready(compiled(model, *inputs))
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


PARTS: dict[str, Callable[[Run, str], Any]] = {
    "forward": forward,
    "vae": vae,
    "text": text,
    "cudnn": cudnn,
    "vae_knobs": vae_knobs,
    "block": block,
    "cublas": cublas,
    "convolution": convolution,
    "vae_float32": vae_float32,
    "psnr": psnr,
    "trace": trace,
}


if __name__ == "__main__":
    main()
