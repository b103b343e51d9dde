"""LoRAs on full-size T2V-A14B, on one GPU: setting, swapping and unsetting them, and what they cost a step.

    python -m benchmarks.lora --output DIR

Made-up weights, bfloat16, memory profile "resident", 832x480, 81 frames, without guidance. Four files are written to
--folder first: rank 64 in bfloat16, two for each expert, ComfyUI's names, all ten Linears of all layers (with
biases' changes on the text embedding, norms and modulations). DIR/lora.json is written after every figure.
"""

import argparse
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from benchmarks.profiles import PROMPT, made_up_pipeline

STEPS: dict[str, Any] = {"steps": 4, "schedule": "lightx2v", "solver": "euler", "shift": 5.0, "guidance": 1.0}
RANK = 64
EXPERTS: tuple[Any, ...] = ("high_noise", "low_noise")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path(os.environ.get("OUT", "benchmarks/results"))
    )
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("/tmp"), help="for 2.5 GB of files")
    parser.add_argument("--size", default="832x480")
    parser.add_argument("--demo", action="store_true", help="a small model, to try the script without a GPU")
    values = parser.parse_args()

    import jax

    from wan_jax.runtime import xla_flags

    xla_flags.configure()
    from wan_jax import Lora
    from wan_jax.diffusion.params import SamplingParams
    from wan_jax.parallel.placement import Placement
    from wan_jax.presets import get_preset
    from wan_jax.runtime.devices import peak_bytes
    from wan_jax.runtime.events import StepDone
    from wan_jax.testing.models import DEMO

    report: dict[str, Any] = {
        "benchmark": "lora",
        "weights": "made up",
        "rank": RANK,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "cores": os.cpu_count(),
        "steps": {},
        "seconds": {},
        "compiled": {},
    }
    compiled: list[str] = []

    def note_compiling(event: str, duration_secs: float, **more: Any) -> None:
        if "backend_compile" in event:
            compiled.append(str(more.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(note_compiling)

    def timed(name: str, call: Callable[[], Any]) -> Any:
        compiled.clear()
        start = time.perf_counter()
        result = call()
        report["seconds"].setdefault(name, []).append(time.perf_counter() - start)
        report["compiled"].setdefault(name, []).append(list(compiled))
        report["peak_bytes"] = peak_bytes()
        (values.output / "lora.json").write_text(json.dumps(report, indent=1) + "\n")
        print(name, report["seconds"][name][-1], compiled, flush=True)
        return result

    config = DEMO if values.demo else get_preset("t2v-a14b")
    size, frames = ((48, 32), 5) if values.demo else (values.size, 81)
    request = SamplingParams(PROMPT, size=size, frames=frames, **STEPS).resolve(config)
    paths = {name: {expert: values.folder / f"lora_{name}_{expert}.safetensors" for expert in EXPERTS} for name in "ab"}
    for seed, by_expert in enumerate(paths.values()):
        for path in by_expert.values():
            timed("write a file", partial(write_lora, path, config.denoiser, seed))
    report["file_bytes"] = paths["a"]["high_noise"].stat().st_size
    start = time.perf_counter()
    pipeline = made_up_pipeline(config, Placement(), "bfloat16")
    report["weights_seconds"] = time.perf_counter() - start

    def loras(name: str, strength: float = 1.0) -> Sequence[Lora]:
        return [Lora(str(paths[name][expert]), strength, expert) for expert in EXPERTS]

    def steps(name: str) -> None:
        """One run of four steps, two an expert; the second of each expert follows no compilation."""
        found: list[float] = []

        def listen(event: Any) -> None:
            if isinstance(event, StepDone):
                found.append(event.seconds)

        result = timed(f"denoise {name}", lambda: next(pipeline.results([request], on_event=listen)))
        report["steps"].setdefault(name, []).append(found)
        report["steps"][f"{name}, latents' std"] = float(np.std(result.latents))
        print(name, found, flush=True)

    timed("first set", partial(pipeline.set_loras, loras("a")))  # compiles what turns factors around
    for name in ("b", "a", "b", "a"):
        timed("swap", partial(pipeline.set_loras, loras(name)))
    for strength in (0.5, 0.8):
        timed("other strengths", partial(pipeline.set_loras, loras("a", strength)))
    steps("with")
    timed("swap after a run", partial(pipeline.set_loras, loras("b")))
    steps("with")
    timed("unset", partial(pipeline.set_loras, []))
    steps("without")
    steps("without")
    best = {name: min(min(run[1:]) for run in report["steps"][name]) for name in ("with", "without")}
    report["step"] = best | {"with_over_without": best["with"] / best["without"]}
    timed("end", lambda: None)
    print(json.dumps({"swap": min(report["seconds"]["swap"]), **report["step"]}))
    for by_expert in paths.values():
        for path in by_expert.values():
            path.unlink()


def write_lora(path: pathlib.Path, config: Any, seed: int) -> None:
    from wan_jax.checkpoint.formats.safetensors import write_safetensors_file
    from wan_jax.checkpoint.formats.tensors import BFLOAT16, TensorInfo
    from wan_jax.checkpoint.tables import expanded_table

    noise = np.random.default_rng(seed).standard_normal((1 << 20) + 7, np.float32).astype(BFLOAT16)
    infos: dict[str, TensorInfo] = {}
    for mapping in expanded_table(config):
        module, _, leaf = f"diffusion_model.{mapping.names.official}".rpartition(".")
        if leaf == "modulation":
            infos[f"{module}.diff_m"] = TensorInfo(mapping.torch_shape, BFLOAT16, "")
        elif "norm" in module:
            infos[f"{module}.{'diff_b' if leaf == 'bias' else 'diff'}"] = TensorInfo(mapping.torch_shape, BFLOAT16, "")
        elif "text_embedding" in module and leaf == "bias":
            infos[f"{module}.diff_b"] = TensorInfo(mapping.torch_shape, BFLOAT16, "")
        elif ".blocks." in module and leaf == "weight":
            outputs, inputs = mapping.torch_shape
            infos[f"{module}.lora_down.weight"] = TensorInfo((RANK, inputs), BFLOAT16, "")
            infos[f"{module}.lora_up.weight"] = TensorInfo((outputs, RANK), BFLOAT16, "")
            infos[f"{module}.alpha"] = TensorInfo((), BFLOAT16, "")

    def read_many(names: Sequence[str]):
        for name in names:
            shape = infos[name].shape
            scale = np.asarray(0.01 if len(shape) == 2 else 8.0 if shape == () else 0.001, BFLOAT16)
            yield np.resize(noise, math.prod(shape)).reshape(shape) * scale if shape else scale

    write_safetensors_file(path, infos, read_many)


if __name__ == "__main__":
    main()
