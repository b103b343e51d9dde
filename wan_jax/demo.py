"""A small model with random weights: the whole path, on any machine, with nothing to download.

The structure is that of Wan2.2-T2V-A14B (two experts, UMT5, causal VAE, tokenizer); only the dims are small. Its videos
are coloured noise.
"""

import jax.numpy as jnp
from flax import nnx

from wan_jax.config import DenoiserConfig, SamplingConfig, TextEncoderConfig, VAEConfig, WanConfig
from wan_jax.models.denoiser import Denoiser
from wan_jax.models.parameters import abstract_parameters, random_parameters, with_parameters
from wan_jax.models.text_encoder import TextEncoder
from wan_jax.models.vae import VAE
from wan_jax.pipeline import WanPipeline
from wan_jax.tokenizer import Tokenizer

PROMPT = "a red circle moves right"
DEMO = WanConfig(
    name="demo",
    denoiser=DenoiserConfig(num_layers=2, dim=96, num_heads=4, ffn_dim=256, text_dim=64, freq_dim=64),
    text_encoder=TextEncoderConfig(vocab_size=512, dim=64, num_layers=2, num_heads=4, head_dim=16, ffn_dim=128),
    vae=VAEConfig(base_dim=16, num_res_blocks=1),
    sampling=SamplingConfig(size=(160, 96), frames=17, steps=6),
)


def random_pipeline(
    config: WanConfig, tokenizer: Tokenizer, dtype: str = "bfloat16", *, progress: bool = False
) -> WanPipeline:
    """A pipeline of any size with fixed random weights, made on the device."""

    def model(make, model_config, dtype: str, seed: int):
        def build():
            return make(model_config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))

        return with_parameters(build, random_parameters(abstract_parameters(build), seed, dtype))

    return WanPipeline(
        config,
        tokenizer=tokenizer,
        text_encoder=model(TextEncoder, config.text_encoder, dtype, 1),
        denoisers={name: model(Denoiser, config.denoiser, dtype, 2 + n) for n, name in enumerate(config.experts)},
        vae=model(VAE, config.vae, "float32", 0),
        progress=progress,
    )
