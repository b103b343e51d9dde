"""Gradients of the training loss against PyTorch's autograd through diffusers' transformer, in float32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.parity.test_denoiser_parity import THREE_HEADS, ported, random_original, relative_error
from wan_jax.checkpoint.tables.denoiser import denoiser_table
from wan_jax.config import SamplingConfig, WanConfig
from wan_jax.parameters import named_parameters
from wan_jax.training.config import NoiseConfig
from wan_jax.training.denoiser_loss import DenoiserLoss

CONFIG = dataclasses.replace(THREE_HEADS, in_channels=4, num_layers=2)


def test_gradients():
    config = CONFIG
    original = random_original(config).train()
    parameters = {"denoiser": named_parameters(ported(original, config))}
    draw = np.random.default_rng(0).standard_normal
    latents = draw((3, 4, 2, 4, 6)).astype(np.float32)
    text = draw((3, config.text_length, config.text_dim)).astype(np.float32)
    family = WanConfig(denoiser=config, sampling=SamplingConfig(shift=3.0, boundary=None))
    loss = DenoiserLoss(family, ("denoiser",), NoiseConfig(caption_dropout=0.0), jnp.float32, remat="layer")
    keys = jax.random.split(jax.random.key(5), 3)
    frozen = {"empty_text": jnp.zeros(text.shape[1:])}
    batch = {"latents": latents, "text": text}
    (value, _), slopes = jax.jit(jax.value_and_grad(loss, has_aux=True))(parameters, frozen, batch, keys)

    timesteps, noisy, target = what_is_drawn(loss, batch, frozen, keys)
    velocity = original(torch.tensor(noisy), torch.tensor(timesteps), torch.tensor(text)).sample
    theirs = torch.mean((velocity - torch.tensor(target)) ** 2)
    theirs.backward()
    # The float32 sinusoid of the original is off by up to 3e-5 radians (see test_denoiser_parity).
    assert float(value) == pytest.approx(float(theirs.detach()), rel=1e-5)
    expected = {name: tensor.grad.numpy() for name, tensor in original.named_parameters()}
    worst = 0.0
    for mapping in denoiser_table(config):
        layers = [mapping.at(layer) for layer in range(config.num_layers)] if mapping.per_layer else [mapping]
        ours = slopes["denoiser"][mapping.stacked_name]
        for index, layer in enumerate(layers):
            slope = np.asarray(ours[index] if mapping.per_layer else ours)
            worst = max(worst, relative_error(slope, layer.from_torch(expected.pop(layer.names.diffusers))))
    assert not expected
    assert worst < 2e-4


def what_is_drawn(loss, batch, frozen, keys):
    """Timesteps, noisy latents and the target noise - x0, as the loss draws them."""
    seen = {}

    class Recorder:
        def encode_context(self, text):
            return None

        def __call__(self, latents, timesteps, context):
            seen.update(latents=latents, timesteps=timesteps)
            return jnp.zeros_like(latents)

    loss.errors(Recorder(), "denoiser", batch, frozen["empty_text"], keys)
    timesteps, noisy = np.asarray(seen["timesteps"]), np.asarray(seen["latents"], np.float64)
    sigmas = np.asarray(timesteps, np.float64)[:, None, None, None, None] / 1000
    target = (noisy - batch["latents"]) / sigmas  # = noise - x0, since noisy = x0 + sigma (noise - x0)
    return timesteps, noisy.astype(np.float32), target.astype(np.float32)
