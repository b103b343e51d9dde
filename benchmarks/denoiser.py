"""A forward of a full-size expert against compiled diffusers in one run on one GPU; text encoding, VAE decode.

    python -m benchmarks.denoiser --output DIR [--sizes 1280x720 832x480] [--parts peer,denoiser,text,vae]

Random weights (speed does not depend on their values), 81 frames, batch 1. The peer runs first, in its own process.
Every time is the median of the runs after a warm-up. Results go to DIR/denoiser.json after each part.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

FRAMES = 21  # of latents
RUNS = 3


def peer(sizes: list[str]) -> None:
    """Prints one JSON line: seconds of diffusers' compiled denoiser, and of its VAE decode in bfloat16."""
    import diffusers
    import torch

    def timed(call: Callable) -> float:
        times = []
        for _ in range(RUNS + 1):
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])

    torch.set_default_dtype(torch.bfloat16)
    torch.set_grad_enabled(False)
    found: dict[str, Any] = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    random = partial(torch.randn, device="cuda")
    with torch.device("cuda"):
        vae: Any = diffusers.AutoencoderKLWan()
    vae.eval()
    for size in sizes:
        latents = random(1, 16, FRAMES, *latent_size(size))
        torch.cuda.reset_peak_memory_stats()
        found[f"vae {size}"] = timed(partial(vae.decode, latents, return_dict=False))
        found[f"vae peak {size}"] = torch.cuda.max_memory_allocated()
    del vae
    with torch.device("cuda"):
        model: Any = diffusers.WanTransformer3DModel(
            num_attention_heads=40, ffn_dim=13824, num_layers=40, cross_attn_norm=True, rope_max_seq_len=1024
        )
    model.eval()
    model.set_attention_backend("_native_cudnn")
    model.compile_repeated_blocks(fullgraph=True)
    text, timestep = random(1, 512, 4096), torch.tensor([500.0], device="cuda")
    for size in sizes:
        latents = random(1, 16, FRAMES, *latent_size(size))
        torch.cuda.reset_peak_memory_stats()
        found[f"denoiser {size}"] = timed(partial(model, latents, timestep, text, return_dict=False))
        found[f"denoiser peak {size}"] = torch.cuda.max_memory_allocated()
    print(json.dumps(found), flush=True)


def latent_size(size: str) -> tuple[int, int]:
    """ "1280x720" -> (90, 160): height and width of the latents."""
    width, height = map(int, size.split("x"))
    return height // 8, width // 8


def forward_flops(tokens: int) -> float:
    """Floating-point operations of one forward of T2V-A14B: 40 layers' products and attention, 512 tokens of text."""
    dim, ffn_dim = 5120, 13824
    products = 2 * tokens * (6 * dim * dim + 2 * dim * ffn_dim)  # four of self-, two of cross-attention, feed-forward
    return 40.0 * (4 * tokens * tokens * dim + products + 4 * tokens * 512 * dim)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("benchmarks/results"))
    parser.add_argument("--sizes", nargs="+", default=["1280x720", "832x480"])
    parser.add_argument("--parts", default="peer,denoiser,text,vae")
    parser.add_argument("--implementations", nargs="+", default=["pallas_gpu", "cudnn"])
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        peer(options.sizes)
        return
    parts = options.parts.split(",")
    rows: list[dict[str, Any]] = []
    theirs: dict[str, Any] = {}
    if "peer" in parts:
        command = [sys.executable, "-m", "benchmarks.denoiser", "--peer", "--sizes", *options.sizes]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=400)
        if done.returncode == 0:
            theirs = json.loads(done.stdout.splitlines()[-1])
            print(theirs, flush=True)

    import jax

    from wan_jax import xla_flags

    xla_flags.configure()

    def record(name: str, size: str, seconds: float, **more: Any) -> None:
        row = {"name": name, "size": size, "seconds": seconds, **more}
        versus = theirs.get(f"{name.split()[0]} {size}")
        if versus:
            row |= {"peer_seconds": versus, "over_peer": seconds / versus}
        rows.append(row)
        print(json.dumps(row), flush=True)
        device = jax.devices()[0]
        report = {
            "benchmark": "denoiser",
            "device": device.device_kind,
            "platform_version": device.client.platform_version.split("\n")[0],
            "jax": jax.__version__,
            "frames": 81,
            "weights": "random",
            "peer": theirs,
            "rows": rows,
        }
        (options.output / "denoiser.json").write_text(json.dumps(report, indent=1) + "\n")

    runners: dict[str, Callable] = {
        "denoiser": partial(run_denoiser, options.implementations),
        "text": run_text,
        "vae": run_vae,
    }
    for part, run in runners.items():
        if part in parts:
            try:
                run(options.sizes, record)
            except Exception as error:  # the other parts go on
                print(f"{part}: {type(error).__name__}: {str(error)[:500]}", flush=True)


