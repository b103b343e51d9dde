"""A full-size Wan2.2-T2V-A14B with random weights, prompt to mp4, on one accelerator: seconds per stage, peak memory.

    python benchmarks/generate_full_size.py --size 832x480 --frames 81 --steps 2 --output result.json

Both experts, UMT5-XXL and the VAE are resident. Speed does not depend on the values of the weights. The second run
measures warm programs: same shapes, another prompt, seed and guidance, and it must compile nothing.
"""

import argparse
import dataclasses
import json
import pathlib
import tempfile
import time

import jax

from wan_jax.config import get_preset
from wan_jax.demo import random_pipeline, train_demo_tokenizer
from wan_jax.pipeline import peak_bytes
from wan_jax.settings import Settings, parse_size
from wan_jax.video import Video

PROMPTS = ("Two cats in boxing gear and bright gloves fight on a spotlighted stage.", "一只白色的小狗在草地上奔跑。")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="t2v-a14b")
    parser.add_argument("--layers", type=int, help="fewer layers, to try the script on a small machine")
    parser.add_argument("--size", default="832x480")
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
        tokenizer = train_demo_tokenizer(pathlib.Path(folder))
    pipeline = random_pipeline(config, tokenizer, dtype="bfloat16", progress=True)
    print(f"random weights in {time.perf_counter() - start:.1f} s; peak {peak_bytes()}", flush=True)

    runs = []
    for index, prompt in enumerate(PROMPTS):
        settings = Settings.resolve(
            config,
            size=parse_size(values.size),
            frames=values.frames,
            steps=values.steps,
            seed=index,
            guidance=(3.0 + index, 4.0 + index),
        )
        start = time.perf_counter()
        latents = pipeline.denoise([prompt], settings)[0]
        frames = pipeline.decode(latents)
        saving = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            path = values.video or pathlib.Path(folder) / "video.mp4"
            Video(frames, latents, settings.fps, pipeline.metadata(prompt, settings)).save(path)
            size = path.stat().st_size
        seconds = {**pipeline.seconds, "save": time.perf_counter() - saving, "total": time.perf_counter() - start}
        seconds.pop("load", None)
        run = {"run": ("cold", "warm")[index], "seconds": seconds, "peak_bytes": peak_bytes(), "mp4_bytes": size}
        print(json.dumps(run), flush=True)
        runs.append(run)
        values.output.write_text(json.dumps(_report(values, config, runs), indent=1) + "\n")


def _report(values: argparse.Namespace, config, runs: list[dict]) -> dict:
    device = jax.devices()[0]
    return {
        "benchmark": "generate_full_size",
        "device": device.device_kind,
        "platform_version": device.client.platform_version.split("\n")[0],
        "jax": jax.__version__,
        "preset": values.preset,
        "layers": config.denoiser.num_layers,
        "size": values.size,
        "frames": values.frames,
        "steps": values.steps,
        "forwards": 2 * values.steps,
        "dtype": "bfloat16 (VAE float32)",
        "weights": "random",
        "runs": runs,
    }


if __name__ == "__main__":
    main()
