"""A small model with random weights: the whole path, on any machine, with nothing to download.

The structure is that of Wan2.2-T2V-A14B (two experts, UMT5, causal VAE, tokenizer); only the dims are small. Its videos
are coloured noise.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx

from wan_jax import __version__, assets
from wan_jax.checkpoint import convert
from wan_jax.checkpoint.memory import memory_checkpoint
from wan_jax.cli.generate import generate
from wan_jax.cli.options import Options
from wan_jax.config import DenoiserConfig, SamplingConfig, TextEncoderConfig, VAEConfig, WanConfig
from wan_jax.models.denoiser import Denoiser
from wan_jax.models.image_encoder import ImageEncoder
from wan_jax.models.text_encoder import TextEncoder
from wan_jax.models.vae import VAE
from wan_jax.parallel.placement import Placement
from wan_jax.parameters import abstract_parameters, named_parameters, random_parameters, with_parameters
from wan_jax.pipeline import WanPipeline
from wan_jax.presets import get_preset
from wan_jax.runtime.progress import Bars
from wan_jax.testing.tokenizer import train_small_tokenizer
from wan_jax.text.tokenizer import Tokenizer

PROMPT = "a red circle moves right"
CACHE = Path.home() / ".cache" / "wan_jax"
DEMO = WanConfig(
    name="demo",
    denoiser=DenoiserConfig(num_layers=2, dim=96, num_heads=4, ffn_dim=256, text_dim=64, freq_dim=64),
    text_encoder=TextEncoderConfig(vocab_size=512, dim=64, num_layers=2, num_heads=4, head_dim=16, ffn_dim=128),
    vae=VAEConfig(base_dim=16, num_res_blocks=1),
    sampling=SamplingConfig(size=(160, 96), frames=17, steps=6),
)


def random_model(
    make: Callable[..., Any], config: Any, dtype: str, seed: int = 0, spread: Placement | None = None
) -> Any:
    """A Denoiser, TextEncoder, VAE or ImageEncoder (`make`) with fixed random weights, on a mesh if there is one."""

    def build():
        return make(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))

    tree = abstract_parameters(build)
    places = None if spread is None else spread.places(config, tree)
    return with_parameters(build, random_parameters(tree, seed, dtype, places))


def random_pipeline(
    config: WanConfig,
    tokenizer: Tokenizer,
    dtype: str = "bfloat16",
    *,
    vae_dtype: str = "float32",
    spread: Placement | None = None,
    progress: bool = False,
) -> WanPipeline:
    """A pipeline of any size with fixed random weights."""
    clip = config.image_encoder
    by_expert = dict.fromkeys(config.experts) if spread is None else spread.by_expert(config.experts)
    return WanPipeline(
        config,
        tokenizer=tokenizer,
        text_encoder=random_model(TextEncoder, config.text_encoder, dtype, 1, spread),
        denoisers={
            name: random_model(Denoiser, config.denoiser, dtype, 2 + n, by_expert[name])
            for n, name in enumerate(config.experts)
        },
        vae=random_model(VAE, config.vae, vae_dtype, 0, spread),
        image_encoder=None if clip is None else random_model(ImageEncoder, clip, "float32", 4, spread),
        spread=spread,
        progress=progress,
    )


def write_demo(destination: Path, layout: Literal["orbax", "diffusers"], config: WanConfig = DEMO) -> None:
    """Writes the demo model, or another with random weights, as a checkpoint.

    Raises InputError where `destination` exists.
    """
    with tempfile.TemporaryDirectory() as folder:
        train_small_tokenizer([PROMPT], config.text_encoder.vocab_size, Path(folder))
        pipeline = random_pipeline(config, Tokenizer.from_pretrained(folder))
        models = {"text_encoder": pipeline.text_encoder, "vae": pipeline.vae, **pipeline.denoisers}
        if pipeline.image_encoder is not None:
            models["image_encoder"] = pipeline.image_encoder
        components = {name: named_parameters(model) for name, model in models.items()}
        convert(memory_checkpoint(config, components, Path(folder)), destination, to=layout)


def demo_checkpoint(bars: Bars) -> Path:
    """The demo model in our own format, from the cache; it is written there first if need be."""
    path = CACHE / f"demo-{__version__}"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        write_demo(path, "orbax")
    bars.note("no --checkpoint given: this is the demo model; its weights are random and its videos are noise")
    return path


def run_demo(folder: Path) -> Path:
    """From a diffusers tree over our format to a video, with the nano model where its weights are; returns the video.

    Without them it is the demo model, whose tree is written first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config, tree = (
        (get_preset("nano"), assets.NANO_WEIGHTS) if assets.NANO_WEIGHTS.is_dir() else (DEMO, folder / "diffusers")
    )
    kind = "the nano model" if config is not DEMO else "a small model with random weights"
    checkpoint, video = folder / f"{config.name}-orbax", folder / "demo.mp4"
    print(f"1. {kind}, as diffusers publishes models: {tree}", file=sys.stderr)
    if not tree.exists():
        write_demo(tree, "diffusers")
    print(f"2. the same in wan_jax's own format: {checkpoint}", file=sys.stderr)
    if not checkpoint.exists():
        print(convert(tree, checkpoint), file=sys.stderr)
    print(f"3. a video of {PROMPT!r}: {video}", file=sys.stderr)
    width, height = config.sampling.size
    generate(
        Options(
            prompt=PROMPT,
            checkpoint=str(checkpoint),
            size=f"{width}x{height}",
            frames=config.sampling.frames,
            steps=str(config.sampling.steps),
            output=str(video),
        )
    )
    return video
