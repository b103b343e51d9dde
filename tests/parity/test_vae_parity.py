"""Our VAE against diffusers' AutoencoderKLWan: random weights, float32, CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from flax import nnx

from wan_jax.checkpoint.tables.vae import vae_table
from wan_jax.config import VAEConfig
from wan_jax.models.vae import VAE
from wan_jax.parameters import with_parameters

# Compilation is most of these tests' time.
fast_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def vae_config(z_dim: int, **dimensions) -> VAEConfig:
    return VAEConfig(
        z_dim=z_dim,
        latents_mean=tuple(np.linspace(-0.5, 0.7, z_dim).tolist()),
        latents_std=tuple(np.linspace(0.8, 2.5, z_dim).tolist()),
        **dimensions,
    )


CONFIGS = {
    "as_wan21": vae_config(
        z_dim=4, base_dim=6, dim_mult=(1, 2, 4, 4), num_res_blocks=2, temporal_downsample=(False, True, True)
    ),
    # Upsampling halves 6 channels to 3, never to one: its norm would be its sign, which no tolerance bounds.
    "odd_widths": vae_config(
        z_dim=3, base_dim=6, dim_mult=(1, 1, 1, 1), num_res_blocks=1, temporal_downsample=(True, False, True)
    ),
    "one_halving": vae_config(z_dim=5, base_dim=6, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(True,)),
    # The ratios of its stages' channels, which say how shortcuts mix them, are the released ones.
    "as_wan22": vae_config(
        z_dim=6, base_dim=4, decoder_base_dim=6, dim_mult=(1, 2, 4, 4), num_res_blocks=1, patch_size=2, residual=True
    ),
    # Time is halved first; the last stage's shortcut averages channels; a repeat spans two channels.
    "odd_shortcuts": vae_config(
        z_dim=3,
        base_dim=6,
        decoder_base_dim=4,
        dim_mult=(1, 4, 2),
        num_res_blocks=1,
        temporal_downsample=(True, False),
        patch_size=3,
        residual=True,
    ),
}
BATCH, FRAMES, HEIGHT, WIDTH = 2, 9, 3, 5  # height and width in latents: neither even nor equal


def diffusers_vae(config: VAEConfig) -> AutoencoderKLWan:
    vae = AutoencoderKLWan(
        base_dim=config.base_dim,
        decoder_base_dim=config.decoder_base_dim,
        is_residual=config.residual,
        in_channels=config.image_channels,
        out_channels=config.image_channels,
        patch_size=None if config.patch_size == 1 else config.patch_size,
        z_dim=config.z_dim,
        dim_mult=list(config.dim_mult),
        num_res_blocks=config.num_res_blocks,
        temperal_downsample=list(config.temporal_downsample),
        latents_mean=list(config.latents_mean),
        latents_std=list(config.latents_std),
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("gamma"):
                parameter.copy_(1 + 0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
        vae.decoder.conv_out.weight.mul_(0.1)  # keeps frames inside the [-1, 1] that diffusers clamps to
    return vae.eval()


@functools.cache
def both_vaes(name: str) -> tuple[AutoencoderKLWan, VAE]:
    config = CONFIGS[name]
    original = diffusers_vae(config)
    weights = original.state_dict()
    table = vae_table(config)
    assert {mapping.names.diffusers for mapping in table} == weights.keys()
    arrays = {
        mapping.name: jnp.asarray(mapping.from_torch(weights[mapping.names.diffusers].numpy())) for mapping in table
    }
    return original, with_parameters(lambda: VAE(config, dtype=jnp.float32, rngs=nnx.Rngs(0)), arrays)


def normalisation(config: VAEConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean and the reciprocal of std, formed as diffusers' WanPipeline does."""
    shape = (1, config.z_dim, 1, 1, 1)
    return torch.tensor(config.latents_mean).view(shape), 1.0 / torch.tensor(config.latents_std).view(shape)


def relative_error(actual, expected) -> float:
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


# Float32 sums in another order, through some thirty layers: measured 4e-7 to 1.3e-6.
TOLERANCE = 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_encode(name):
    original, ours = both_vaes(name)
    stride = ours.config.spatial_stride
    generator = np.random.default_rng(0)
    video = generator.uniform(-1, 1, (BATCH, FRAMES, HEIGHT * stride, WIDTH * stride, 3)).astype(np.float32)
    mean, reciprocal_std = normalisation(ours.config)
    with torch.no_grad():
        mode = original.encode(torch.from_numpy(video).permute(0, 4, 1, 2, 3)).latent_dist.mode()
        expected = (mode - mean) * reciprocal_std
    latents = fast_jit(lambda vae, frames: vae.encode(frames))(ours, video)
    assert relative_error(latents, expected) < TOLERANCE


@pytest.mark.parametrize("name", CONFIGS)
def test_decode(name):
    original, ours = both_vaes(name)
    generator = np.random.default_rng(1)
    latents = generator.standard_normal((BATCH, ours.config.z_dim, 4, HEIGHT, WIDTH)).astype(np.float32)
    mean, reciprocal_std = normalisation(ours.config)
    with torch.no_grad():
        expected = original.decode(torch.from_numpy(latents) / reciprocal_std + mean).sample.permute(0, 2, 3, 4, 1)
    assert expected.abs().max() < 1
    frames = fast_jit(lambda vae, latents: vae.decode(latents))(ours, latents)
    assert relative_error(frames, expected) < TOLERANCE
