"""A full-size Wan2.2-T2V-A14B with random weights, prompt to mp4, on one accelerator: seconds per stage, peak memory.

    python benchmarks/generate_full_size.py --size 832x480 1280x720 --frames 81 --steps 2 --output result.json

Both experts, UMT5-XXL and the VAE are resident. Speed does not depend on the values of the weights. Each size runs cold
and, but for --cold-only sizes, once more warm: another prompt, seed and guidance, and nothing may compile.
"""

import argparse
import dataclasses
import json
import pathlib
import tempfile
import time

import jax

from wan_jax.diffusion.params import SamplingParams
from wan_jax.pipeline import WanPipeline
from wan_jax.presets import get_preset
from wan_jax.runtime.devices import peak_bytes
from wan_jax.runtime.progress import Bars
from wan_jax.testing.models import random_pipeline
from wan_jax.testing.tokenizer import train_small_tokenizer
from wan_jax.text.tokenizer import Tokenizer

PROMPTS = ("Two cats in boxing gear and bright gloves fight on a spotlighted stage.", "一只白色的小狗在草地上奔跑。")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="t2v-a14b")
    parser.add_argument("--layers", type=int, help="fewer layers, to try the script on a small machine")
    parser.add_argument("--size", nargs="+", default=["832x480"])
    parser.add_argument("--cold-only", nargs="*", default=[], help="sizes that run once")
    parser.add_argument("--shift", type=float, default=5.0, help="5 makes even 2 steps use both experts")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--output", type=pathlib.Path, required=True, help="JSON file")
    parser.add_argument("--video", type=pathlib.Path, help="keep the mp4 here")
    values = parser.parse_args()

    config = get_preset(values.preset)
    if values.layers:
        config = dataclasses.replace(
            config,
            denoiser=dataclasses.replace(config.denoiser, num_layers=values.layers),
            text_encoder=dataclasses.replace(config.text_encoder, num_layers=values.layers),
        )
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        train_small_tokenizer(PROMPTS, 512, folder)
        tokenizer = Tokenizer.from_pretrained(folder)
    pipeline = random_pipeline(config, tokenizer, dtype="bfloat16", on_event=Bars())
    print(f"random weights in {time.perf_counter() - start:.1f} s; peak {peak_bytes()}", flush=True)

    runs: list[dict] = []
    for size in values.size:
        for index, prompt in enumerate(PROMPTS):
            if index and size in values.cold_only:
                break
            request = SamplingParams(
                prompt,
                size=size,
                frames=values.frames,
                steps=values.steps,
                shift=values.shift,
                seed=index,
                guidance=(3.0 + index, 4.0 + index),
            ).resolve(config)
            runs.append({"size": size, "run": ("cold", "warm")[index], **_run(pipeline, request, values.video)})
            print(json.dumps(runs[-1]), flush=True)
            values.output.write_text(json.dumps(_report(values, config, runs), indent=1) + "\n")


def _run(pipeline: WanPipeline, request: SamplingParams, video: pathlib.Path | None) -> dict:
    start = time.perf_counter()
    made = pipeline(request)
    saving = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = video or pathlib.Path(folder) / "video.mp4"
        made.save(path)
        mp4_bytes = path.stat().st_size
    seconds = {**made.seconds, "save": time.perf_counter() - saving, "total": time.perf_counter() - start}
    return {"seconds": seconds, "peak_bytes": peak_bytes(), "mp4_bytes": mp4_bytes}


def _report(values: argparse.Namespace, config, runs: list[dict]) -> dict:
    device = jax.devices()[0]
    return {
        "benchmark": "generate_full_size",
        "device": device.device_kind,
        "platform_version": device.client.platform_version.split("\n")[0],
        "jax": jax.__version__,
        "preset": values.preset,
        "layers": config.denoiser.num_layers,
        "frames": values.frames,
        "steps": values.steps,
        "forwards": 2 * values.steps,
        "shift": values.shift,
        "dtype": "bfloat16 (VAE float32, TF32 convolutions)",
        "weights": "random",
        "runs": runs,
    }


if __name__ == "__main__":
    main()
