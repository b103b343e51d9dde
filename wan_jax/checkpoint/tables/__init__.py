"""One table of parameters per model (see mapping.py)."""

import re
from collections.abc import Callable
from typing import Any

from wan_jax.checkpoint.tables import denoiser, image_encoder
from wan_jax.checkpoint.tables.denoiser import denoiser_table, infer_denoiser
from wan_jax.checkpoint.tables.image_encoder import image_encoder_table, infer_image_encoder
from wan_jax.checkpoint.tables.mapping import Naming, ParamMapping, Tensors
from wan_jax.checkpoint.tables.text_encoder import infer_text_encoder, text_encoder_table
from wan_jax.checkpoint.tables.vae import infer_vae, vae_table
from wan_jax.config import DenoiserConfig, ImageEncoderConfig, ModelConfig, TextEncoderConfig, VAEConfig
from wan_jax.errors import located

# By the config's type: the table, the config from the shapes of stored tensors, and regular expressions of tensors that
# published files hold beside the model's own, which are left out on purpose.
_MODELS: dict[type, tuple[Callable[[Any], list[ParamMapping]], Callable[..., Any], tuple[str, ...]]] = {
    DenoiserConfig: (denoiser_table, infer_denoiser, denoiser.IGNORED),
    TextEncoderConfig: (text_encoder_table, infer_text_encoder, ()),
    VAEConfig: (vae_table, infer_vae, ()),
    ImageEncoderConfig: (image_encoder_table, infer_image_encoder, image_encoder.IGNORED),
}


def parameter_table(config: ModelConfig) -> list[ParamMapping]:
    """The table of one model, with LAYER in names that repeat for every layer."""
    return _MODELS[type(config)][0](config)


def expanded_table(config: ModelConfig) -> list[ParamMapping]:
    """Every stored tensor, layer by layer: first those without a layer index, then layer 0's, layer 1's, ..."""
    table = parameter_table(config)
    return [mapping for mapping in table if not mapping.per_layer] + [
        mapping.at(layer) for layer in range(num_layers(config)) for mapping in table if mapping.per_layer
    ]


def num_layers(config: ModelConfig) -> int:
    return 0 if isinstance(config, VAEConfig) else config.num_layers


def max_repeats(config: ModelConfig) -> int:
    """The largest number that the length of its table is in proportion to."""
    return config.num_res_blocks if isinstance(config, VAEConfig) else config.num_layers


def infer_config(model: type, place: str, tensors: Tensors, naming: Naming) -> Any:
    """The config, of type `model`, of stored tensors. Raises InputError where they are no such model's."""
    with located(place):
        return _MODELS[model][1](place, tensors, naming)


def is_ignored(config: ModelConfig, stored_name: str) -> bool:
    """Whether a file may hold this tensor beside the model's own."""
    return any(re.fullmatch(pattern, stored_name) for pattern in _MODELS[type(config)][2])
