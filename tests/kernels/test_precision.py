import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from wan_jax.kernels import precision
from wan_jax.models.denoiser import DenoiserBlock
from wan_jax.testing.models import DEMO

pytestmark = pytest.mark.quick


def arithmetic(function, *args) -> set[str]:
    """In which dtypes a function's tanh, powers and products of numbers are computed."""

    def equations(jaxpr):
        for equation in jaxpr.eqns:
            yield equation
            for inner in jaxprs_in_params(equation.params):
                yield from equations(inner)

    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    computed = [e for e in equations(jaxpr) if e.primitive.name in ("tanh", "mul", "integer_pow")]
    return {str(e.outvars[0].aval.dtype) for e in computed}


def test_gelu_is_float32_rounded_once():
    x = jnp.asarray(np.linspace(-6, 6, 4001), jnp.bfloat16)
    x64 = np.asarray(x, np.float64)
    exact = 0.5 * x64 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x64 + 0.044715 * x64**3)))
    # Half a unit in the last of a bfloat16's 8 bits, and what float32 loses in 1 + tanh for negative numbers.
    np.testing.assert_allclose(np.asarray(precision.gelu(x), np.float64), exact, rtol=2**-8, atol=1e-6)


def test_gelu_is_written_for_the_epilogue_where_that_is_asked_for():
    """XLA recognises it in bfloat16 arithmetic only; float32 stays float32."""
    half, single = jnp.ones(8, jnp.bfloat16), jnp.ones(8)
    assert arithmetic(precision.gelu, half) == {"float32"}
    with precision.gelu_in_epilogue(True):
        assert arithmetic(precision.gelu, half) == {"bfloat16"}
        assert arithmetic(precision.gelu, single) == {"float32"}
    assert arithmetic(precision.gelu, half) == {"float32"}


def test_the_feed_forward_layer_asks():
    options = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16, "rngs": nnx.Rngs(0)}
    layer = DenoiserBlock(DEMO.denoiser, **options).feed_forward
    x = jnp.ones((1, 3, DEMO.denoiser.dim), jnp.bfloat16)
    assert "float32" in arithmetic(layer, x)
    with precision.gelu_in_epilogue(True):
        assert arithmetic(layer, x) == {"bfloat16"}
