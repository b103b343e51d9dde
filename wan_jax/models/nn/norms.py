"""Normalisation over the last axis, with statistics in float32."""

from typing import Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from wan_jax.kernels.precision import rounded
from wan_jax.models.nn.linear import Options
from wan_jax.parallel import collectives


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis; statistics in float32.

    As in the official code the normalised value is rounded to x's dtype before it meets the scale.
    """

    def __init__(self, features: int, *, axis: str, eps: float, **options: Unpack[Options]):
        self.scale = nnx.Param(jnp.ones((features,), options["param_dtype"]), axes=(axis,))
        self.axis = axis
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., features] -> the same shape and dtype."""
        x32 = x.astype(jnp.float32)
        mean_square = collectives.mean_over_shards(jnp.mean(x32 * x32, axis=-1, keepdims=True), self.axis)
        y = x32 * lax.rsqrt(mean_square + self.eps)
        return rounded(y, x.dtype).astype(x.dtype) * self.scale[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation with a learned scale and bias, in float32."""

    def __init__(self, features: int, *, axis: str | None, eps: float, **options: Unpack[Options]):
        self.scale = nnx.Param(jnp.ones((features,), options["param_dtype"]), axes=(axis,))
        self.bias = nnx.Param(jnp.zeros((features,), options["param_dtype"]), axes=(axis,))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return layer_norm(x, self.eps) * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)


def layer_norm(x: jax.Array, eps: float) -> jax.Array:
    """Zero mean and unit variance over the last axis, in float32."""
    x = x.astype(jnp.float32)
    x = x - x.mean(axis=-1, keepdims=True)
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
