import jax.numpy as jnp
import numpy as np
import pytest

from wan_jax.diffusion.guidance import classifier_free_guidance, guidance_by_expert
from wan_jax.errors import InputError

pytestmark = pytest.mark.quick


def test_guide():
    conditional, unconditional = np.float32([1.0, -2.0]), np.float32([0.5, 3.0])
    np.testing.assert_array_equal(classifier_free_guidance(conditional, unconditional, np.float32(4.0)), [2.5, -17.0])
    np.testing.assert_array_equal(classifier_free_guidance(conditional, unconditional, np.float32(0.0)), unconditional)


def test_guide_is_float32():
    """bfloat16 arithmetic would lose the difference of nearly equal velocities times the scale."""
    conditional, unconditional = jnp.bfloat16(1.0078125), jnp.bfloat16(1.0)
    result = classifier_free_guidance(conditional, unconditional, np.float32(3.0))
    assert result.dtype == jnp.float32
    assert result == 1.0234375


def test_the_low_noise_scale_comes_first():
    assert guidance_by_expert((3.0, 4.0), ("high_noise", "low_noise")) == {"high_noise": 4.0, "low_noise": 3.0}
    assert guidance_by_expert(3.5, ("high_noise", "low_noise")) == {"high_noise": 3.5, "low_noise": 3.5}
    assert guidance_by_expert((5.0, 5.0), ("denoiser",)) == {"denoiser": 5.0}


@pytest.mark.parametrize(
    ("guidance", "experts", "message"),
    [
        (float("nan"), ("denoiser",), "not finite"),
        ((3.0, float("inf")), ("high_noise", "low_noise"), "not finite"),
        ((3.0, 4.0), ("denoiser",), "the model has one"),
    ],
)
def test_bad_input(guidance, experts, message):
    with pytest.raises(InputError, match=message):
        guidance_by_expert(guidance, experts)
