"""Four-step video with T2V-A14B, and the smaller models against compiled diffusers, on one GPU.

    python -m benchmarks.few_steps --output DIR [--seconds 420] [--parts t2v-a14b,ti2v-5b,t2v-1.3b]

Random weights, bfloat16, VAE in bfloat16, memory profile "resident". Every part runs in processes of its own, and none
starts after --seconds. DIR/few_steps.json is written after every figure.

    t2v-a14b   LightX2V's four steps without guidance at 1280x720, 81 and 129 frames: prompt to mp4, after a run of one
               step has compiled and started everything
    ti2v-5b    1280x704, 121 frames: a step with guidance (two forwards) and a decode; 50 such steps and the decode
               against 100 forwards and a decode of diffusers
    t2v-1.3b   the same at 832x480, 81 frames

The peer is given its cheapest form: one timestep for all tokens, no scheduler, no text encoder, no file.
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
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.diffusers_peer import diffusers_denoiser
from benchmarks.profiles import PROMPT, made_up_pipeline

Report = Callable[[str, dict[str, Any]], None]
FEW_STEPS: dict[str, Any] = {"steps": 4, "schedule": "lightx2v", "solver": "euler", "shift": 5.0, "guidance": 1.0}
LENGTHS = (81, 129)
STEPS = 50  # of the smaller models' runs
PARTS = ("t2v-a14b", "ti2v-5b", "t2v-1.3b")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path(os.environ.get("OUT", "benchmarks/results"))
    )
    parser.add_argument("--seconds", type=float, default=420, help="start nothing new after this long")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--demo", action="store_true", help="small models, to try the script without a GPU")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    values = parser.parse_args()
    if values.child:
        part, who = values.child
        {"ours": ours, "peer": peer}[who](
            part, values.demo, lambda name, row: print(json.dumps({name: row}), flush=True)
        )
        return

    until = time.monotonic() + values.seconds
    report: dict[str, Any] = {"benchmark": "few_steps", "weights": "random", "prompt_to_mp4": FEW_STEPS, "parts": {}}
    for part in values.parts.split(","):
        for who in ("ours",) if part == "t2v-a14b" else ("peer", "ours"):
            if time.monotonic() > until:
                print(f"{part} {who}: out of time", flush=True)
                continue
            start = time.monotonic()
            rows = report["parts"].setdefault(part, {}).setdefault(who, {})
            run_child(part, who, values, until + 60, rows, report)
            rows["process_seconds"] = time.monotonic() - start
            compare(report["parts"][part])
            save(values, report)
            print(
                f"({part} {who}: {time.monotonic() - start:.0f} s, {until - time.monotonic():.0f} s left)", flush=True
            )
    print(json.dumps({part: rows.get("comparison") for part, rows in report["parts"].items()}))


def run_child(part: str, who: str, values: argparse.Namespace, until: float, rows: dict, report: dict) -> None:
    """Collects what a process prints, line by line, until it ends or has to."""
    command = [sys.executable, "-m", "benchmarks.few_steps", "--child", part, who, *["--demo"] * values.demo]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    watch = threading.Timer(max(1.0, until - time.monotonic()), process.kill)
    watch.start()
    assert process.stdout
    for line in process.stdout:
        if line.startswith("{"):
            rows |= json.loads(line)
            save(values, report)
            print(part, who, line.strip()[:300], flush=True)
    if code := process.wait():
        rows["error"] = f"exit code {code}"
        print(f"{part} {who} ended with {code}", flush=True)
    watch.cancel()


def save(values: argparse.Namespace, report: dict[str, Any]) -> None:
    (values.output / "few_steps.json").write_text(json.dumps(report, indent=1) + "\n")


def compare(part: dict[str, Any]) -> None:
    """A run of 50 guided steps and a decode, ours over diffusers'."""
    mine, theirs = part.get("ours", {}), part.get("peer", {})
    if {"step", "decode"} <= mine.keys() and {"forward", "decode"} <= theirs.keys():
        our_seconds = STEPS * mine["step"]["seconds"] + mine["decode"]["seconds"]
        peer_seconds = 2 * STEPS * theirs["forward"]["seconds"] + theirs["decode"]["seconds"]
        part["comparison"] = {
            "ours_seconds": our_seconds,
            "peer_seconds": peer_seconds,
            "over_peer": our_seconds / peer_seconds,
            "step_over_two_forwards": mine["step"]["seconds"] / (2 * theirs["forward"]["seconds"]),
            "decode_over_peer": mine["decode"]["seconds"] / theirs["decode"]["seconds"],
        }


def ours(part: str, demo: bool, report: Report) -> None:
    import jax

    from wan_jax.runtime import xla_flags

    xla_flags.configure()
    from wan_jax.parallel.placement import Placement
    from wan_jax.runtime.devices import peak_bytes

    config = small(part) if demo else full(part)
    report("device", {"kind": jax.devices()[0].device_kind, "jax": jax.__version__})
    start = time.perf_counter()
    pipeline = made_up_pipeline(config, Placement(), "bfloat16")
    report("weights", {"seconds": time.perf_counter() - start})
    if part == "t2v-a14b":
        for frames in (5, 9) if demo else LENGTHS:
            prompt_to_mp4(pipeline, frames, (48, 32) if demo else (1280, 720), report)
    else:
        guided_steps(pipeline, small_run(config) if demo else {}, report)
    report("peak", {"bytes": peak_bytes()})