def timed(call: Callable) -> float:
    import jax

    times = []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def random_model(make, config, dtype: str):
    """A model with random weights, made on the device in seconds: one block of noise, repeated at each one's scale."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from wan_jax.models.parameters import abstract_parameters, with_parameters

    def build():
        return make(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))

    block = jax.random.normal(jax.random.key(0), (2**20 + 7,), jnp.float32)
    arrays = {}
    for name, info in abstract_parameters(build).items():
        scale = 1.0 if name.endswith((".scale", ".table")) else info.shape[-2] ** -0.5 if len(info.shape) > 1 else 0.1
        fill = jax.jit(lambda block, scale, shape=info.shape: jnp.resize(block * scale, shape).astype(dtype))
        arrays[name] = fill(block, scale)
    return with_parameters(build, arrays)


def run_denoiser(implementations: list[str], sizes: list[str], record: Callable) -> None:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from wan_jax.config import get_preset
    from wan_jax.models.denoiser import Denoiser

    config = get_preset("t2v-a14b").denoiser
    model = random_model(Denoiser, config, "bfloat16")
    _, parameters = nnx.split(model)
    text = jax.random.normal(jax.random.key(1), (1, config.text_length, config.text_dim), jnp.bfloat16)
    context = jax.jit(lambda model, text: model.encode_context(text))(model, text)
    for size in sizes:
        latents = jax.random.normal(jax.random.key(2), (1, 16, FRAMES, *latent_size(size)))
        for implementation in implementations:
            make = partial(Denoiser, attention_implementation=implementation)
            graphdef, _ = nnx.split(
                nnx.eval_shape(lambda make=make: make(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
            )
            forward = jax.jit(lambda parameters, *inputs, graphdef=graphdef: nnx.merge(graphdef, parameters)(*inputs))
            arguments = (parameters, latents, jnp.array([500.0]), context)
            start = time.perf_counter()
            compiled = forward.lower(*arguments).compile()
            compile_seconds = time.perf_counter() - start
            memory: Any = compiled.memory_analysis()
            seconds = timed(lambda compiled=compiled, arguments=arguments: compiled(*arguments))
            tokens = latents[0, 0].size // 4
            record(
                f"denoiser {implementation}",
                size,
                seconds,
                tflop_per_second=forward_flops(tokens) / seconds / 1e12,
                compile_seconds=compile_seconds,
                temporary_bytes=memory.temp_size_in_bytes,
            )


def run_text(sizes: list[str], record: Callable) -> None:
    import jax
    import jax.numpy as jnp

    from wan_jax.config import get_preset
    from wan_jax.models.text_encoder import TextEncoder

    config = get_preset("t2v-a14b").text_encoder
    model = random_model(TextEncoder, config, "bfloat16")
    tokens = jax.random.randint(jax.random.key(0), (1, 512), 3, config.vocab_size)
    mask = jnp.ones((1, 512), jnp.int32)
    encode = jax.jit(
        lambda model, tokens, mask: model(tokens, mask), compiler_options={"xla_allow_excess_precision": False}
    )
    # The pipeline encodes one prompt at a time.
    record("text two prompts", "", timed(lambda: [encode(model, tokens, mask), encode(model, tokens, mask)]))


def run_vae(sizes: list[str], record: Callable) -> None:
    import jax
    import numpy as np

    from wan_jax.config import get_preset
    from wan_jax.models.vae import VAE

    decoded: dict[str, np.ndarray] = {}
    for dtype, precision in (("bfloat16", None), ("float32", "tensorfloat32")):
        model = random_model(VAE, get_preset("t2v-a14b").vae, dtype)
        for size in sizes if dtype == "bfloat16" else sizes[-1:]:
            latents = jax.random.normal(jax.random.key(3), (1, 16, FRAMES, *latent_size(size)))
            with jax.default_matmul_precision(precision):
                first = jax.jit(lambda model, z: model.decode_first(z)).lower(model, latents[:, :, :1]).compile()
                _, cache = first(model, latents[:, :, :1])
                following = jax.jit(lambda model, cache, z: model.decode_next(cache, z), donate_argnums=1)
                step = following.lower(model, cache, latents[:, :, 1:2]).compile()

            def decode(first=first, step=step, model=model, latents=latents):
                frames, cache = first(model, latents[:, :, :1])
                chunks = [np.asarray(frames)]
                for index in range(1, FRAMES):
                    frames, cache = step(model, cache, latents[:, :, index : index + 1])
                    chunks.append(np.asarray(frames))
                return np.concatenate(chunks, axis=1)

            memory: Any = step.memory_analysis()
            needed = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
            record(f"vae {dtype}", size, timed(decode), step_bytes=needed - memory.alias_size_in_bytes)
            decoded[dtype] = np.clip(decode(), -1, 1)  # of the last size
    error = np.mean(np.square(decoded["bfloat16"] - decoded["float32"], dtype=np.float64))
    record("vae bfloat16 against float32", sizes[-1], 0.0, psnr_db=10 * np.log10(4 / error))


if __name__ == "__main__":
    main()
