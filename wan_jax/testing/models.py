"""Small models with random weights, for tests and benchmarks: nothing to download, on any machine.

DEMO has the structure of Wan2.2-T2V-A14B (two experts, UMT5, causal VAE, tokenizer) at small sizes; its videos
are coloured noise.
"""

import math
import os
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from wan_jax.checkpoint import convert, memory_checkpoint
from wan_jax.config import DenoiserConfig, SamplingConfig, TextEncoderConfig, VAEConfig, WanConfig
from wan_jax.models.denoiser import Denoiser
from wan_jax.models.image_encoder import ImageEncoder
from wan_jax.models.text_encoder import TextEncoder
from wan_jax.models.vae import VAE
from wan_jax.parallel.placement import SINGLE, Placement
from wan_jax.parameters import ParameterInfo, abstract_parameters, named_parameters, with_parameters
from wan_jax.pipeline import WanPipeline
from wan_jax.runtime.events import Listener
from wan_jax.testing.tokenizer import train_small_tokenizer
from wan_jax.text.tokenizer import Tokenizer

PROMPT = "a red circle moves right"
DEMO = WanConfig(
    name="demo",
    denoiser=DenoiserConfig(num_layers=2, dim=96, num_heads=4, ffn_dim=256, text_dim=64, freq_dim=64),
    text_encoder=TextEncoderConfig(vocab_size=512, dim=64, num_layers=2, num_heads=4, head_dim=16, ffn_dim=128),
    vae=VAEConfig(base_dim=16, num_res_blocks=1),
    sampling=SamplingConfig(size=(160, 96), frames=17, steps=6),
)


def random_model(
    make: Callable[..., Any], config: Any, dtype: str, seed: int = 0, placement: Placement = SINGLE
) -> Any:
    """A Denoiser, TextEncoder, VAE or ImageEncoder (`make`) with fixed random weights, in place."""

    def build():
        return make(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))

    tree = abstract_parameters(build)
    shardings = placement.model_shardings(config, tree)
    return with_parameters(build, random_parameters(tree, seed, dtype, shardings))


def random_pipeline(
    config: WanConfig,
    tokenizer: Tokenizer,
    dtype: str = "bfloat16",
    *,
    vae_dtype: str = "float32",
    placement: Placement = SINGLE,
    on_event: Listener | None = None,
) -> WanPipeline:
    """A pipeline of any size with fixed random weights."""
    clip = config.image_encoder
    by_expert = placement.by_expert(config.experts)
    return WanPipeline(
        config,
        tokenizer=tokenizer,
        text_encoder=random_model(TextEncoder, config.text_encoder, dtype, 1, placement),
        denoisers={
            name: random_model(Denoiser, config.denoiser, dtype, 2 + n, by_expert[name])
            for n, name in enumerate(config.experts)
        },
        vae=random_model(VAE, config.vae, vae_dtype, 0, placement),
        image_encoder=None if clip is None else random_model(ImageEncoder, clip, "float32", 4, placement),
        placement=placement,
        on_event=on_event,
    )


def write_demo(
    destination: Path,
    layout: str,
    config: WanConfig = DEMO,
    *,
    dtype: str = "bfloat16",
    tokenizer_folder: Path | None = None,
) -> None:
    """Writes the demo model, or another with random weights, as a checkpoint.

    Args:
        destination: the folder to make.
        layout: "orbax", "diffusers" or "official".
        config: the model's.
        dtype: of the text encoder and the denoisers; the VAE and the image encoder are float32.
        tokenizer_folder: a tokenizer to copy; None for one that is trained on PROMPT.

    Raises:
        InputError: `destination` exists.
    """
    with tempfile.TemporaryDirectory() as folder:
        if tokenizer_folder is None:
            tokenizer_folder = Path(folder)
            train_small_tokenizer([PROMPT], config.text_encoder.vocab_size, tokenizer_folder)
        pipeline = random_pipeline(config, Tokenizer.from_pretrained(tokenizer_folder), dtype)
        models = {"text_encoder": pipeline.text_encoder, "vae": pipeline.vae, **pipeline.denoisers}
        if pipeline.image_encoder is not None:
            models["image_encoder"] = pipeline.image_encoder
        components = {name: named_parameters(model) for name, model in models.items()}
        convert(memory_checkpoint(config, components, tokenizer_folder), destination, to=layout)


LARGE = 2**24
BLOCK = 2**20 + 7  # odd, so that no row of a matrix is like the one before


def random_parameters(
    tree: Mapping[str, ParameterInfo],
    seed: int,
    dtype: DTypeLike,
    shardings: Mapping[str, jax.sharding.Sharding] | None = None,
) -> dict[str, jax.Array]:
    """Fixed random weights of a scale at which signals neither die nor explode: for demos, benchmarks and tests.

    Drawn on the host, a thread for each layer: compiling a generator for each of a VAE's shapes takes longer. Large
    parameters, which only benchmarks have, repeat one block of numbers, which takes seconds instead of minutes; every
    device makes its own part of them. `shardings` says where parameters lie, by name; it changes no number.
    """
    dtype = jnp.dtype(dtype)
    scales = {"scale": (1.0, 0.1), "bias": (0.0, 0.1), "table": (0.0, 1.0)}
    block = jnp.asarray(np.random.default_rng(seed).standard_normal(BLOCK, np.float32))
    arrays = {}
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for index, name in enumerate(sorted(tree)):
            info = tree[name]
            shape = info.shape if info.stacked else (1, *info.shape)
            fan_in = math.prod(shape[1:-1])
            mean, std = scales.get(name.rpartition(".")[2], (0.0, fan_in**-0.5))
            if math.prod(shape) > LARGE:
                fill = _repeater(shape, dtype, info.shape, None if shardings is None else shardings[name])
                arrays[name] = jax.block_until_ready(fill(block, mean, std))
                continue
            host = np.empty(shape, dtype)

            def draw(layer: int, host=host, index=index, mean=mean, std=std) -> None:
                values = np.random.default_rng((seed, index, layer)).standard_normal(host.shape[1:], np.float32)
                values *= np.float32(std)
                values += np.float32(mean)
                if dtype == jnp.bfloat16:  # cut, not rounded: these are random anyway, and NumPy does it in threads
                    host[layer].view(np.uint16)[...] = values.view(np.uint32) >> 16
                else:
                    host[layer] = values

            list(threads.map(draw, range(shape[0])))
            arrays[name] = jax.block_until_ready(
                jax.device_put(host.reshape(info.shape), None if shardings is None else shardings[name])
            )
    return arrays


@cache
def _repeater(
    shape: tuple[int, ...], dtype: jnp.dtype, result: tuple[int, ...], sharding: jax.sharding.Sharding | None
) -> Callable[..., jax.Array]:
    return jax.jit(partial(_repeat, shape=shape, dtype=dtype, result=result), out_shardings=sharding)


def _repeat(
    block: jax.Array, mean: float, std: float, *, shape: tuple[int, ...], dtype: jnp.dtype, result: tuple[int, ...]
) -> jax.Array:
    """Fills [layers, ...] with copies of `block`, every second layer turned around its mean; in the shape `result`."""
    layers, count = shape[0], math.prod(shape[1:])
    copies = -(-count // block.size)
    layer = lax.slice(jnp.broadcast_to(block, (copies, block.size)).reshape(-1), (0,), (count,)).reshape(shape[1:])
    signs = 1 - 2 * (jnp.arange(layers) % 2).reshape(-1, *[1] * (len(shape) - 1))
    return (layer * signs * std + mean).astype(dtype).reshape(result)
