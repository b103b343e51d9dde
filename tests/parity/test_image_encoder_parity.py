"""The image encoder against transformers' CLIPVisionModel in float32, weights copied through the real name table."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from tests.parity import originals
from wan_jax.checkpoint.tables.image_encoder import image_encoder_table
from wan_jax.config import ImageEncoderConfig
from wan_jax.models.image_encoder import ImageEncoder
from wan_jax.parameters import with_parameters

SMALL = ImageEncoderConfig(image_size=56, patch_size=14, dim=22, num_layers=3, num_heads=2, ffn_dim=36)
CASES = {
    "small": SMALL,
    "two_layers": dataclasses.replace(SMALL, num_layers=2, dim=39, num_heads=3, image_size=21, patch_size=7),
    "larger_epsilon": dataclasses.replace(SMALL, eps=1e-2),
}


def original(config: ImageEncoderConfig):
    return originals.image_encoder(
        1,
        hidden_size=config.dim,
        intermediate_size=config.ffn_dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
        layer_norm_eps=config.eps,
    )


def ported(model, config: ImageEncoderConfig) -> ImageEncoder:
    # transformers 4 has the prefix, 5 has not.
    tensors = {
        f"vision_model.{name.removeprefix('vision_model.')}": tensor.detach().numpy()
        for name, tensor in model.named_parameters()
    }
    arrays = {}
    for mapping in image_encoder_table(config):
        layers = [mapping.at(layer) for layer in range(config.num_layers)] if mapping.per_layer else [mapping]
        parts = [layer.from_torch(tensors.pop(layer.names.diffusers)) for layer in layers]
        arrays[mapping.stacked_name] = jnp.asarray(np.stack(parts) if mapping.per_layer else parts[0])
    assert not tensors
    return with_parameters(lambda: ImageEncoder(config, dtype=jnp.float32, rngs=nnx.Rngs(0)), arrays)


@pytest.mark.parametrize("name", CASES)
def test_hidden_states_before_the_last_block(name):
    config = CASES[name]
    model = original(config)
    images = np.random.default_rng(0).normal(size=(2, config.image_size, config.image_size, 3)).astype(np.float32)
    with torch.no_grad():
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
        theirs = model(pixels, output_hidden_states=True).hidden_states[-2].numpy()
    ours = jax.jit(lambda encoder, images: encoder(images))(ported(model, config), images)
    assert ours.shape == (2, config.num_tokens, config.dim)
    # Float32 roundings; measured 2e-7.
    assert originals.relative_error(ours, theirs) < 1e-6