def prompt_to_mp4(pipeline: Any, frames: int, size: tuple[int, int], report: Report) -> None:
    from wan_jax.diffusion.params import SamplingParams
    from wan_jax.media.video import VideoWriter

    def run(prompt: str, **choices: Any) -> dict[str, Any]:
        request = SamplingParams(prompt, size=size, frames=frames, **FEW_STEPS | choices).resolve(pipeline.config)
        steps: list[float] = []
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            result = next(pipeline.results([request], on_event=step_seconds(steps)))
            denoised = time.perf_counter()
            with VideoWriter(pathlib.Path(folder) / "out.mp4", request.fps) as writer:
                for chunk in result.frames():
                    writer.write(chunk)
            end = time.perf_counter()
        return {
            "seconds": end - start,
            "until_latents": denoised - start,
            "decode_and_file": end - denoised,
            "steps": steps,
            "stages": dict(result.seconds),
        }

    report(f"first {frames} frames, 1 step", run(PROMPT, steps=1))
    report(f"{frames} frames", run(f"{PROMPT} It rains."))  # another prompt, so that text is encoded too


def guided_steps(pipeline: Any, choices: dict[str, Any], report: Report) -> None:
    from wan_jax.diffusion.params import SamplingParams

    request = SamplingParams(PROMPT, **{"steps": 3, **choices}).resolve(pipeline.config)
    steps: list[float] = []
    start = time.perf_counter()
    result = next(pipeline.results([request], on_event=step_seconds(steps)))
    report("first run", {"seconds": time.perf_counter() - start, "compile": result.seconds["compile"]})
    report("step", {"seconds": statistics.median(steps[1:]), "runs": steps, "size": request.size})
    runs = []
    for _ in range(3):
        start = time.perf_counter()
        frames = pipeline.decode(result.latents)
        runs.append(time.perf_counter() - start)
        report("decode", {"seconds": statistics.median(runs[1:] or runs), "runs": runs, "frames": frames.shape})


def step_seconds(seconds: list[float]) -> Callable[[Any], None]:
    """A listener that collects the seconds of a run's steps."""
    from wan_jax.runtime.events import StepDone

    return lambda event: seconds.append(event.seconds) if isinstance(event, StepDone) else None


def peer(part: str, demo: bool, report: Report) -> None:
    """Diffusers' denoiser, compiled, with cuDNN attention, and its decoder, as it is, in bfloat16."""
    import diffusers
    import torch
    from diffusers import AutoencoderKLWan

    config = small(part) if demo else full(part)
    sampling, denoiser, vae_config = config.sampling, config.denoiser, config.vae
    on_gpu = torch.cuda.is_available()
    width, height = small_run(config)["size"] if demo else sampling.size
    count = small_run(config)["frames"] if demo else sampling.frames

    def timed(call: Callable[[], Any]) -> dict[str, Any]:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            call()
            if on_gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return {"seconds": statistics.median(times[1:]), "runs": times}

    torch.set_default_dtype(torch.bfloat16)
    torch.set_grad_enabled(False)
    report("versions", {"torch": torch.__version__, "diffusers": diffusers.__version__})
    device = torch.device("cuda" if on_gpu else "cpu")
    stride = vae_config.spatial_stride
    shape = 1, vae_config.z_dim, (count - 1) // vae_config.temporal_stride + 1, height // stride, width // stride
    latents = torch.randn(shape, device=device)
    # Made under the device, but called outside: torch.compile does not know its way through that context.
    with device:
        vae: Any = AutoencoderKLWan(**vae_arguments(vae_config))
    vae.eval()
    report("decode", timed(partial(vae.decode, latents, return_dict=False)))
    del vae
    model = diffusers_denoiser(denoiser, device)
    if on_gpu:
        model.set_attention_backend("_native_cudnn")
        model.compile_repeated_blocks(fullgraph=True)
    text = torch.randn(1, 512, denoiser.text_dim, device=device)
    timestep = torch.tensor([500.0], device=device)
    report("forward", timed(partial(model, latents, timestep, text, return_dict=False)))
    if on_gpu:
        report("peak", {"bytes": torch.cuda.max_memory_allocated()})


def vae_arguments(config: Any) -> dict[str, Any]:
    """Our config in diffusers' words."""
    arguments = {
        "base_dim": config.base_dim,
        "z_dim": config.z_dim,
        "num_res_blocks": config.num_res_blocks,
        "latents_mean": list(config.latents_mean),
        "latents_std": list(config.latents_std),
    }
    if config.patch_size > 1:
        channels = 3 * config.patch_size**2
        arguments |= {
            "decoder_base_dim": config.decoder_base_dim,
            "is_residual": True,
            "in_channels": channels,
            "out_channels": channels,
            "patch_size": config.patch_size,
            "scale_factor_spatial": config.spatial_stride,
        }
    return arguments


def full(part: str) -> Any:
    from wan_jax.presets import get_preset

    return get_preset(part)


def small(part: str) -> Any:
    """The part's model with little of everything."""
    import dataclasses

    from wan_jax.testing.models import DEMO

    config = full(part)
    narrow = {"num_layers": 2, "dim": 96, "num_heads": 4, "ffn_dim": 256, "text_dim": 64, "freq_dim": 64}
    width = {"base_dim": 16, "num_res_blocks": 1} | ({"decoder_base_dim": 16} if config.vae.patch_size > 1 else {})
    return dataclasses.replace(
        config,
        denoiser=dataclasses.replace(config.denoiser, **narrow),
        text_encoder=DEMO.text_encoder,
        vae=dataclasses.replace(config.vae, **width),
    )


def small_run(config: Any) -> dict[str, Any]:
    height, width = config.size_multiple
    return {"size": (3 * width, 2 * height), "frames": 9}


if __name__ == "__main__":
    main()
