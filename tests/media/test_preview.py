"""Previews of nano's latents: close to the clip at the size of its latents, the right way up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wan_jax.config import VAEConfig
from wan_jax.media.preview import PreviewFilter, cell_colours, draw_clip, fit_preview


def rms(values):
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


@pytest.fixture(scope="module")
def nano():
    """(encode, config) of the VAE that ships."""
    from wan_jax.assets import NANO_WEIGHTS
    from wan_jax.checkpoint import open_checkpoint
    from wan_jax.models.vae import VAE
    from wan_jax.parameters import with_parameters

    checkpoint = open_checkpoint(NANO_WEIGHTS)
    vae = with_parameters(
        lambda: VAE(checkpoint.config.vae, dtype=jnp.float32, rngs=nnx.Rngs(0)), checkpoint.load("vae", "float32")
    )
    run = jax.jit(lambda vae, frames: vae.encode(frames[None] / 127.5 - 1)[0])
    return lambda frames: np.asarray(run(vae, frames.astype(np.float32))), checkpoint.config.vae


def test_previews_of_nano_are_close_to_the_clip(nano):
    encode, config = nano
    fitted = fit_preview(encode, config)
    assert fitted.residual < 45  # the module's docstring says 43
    rng = np.random.default_rng(5)
    clips = [draw_clip(rng, 9, 96, textured=False) for _ in range(3)]
    previews = np.stack([fitted(encode(clip)) for clip in clips])
    truth = np.stack([cell_colours(clip, config) for clip in clips])
    assert (previews.dtype, previews.shape) == (np.uint8, truth.shape)
    error = rms(previews - truth)
    assert error < 50
    assert error < 0.55 * rms(truth - truth.mean((0, 1, 2, 3)))
    for axis in (2, 3):  # the right way round in height and width
        assert error < 0.9 * rms(np.flip(previews, axis) - truth)


@pytest.mark.quick
def test_a_linear_vae_is_fitted_exactly():
    """Latents that are the colours in other units: the filter gives the colours back."""
    config = VAEConfig()

    def encode(frames):
        return np.moveaxis(cell_colours(frames, config), -1, 0) / 255 * 2 - 1

    fitted = fit_preview(encode, config, clips=4)
    assert fitted.residual < 1
    frames = draw_clip(np.random.default_rng(9), 9, 64, textured=True)
    assert np.abs(fitted(encode(frames)) - cell_colours(frames, config)).max() < 6


@pytest.mark.quick
def test_a_filter_reads_the_cells_around():
    kernel = np.zeros((3, 3, 1, 3), np.float32)
    kernel[0, 2] = 1  # above, to the right
    latents = np.arange(12, dtype=np.float32).reshape(1, 1, 3, 4)
    preview = PreviewFilter(kernel, np.zeros(3, np.float32), 0.0)(latents)
    assert preview[0, :, :, 0].tolist() == [[1, 2, 3, 3], [1, 2, 3, 3], [5, 6, 7, 7]]
