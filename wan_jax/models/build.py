"""Models from their configs."""

from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from wan_jax.config import DenoiserConfig, ImageEncoderConfig, ModelConfig, TextEncoderConfig, VAEConfig
from wan_jax.models.denoiser import Denoiser
from wan_jax.models.image_encoder import ImageEncoder
from wan_jax.models.text_encoder import TextEncoder
from wan_jax.models.vae import VAE
from wan_jax.parameters import ParameterInfo, abstract_parameters

MODELS: dict[type, Any] = {
    DenoiserConfig: Denoiser,
    TextEncoderConfig: TextEncoder,
    VAEConfig: VAE,
    ImageEncoderConfig: ImageEncoder,
}


def build_model(config: ModelConfig, dtype: DTypeLike = jnp.float32) -> Any:
    """The model that `config` describes, initialised; under nnx.eval_shape nothing is allocated."""
    return MODELS[type(config)](config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))


def abstract_model(config: ModelConfig) -> dict[str, ParameterInfo]:
    """The abstract tree of the model that `config` describes (see parameters.py)."""
    return abstract_parameters(partial(build_model, config))
