"""Meshes of GPUs beside diffusers' own context parallelism, in one run on one machine.

    python -m benchmarks.mesh --output result.json [--mesh ulysses4 --mesh ring4 ...]

First `wan-jax bench mesh` (a process of its own), then the peer: diffusers' denoiser over all GPUs (torchrun, Ulysses,
cuDNN attention, repeated blocks compiled). Random weights, bfloat16. The output grows after every row.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Any

# So that NCCL does not use NVLink's multicast, which shared hosts may not offer.
ENVIRONMENT = {"NCCL_NVLS_ENABLE": "0"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, required=True, help="JSON file; the meshes' own beside it")
    parser.add_argument("--mesh", action="append", default=[], help="(default: one of each kind)")
    parser.add_argument("--preset", default="t2v-a14b")
    parser.add_argument("--size", default="1280x720")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--gpus", type=int, help="of the peer (default: all)")
    parser.add_argument("--seconds", type=float, default=330, help="for the meshes (default 330)")
    parser.add_argument("--peer-seconds", type=float, default=180, help="for the peer (default 180)")
    parser.add_argument("--skip-peer", action="store_true")
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    values = parser.parse_args()
    if values.peer:
        peer(values)
        return

    ours = values.output.with_suffix(".ours.json")
    report: dict[str, Any] = {"benchmark": "mesh beside diffusers", "parts": {}}

    def part(name: str, command: list[str], seconds: float, result: pathlib.Path) -> None:
        start = time.perf_counter()
        try:
            done = subprocess.run(
                command, env=os.environ | ENVIRONMENT, timeout=seconds, stderr=subprocess.PIPE, text=True
            )
            failure = {} if done.returncode == 0 else {"error": done.returncode, "stderr": done.stderr[-3000:]}
        except subprocess.TimeoutExpired:
            failure = {"error": f"longer than {seconds:g} s"}
        figures = json.loads(result.read_text()) if result.exists() else {}
        report["parts"][name] = {**figures, **failure, "process_seconds": time.perf_counter() - start}
        report["ratios"] = ratios(report["parts"])
        values.output.write_text(json.dumps(report, indent=1) + "\n")
        print(name, json.dumps(failure), f"{time.perf_counter() - start:.0f} s", flush=True)

    size = ["--size", values.size, "--frames", str(values.frames), "--preset", values.preset]
    meshes = [f"--mesh={mesh}" for mesh in values.mesh]
    command = [sys.executable, "-m", "wan_jax.cli", "bench", "mesh", *meshes, *size]
    part("wan_jax", [*command, "--repeats", str(values.repeats), "--output", str(ours)], values.seconds, ours)
    if not values.skip_peer:
        theirs = values.output.with_suffix(".peer.json")
        count = values.gpus or gpus()
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        part(
            "diffusers",
            [*launch, "-m", "benchmarks.mesh", "--peer", *size, "--output", str(theirs)],
            values.peer_seconds,
            theirs,
        )
    print(json.dumps(report["ratios"]))


def gpus() -> int:
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True)
    return len(listed.stdout.splitlines())


def ratios(parts: dict[str, Any]) -> dict[str, float]:
    """Seconds of our forwards over the peer's."""
    theirs = parts.get("diffusers", {}).get("seconds")
    rows = parts.get("wan_jax", {}).get("rows", [])
    return {row["mesh"]: row["forward_seconds"] / theirs for row in rows if theirs and "forward_seconds" in row}


def peer(values: argparse.Namespace) -> None:
    """One process of the peer; the first writes the figures after each."""
    import torch
    import torch.distributed as distributed
    from diffusers import ContextParallelConfig

    from benchmarks.diffusers_peer import diffusers_denoiser
    from wan_jax.bench import get_config
    from wan_jax.settings import parse_size

    on_gpu = torch.cuda.is_available()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if on_gpu:
        torch.cuda.set_device(rank)
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    torch.set_default_dtype(torch.bfloat16)
    torch.set_grad_enabled(False)
    config = get_config(values.preset)
    denoiser, stride = config.denoiser, config.vae.spatial_stride
    width, height = parse_size(values.size)
    device = torch.device("cuda" if on_gpu else "cpu")
    model = diffusers_denoiser(denoiser, device)
    torch.manual_seed(0)
    frames = (values.frames - 1) // config.vae.temporal_stride + 1
    latents = torch.randn(1, denoiser.in_channels, frames, height // stride, width // stride, device=device)
    text = torch.randn(1, denoiser.text_length, denoiser.text_dim, device=device)
    timestep = torch.tensor([500.0], device=device)
    report: dict[str, Any] = {
        "torch": torch.__version__,
        "processes": world,
        "size": [width, height],
        "strategy": "ulysses",
    }

    def timed(name: str) -> None:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            model(hidden_states=latents, timestep=timestep, encoder_hidden_states=text, return_dict=False)
            if on_gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        report[name] = statistics.median(times[1:])
        report[f"{name}_runs"] = times
        if on_gpu:
            report["peak_bytes"] = torch.cuda.max_memory_allocated()
        if rank == 0:
            values.output.write_text(json.dumps(report, indent=1) + "\n")

    if on_gpu:
        model.set_attention_backend("_native_cudnn")
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=world))
    timed("eager_seconds")
    model.compile_repeated_blocks(fullgraph=True)
    timed("seconds")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
