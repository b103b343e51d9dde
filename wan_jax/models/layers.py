"""The few layers that more than one model uses."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from wan_jax.precision import matmul_precision, rounded


class Linear(nnx.Module):
    """y = x @ kernel + bias in `dtype`, whatever the stored dtype.

    In bfloat16 the product accumulates in float32 and is rounded once; on GPUs XLA folds the bias into the same
    epilogue, as PyTorch's linear does.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        axes: tuple[str | None, str | None],
        use_bias: bool = True,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        kernel = jax.random.normal(rngs.params(), (in_features, out_features), param_dtype) * in_features**-0.5
        self.kernel = nnx.Param(kernel.astype(param_dtype), axes=axes)
        self.bias = nnx.Param(jnp.zeros((out_features,), param_dtype), axes=axes[1:]) if use_bias else None
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in_features] -> [..., out_features] in `dtype`."""
        y = jnp.dot(
            x.astype(self.dtype),
            self.kernel[...].astype(self.dtype),
            precision=matmul_precision(self.dtype),
            preferred_element_type=self.dtype,
        )
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis; statistics in float32.

    As in the official code the normalised value is rounded to x's dtype before it meets the scale.
    """

    def __init__(self, features: int, *, axis: str, eps: float, param_dtype: DTypeLike, rngs: nnx.Rngs):
        del rngs
        self.scale = nnx.Param(jnp.ones((features,), param_dtype), axes=(axis,))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., features] -> the same shape and dtype."""
        x32 = x.astype(jnp.float32)
        y = x32 * lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return rounded(y, x.dtype).astype(x.dtype) * self.scale[...].astype(x.dtype)


def stack_layers(make_layer, num_layers: int, rngs: nnx.Rngs):
    """Builds `num_layers` copies of a layer as one module whose parameters have a leading "layers" axis.

    Scan over it with `jax.lax.scan(lambda x, layer: (layer(x), None), x, stacked)`.
    """

    @nnx.split_rngs(splits=num_layers)
    @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: None})
    def make(rngs: nnx.Rngs):
        return make_layer(rngs)

    return make(rngs)
