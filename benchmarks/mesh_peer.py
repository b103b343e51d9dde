"""The peer of `mesh.py`: diffusers' denoiser over several GPUs by its own context parallelism; see there.

python -m torch.distributed.run --standalone --nproc-per-node 2 -m benchmarks.mesh_peer --output result.json
"""

import argparse
import json
import os
import pathlib
import statistics
import time
from typing import Any

from benchmarks.diffusers_peer import diffusers_denoiser
from wan_bench.parts import get_config
from wan_jax.diffusion.params import SamplingParams


def main() -> None:
    """One process; the first writes the figures."""
    import torch
    import torch.distributed as distributed
    from diffusers import ContextParallelConfig

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--preset", default="t2v-a14b")
    parser.add_argument("--size", default="1280x720")
    parser.add_argument("--frames", type=int, default=81)
    values = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if on_gpu:
        torch.cuda.set_device(rank)
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    torch.set_default_dtype(torch.bfloat16)
    torch.set_grad_enabled(False)
    config = get_config(values.preset)
    denoiser, stride = config.denoiser, config.vae.spatial_stride
    width, height = SamplingParams(size=values.size).size
    device = torch.device("cuda" if on_gpu else "cpu")
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

    model: Any = diffusers_denoiser(denoiser, device)
    if on_gpu:
        model.set_attention_backend("_native_cudnn")
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=world))

    def measure(name: str, runs: int) -> None:
        """The first run is for warming up; where there is no other, it has to do."""
        times = []
        for _ in range(runs):
            start = time.perf_counter()
            model(hidden_states=latents, timestep=timestep, encoder_hidden_states=text, return_dict=False)
            if on_gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        report[name] = statistics.mean(times[1:] or times)
        report[f"{name}_runs"] = times
        if on_gpu:
            report["peak_bytes"] = torch.cuda.max_memory_allocated()
        if rank == 0:
            values.output.write_text(json.dumps(report, indent=1) + "\n")

    # Not compiled first: in their first call diffusers' hooks look at signatures, which torch.compile cannot trace.
    measure("eager_seconds", 1)
    try:
        model.compile_repeated_blocks(fullgraph=True)
        measure("seconds", 3)
    except Exception as error:
        report["compile_error"] = repr(error)[:1000]
    if rank == 0:
        values.output.write_text(json.dumps(report, indent=1) + "\n")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
