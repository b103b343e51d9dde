"""One training step of a LoRA on one full-size expert, on one accelerator or a mesh: seconds, MFU, memory.

    python benchmarks/train_lora.py --output result.json

Random bfloat16 weights; speed does not depend on their values. Each mesh and each way to rematerialise is compiled and
timed on its own, and the JSON is written after each. MFU counts what the step needs, not what it computes again: the
forward pass, and the backward pass with respect to activations, which is the projections once more and twice
attention's products (`training_flops`). It refers to --peak, a device's nominal rate, and beside it to the rate of a
large bfloat16 product measured in the same run.

To see what a GPU of 80 GB does on a larger one: XLA_PYTHON_CLIENT_MEM_FRACTION=0.53 leaves 74 of an H200's 139 GiB.
"""

import argparse
import dataclasses
import itertools
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
from wan_jax.parallel.mesh_spec import MeshSpec
from wan_jax.parallel.placement import Placement
from wan_jax.presets import get_preset
from wan_jax.runtime import xla_flags
from wan_jax.runtime.compiled import workspace_bytes
from wan_jax.runtime.devices import peak_bytes
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
    parser.add_argument("--mesh", nargs="+", default=["single"], help="with data N, N examples a microbatch")
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

    tree = abstract_model(config.denoiser)
    for mesh, remat in itertools.product(values.mesh, values.remat):
        row = {"mesh": mesh, "remat": remat}
        try:
            row |= measure(config, values, Placement.over(MeshSpec.parse(mesh)), tree, remat)
            row["fraction_of_matmul"] = row["tflop_per_second"] / facts["matmul_tflop_per_second"] / row["devices"]
        except Exception as error:  # the other rows are wanted whatever befalls this one
            traceback.print_exc()
            row["error"] = f"{type(error).__name__}: {str(error)[:500]}"
        report["rows"].append(row)
        print(json.dumps(row), flush=True)
        values.output.write_text(json.dumps(report, indent=1) + "\n")


def measure(config: Any, values: Any, placement: Placement, tree: Any, remat: str) -> dict[str, Any]:
    lora, devices, data = LoraConfig(rank=values.rank), placement.mesh_spec.devices, placement.mesh_spec.data
    loss = DenoiserLoss(
        config, (EXPERT,), NoiseConfig(), jnp.bfloat16, remat=remat, lora_scale=lora.scale, placement=placement
    )
    base = random_parameters(tree, 0, jnp.bfloat16, placement.parameter_shardings(tree))
    adapters_tree = adapter_tree(tree, lora)
    adapters = jax.device_put(initial_adapters(adapters_tree, 0), placement.parameter_shardings(adapters_tree))
    optimizer = make_optimizer(OptimizerConfig())
    state = init_state({EXPERT: adapters}, optimizer, seed=0, ema=True, replicated=placement.sharding())
    denoiser = config.denoiser
    frozen = {
        "experts": {EXPERT: base},
        "empty_text": placement.put(jnp.zeros((denoiser.text_length, denoiser.text_dim), jnp.bfloat16)),
    }
    settings = SamplingParams(size=values.size, frames=values.frames).resolve(config)
    channels, frames, height, width = settings.latents_shape(config)
    count = values.accumulation
    batch = {
        "latents": normal((count, data, channels, frames, height, width)),
        "text": normal((count, data, denoiser.text_length, denoiser.text_dim), jnp.bfloat16),
    }
    batch = placement.put(batch, jax.P(None, *placement.batch))
    tokens = frames * height * width // 4
    start = time.perf_counter()
    on_gpus = not placement.is_single and jax.default_backend() == "gpu"
    shardings = jax.tree.map(lambda array: array.sharding, state), placement.sharding()
    jitted = jax.jit(
        make_step(loss, optimizer, 0.99),
        donate_argnums=0,
        out_shardings=shardings,
        compiler_options=xla_flags.mesh_options() if on_gpus else None,
    )
    step = jitted.lower(state, frozen, batch, 1e-4).compile()
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
    flops = count * data * training_flops(denoiser, tokens, weights=False)
    rate = flops / median / 1e12
    return {
        "devices": devices,
        "tokens": tokens,
        "trained_parameters": sum(array.size for array in adapters.values()),
        "compile_seconds": compile_seconds,
        "seconds": median,
        "runs": seconds,
        "losses": losses,
        "flops": flops,
        "tflop_per_second": rate,
        "mfu": rate / values.peak / devices,
        "program_bytes": program_bytes,
        "peak_bytes": peak_bytes(),
    }


if __name__ == "__main__":
    main()
