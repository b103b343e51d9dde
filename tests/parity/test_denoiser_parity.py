"""The denoiser against diffusers' WanTransformer3DModel in float32, weights copied through the real name table."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from flax import nnx

from wan_jax.checkpoint.tables.denoiser import denoiser_table
from wan_jax.config import DenoiserConfig
from wan_jax.models.denoiser import Denoiser
from wan_jax.parameters import with_parameters

# Awkward on purpose: few dimensions are equal, and none is a multiple of 8.
THREE_HEADS = DenoiserConfig(
    num_layers=3,
    dim=60,  # head_dim 20: 4, 3, 3 rotary pairs
    num_heads=3,
    ffn_dim=52,
    in_channels=5,
    out_channels=4,
    text_dim=24,
    text_length=11,
    freq_dim=34,
)
WIDE_HEADS = dataclasses.replace(THREE_HEADS, num_layers=2, dim=52, num_heads=2)  # head_dim 26: 5, 4, 4 pairs
UNEVEN_PATCH = dataclasses.replace(THREE_HEADS, num_layers=1, dim=28, num_heads=2, patch_size=(2, 1, 3))

CASES = {
    "three_heads": (THREE_HEADS, (3, 4, 6)),  # latent frames, height, width
    "wide_heads": (WIDE_HEADS, (5, 10, 6)),
    "one_frame": (WIDE_HEADS, (1, 2, 8)),
    "uneven_patch": (UNEVEN_PATCH, (4, 5, 9)),
    "larger_epsilon": (dataclasses.replace(THREE_HEADS, eps=1e-2), (1, 4, 2)),
}

# The original takes the last 512 rows of what it attends to for the text.
IMAGE_TOKENS = 5
WITH_IMAGE = dataclasses.replace(WIDE_HEADS, in_channels=12, image_dim=22, text_length=512)
WITH_TWO_IMAGES = dataclasses.replace(WITH_IMAGE, image_position_length=2 * IMAGE_TOKENS)

# Float32 roundings leave 3e-7. At large timesteps the original's float32 sinusoid, off by 3e-5 radians at t = 937,
# adds 4e-6 to 7e-6; ours follows the official float64 one.
TOLERANCES = {(1.0, 2.0): 1e-6, (937.0, 12.0): 2e-5}


def random_original(config: DenoiserConfig) -> WanTransformer3DModel:
    """An original in which every parameter is random, norms and modulation included."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=config.patch_size,
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
        eps=config.eps,
        image_dim=config.image_dim,
        added_kv_proj_dim=None if config.image_dim is None else config.dim,
        pos_embed_seq_len=config.image_position_length,
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            if name.endswith(("scale_shift_table", "bias", "pos_embed")):
                parameter.copy_(0.3 * noise)
            elif "norm" in name:
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return model


def ported(model: WanTransformer3DModel, config: DenoiserConfig) -> Denoiser:
    """Our denoiser with the original's weights."""
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    parameters = {}
    for mapping in denoiser_table(config):
        if mapping.per_layer:
            layers = [mapping.at(layer) for layer in range(config.num_layers)]
            parameters[mapping.stacked_name] = np.stack(
                [layer.from_torch(tensors.pop(layer.names.diffusers)) for layer in layers]
            )
        else:
            parameters[mapping.name] = mapping.from_torch(tensors.pop(mapping.names.diffusers))
    assert not tensors
    arrays = {name: jnp.asarray(array) for name, array in parameters.items()}
    return with_parameters(lambda: Denoiser(config, dtype=jnp.float32, rngs=nnx.Rngs(0)), arrays)


def velocities(config, sizes, timesteps, images: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The original's and our velocity for the same random latents, text, whose last rows are zeros, and images."""
    generator = np.random.default_rng(1)
    latents = generator.normal(size=(2, config.in_channels, *sizes)).astype(np.float32)
    text = generator.normal(size=(2, config.text_length, config.text_dim)).astype(np.float32)
    text[0, 7:] = text[1, 3:] = 0
    timesteps = np.float32(timesteps)
    features = image = None
    if images:  # the original takes each image apart; we take all tokens of a video together
        features = generator.normal(size=(2 * images, IMAGE_TOKENS, config.image_dim)).astype(np.float32)
        image = jnp.asarray(features.reshape(2, images * IMAGE_TOKENS, config.image_dim))

    original = random_original(config)
    with torch.no_grad():
        inputs = [None if x is None else torch.tensor(x) for x in (latents, timesteps, text, features)]
        theirs = original(*inputs).sample.numpy()

    @jax.jit
    def forward(denoiser, latents, timesteps, text, image):
        return denoiser(latents, timesteps, denoiser.encode_context(text, image))

    ours = forward(ported(original, config), jnp.asarray(latents), jnp.asarray(timesteps), jnp.asarray(text), image)
    return theirs, np.asarray(ours)


def relative_error(ours, theirs) -> float:
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


@pytest.mark.parametrize("timesteps", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_velocity(name, timesteps, capsys):
    config, sizes = CASES[name]
    theirs, ours = velocities(config, sizes, timesteps)
    assert ours.shape == theirs.shape
    error = relative_error(ours, theirs)
    with capsys.disabled():
        print(f"\ndenoiser, {name}, timesteps {timesteps}: relative error {error:.1e}")
    assert error < TOLERANCES[timesteps]


def test_velocity_with_a_timestep_for_each_token():
    """As TI2V-5B needs it."""
    tokens = 3 * 2 * 3
    timesteps = np.stack([np.linspace(0, 900, tokens), np.full(tokens, 250.5)])
    theirs, ours = velocities(THREE_HEADS, (3, 4, 6), timesteps)
    assert relative_error(ours, theirs) < 2e-5  # as above


@pytest.mark.parametrize(("config", "images"), [(WITH_IMAGE, 1), (WITH_TWO_IMAGES, 2)], ids=["i2v", "flf2v"])
def test_velocity_with_images(config, images):
    """Wan2.1's image to video: attention to images beside the text, more channels in than out."""
    theirs, ours = velocities(config, (3, 4, 6), (1.0, 2.0), images)
    assert relative_error(ours, theirs) < 1e-6  # as above
