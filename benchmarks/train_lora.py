"""One training step of a LoRA on one full-size expert, on one accelerator: seconds, MFU, memory.

    python benchmarks/train_lora.py --output result.json

Random bfloat16 weights; speed does not depend on their values. Each way to rematerialise is compiled and timed on its
own, and the JSON is written after each. MFU counts what the step needs, not what it computes again: the forward pass,
and the backward pass with respect to activations, which is the projections once more and twice attention's products
(`training_flops`). It refers to --peak, the device's nominal rate, and beside it to the rate of a large bfloat16
product measured in the same run.

To see what a GPU of 80 GB does on a larger one: XLA_PYTHON_CLIENT_MEM_FRACTION=0.53 leaves 74 of an H200's 139 GiB.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import time
import traceback
from typing import Any

import jax
import jax.numpy as jnp

from wan_bench.parts import device_facts, normal
from wan_jax.diffusion.params import SamplingParams
from wan_jax.models.build import abstract_model
from wan_jax.pipeline import peak_bytes
from wan_jax.presets import get_preset
from wan_jax.runtime.compiled import workspace_bytes
from wan_jax.testing.models import random_parameters
from wan_jax.training.adapters import adapter_tree, initial_adapters
from wan_jax.training.config import LoraConfig, NoiseConfig, OptimizerConfig
from wan_jax.training.denoiser_loss import DenoiserLoss, training_flops
from wan_jax.training.optimizer import make_optimizer
from wan_jax.training.step import init_state, make_step

EXPERT = "low_noise"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="t2v-a14b")
    parser.add_argument("--layers", type=int, help="fewer layers, to try the script on a small machine")
    parser.add_argument("--size", default="832x480")
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--remat", nargs="+", default=["attention", "layer"])
    parser.add_argument("--steps", type=int, default=5, help="timed, after two to warm up")
    parser.add_argument(
        "--peak", type=float, default=989.0, help="nominal TFLOP/s (default: of an H100 or H200, dense)"
    )
    parser.add_argument("--output", type=pathlib.Path, required=True, help="JSON file")
    values = parser.parse_args()

    config = get_preset(values.preset)
    if values.layers:
        denoiser = dataclasses.replace(config.denoiser, num_layers=values.layers)
        config = dataclasses.replace(config, denoiser=denoiser)
    facts = device_facts()
    report: dict[str, Any] = {"benchmark": "train_lora", **facts, **vars(values), "output": str(values.output)}
    report |= {"layers": config.denoiser.num_layers, "dtype": "bfloat16", "weights": "random", "rows": []}

    start = time.perf_counter()
    tree = abstract_model(config.denoiser)
    base = random_parameters(tree, 0, jnp.bfloat16)
    print(f"random weights in {time.perf_counter() - start:.1f} s", flush=True)
    for remat in values.remat:
        try:
            row = measure(config, values, base, tree, remat, facts["matmul_tflop_per_second"])
        except Exception as error:  # the other rows are wanted whatever befalls this one
            traceback.print_exc()
            row = {"remat": remat, "error": f"{type(error).__name__}: {str(error)[:500]}"}
        report["rows"].append(row)
        print(json.dumps(row), flush=True)
        values.output.write_text(json.dumps(report, indent=1) + "\n")


def measure(config: Any, values: Any, base: Any, tree: Any, remat: str, matmul: float) -> dict[str, Any]:
    lora = LoraConfig(rank=values.rank)
    loss = DenoiserLoss(config, (EXPERT,), NoiseConfig(), jnp.bfloat16, remat=remat, lora_scale=lora.scale)
    adapters = initial_adapters(adapter_tree(tree, lora), 0)
    optimizer = make_optimizer(OptimizerConfig())
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state = init_state({EXPERT: jax.device_put(adapters, place)}, optimizer, seed=0, ema=True, replicated=place)
    denoiser = config.denoiser
    frozen = {
        "experts": {EXPERT: base},
        "empty_text": jnp.zeros((denoiser.text_length, denoiser.text_dim), jnp.bfloat16),
    }
    settings = SamplingParams(size=values.size, frames=values.frames).resolve(config)
    channels, frames, height, width = settings.latents_shape(config)
    count = values.accumulation
    batch = {
        "latents": normal((count, 1, channels, frames, height, width)),
        "text": normal((count, 1, denoiser.text_length, denoiser.text_dim), jnp.bfloat16),
    }
    tokens = frames * height * width // 4
    start = time.perf_counter()
    step = jax.jit(make_step(loss, optimizer, 0.99), donate_argnums=0).lower(state, frozen, batch, 1e-4).compile()
    compile_seconds = time.perf_counter() - start
    analysis: Any = step.memory_analysis()
    program_bytes = analysis.argument_size_in_bytes + workspace_bytes(step)
    print(f"{remat}: compiled in {compile_seconds:.1f} s, {program_bytes / 2**30:.1f} GiB", flush=True)
    seconds, losses = [], []
    for _ in range(2 + values.steps):
        start = time.perf_counter()
        state, metrics = step(state, frozen, batch, 1e-4)
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[2:])
    flops = count * training_flops(denoiser, tokens, weights=False)
    rate = flops / median / 1e12
    return {
        "remat": remat,
        "tokens": tokens,
        "trained_parameters": sum(array.size for array in adapters.values()),
        "compile_seconds": compile_seconds,
        "seconds": median,
        "runs": seconds,
        "losses": losses,
        "flops": flops,
        "tflop_per_second": rate,
        "mfu": rate / values.peak,
        "fraction_of_matmul": rate / matmul,
        "program_bytes": program_bytes,
        "peak_bytes": peak_bytes(),
    }


if __name__ == "__main__":
    main()
