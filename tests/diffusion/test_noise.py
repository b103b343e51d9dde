"""Initial noise: it depends on the seed alone, and kind "torch" is PyTorch's CPU generator."""

import jax
import numpy as np
import pytest

from wan_jax.diffusion.noise import initial_noise
from wan_jax.errors import InputError

pytestmark = pytest.mark.quick


def test_torch_noise_golden_values():
    """Values recorded from torch.randn on a CPU for the latents of an 81-frame 832x480 video."""
    noise = np.asarray(initial_noise(42, (16, 21, 60, 104), "torch"))
    assert noise.dtype == np.float32
    np.testing.assert_allclose(noise.flat[:4], [1.92691529, 1.48728406, 0.90071720, -2.10552096], rtol=0, atol=1e-6)
    # 2,096,640 values: 2e-3 allows a mean error of 1e-9, a hundredth of the typical rounding error of one value.
    assert noise.sum(dtype=np.float64) == pytest.approx(-579.8837, abs=2e-3)


def test_torch_noise_refuses_tiny_shapes():
    with pytest.raises(InputError, match="at least 16 elements, not 15"):
        initial_noise(0, (3, 5), "torch")


def test_jax_noise_is_jax_random_normal():
    shape = (4, 3, 5, 7)
    expected = jax.random.normal(jax.random.key(7), shape, np.float32)
    np.testing.assert_array_equal(initial_noise(7, shape), expected)


def test_jax_noise_golden_values():
    """A change here changes every video that users made before. Float32 log and sqrt: one unit in the last place."""
    expected = np.array([[1.6226422, 2.0252647], [-0.43359444, -0.07861735]], np.float32)
    np.testing.assert_allclose(initial_noise(0, (2, 2), "jax"), expected, rtol=3e-7, atol=0)


def test_jax_noise_ignores_global_settings_and_mesh():
    shape = (4, 2, 4, 4)
    expected = np.asarray(initial_noise(3, shape))
    with jax.threefry_partitionable(False):
        np.testing.assert_array_equal(initial_noise(3, shape), expected)
    with jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(initial_noise(3, shape), expected)
    with jax.enable_x64(True):
        noise = initial_noise(3, shape)
        assert noise.dtype == np.float32
        np.testing.assert_array_equal(noise, expected)
    with jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))):
        np.testing.assert_array_equal(initial_noise(3, shape), expected)


def test_every_bit_of_the_seed_counts():
    """jax.random.key alone drops the high 32 bits."""
    shape = (2, 1, 4, 4)
    noises = [np.asarray(initial_noise(seed, shape)) for seed in (5, 2**32 + 5, 2**33 + 5, 2**63 + 5)]
    for i, noise in enumerate(noises):
        for other in noises[i + 1 :]:
            assert not np.any(noise == other)


@pytest.mark.parametrize("kind", ["jax", "torch"])
def test_noise_is_standard_normal(kind):
    noise = np.asarray(initial_noise(1, (16, 5, 40, 40), kind)).reshape(16, -1)
    # Standard errors over 128,000 values: mean 0.0028, standard deviation 0.002, correlation of two channels 0.011.
    assert abs(noise.mean()) < 0.012
    assert abs(noise.std() - 1) < 0.01
    correlation = np.corrcoef(noise) - np.eye(16)
    assert np.abs(correlation).max() < 0.06


def test_bad_arguments():
    with pytest.raises(InputError, match="unknown noise kind 'numpy'"):
        initial_noise(0, (4, 4), "numpy")
    for seed in (-1, 2**64):
        with pytest.raises(InputError, match=rf"seed {seed} is out of range"):
            initial_noise(seed, (4, 4))
