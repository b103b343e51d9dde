"""A first frame that is given, with a timestep of its own, on meshes that split tokens, layers and batches."""

from functools import partial

import jax.numpy as jnp
import numpy as np

from tests.parallel import test_strategies
from tests.parallel.test_strategies import CONFIG, LATENTS, run
from wan_jax.diffusion.conditioning import FirstFrame
from wan_jax.diffusion.loop import denoise


def test_first_frame(monkeypatch):
    channels, _, height, width = LATENTS
    frame = np.random.default_rng(3).standard_normal((1, channels, 1, height, width)).astype(np.float32)
    conditioning = FirstFrame(jnp.asarray(frame), jnp.ones(1, bool))
    monkeypatch.setattr(test_strategies, "denoise", partial(denoise, conditioning=conditioning))
    alone = run(CONFIG, "single")
    np.testing.assert_array_equal(alone[:, :, :1], np.broadcast_to(frame, alone[:, :, :1].shape))
    for strategy in ("data2-ring2", "pipeline2-ulysses2"):
        # As for all strategies: float32 sums in another order.
        assert np.abs(run(CONFIG, strategy) - alone).max() < 1e-5 * np.abs(alone).max()
