"""Formats of a Linear's kernel. Adding one is a class with the members of `Weight`.

`Dense` is one floating-point array. `Scaled` has 8-bit values and a scale for each output, half the memory of bfloat16.
"""

from collections.abc import Callable
from functools import partial
from typing import Protocol, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Sharding
from jax.typing import DTypeLike

from wan_jax.kernels.precision import matmul_precision
from wan_jax.runtime.offload import to_device

Model = TypeVar("Model", bound=nnx.Module)
Place = Callable[[tuple[str | None, ...]], Sharding]  # where a parameter of these logical axes is


class Weight(Protocol):
    """What a Linear needs of its kernel [in_features, out_features]; stacked kernels have a leading layers axis."""

    @property
    def axes(self) -> tuple[str | None, str | None]:
        """The logical axes, without "layers"."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def dot(self, x: jax.Array) -> jax.Array:
        """x @ kernel: [..., in_features] -> [..., out_features] in x's dtype, accumulated in float32."""

    def dense(self) -> jax.Array:
        """The kernel as one floating-point array."""


class Dense(nnx.Param):
    """A kernel as it is stored: a parameter of its own name."""

    def dot(self, x: jax.Array) -> jax.Array:
        return dot(x, self[...])

    def dense(self) -> jax.Array:
        return self[...]


class Scaled(nnx.Module):
    """kernel = values * scale, with values in int8 or an 8-bit float and a float32 scale for each output.

    bfloat16 holds every 8-bit value exactly, so the product multiplies the stored values and scales their sums.
    """

    def __init__(self, values: jax.Array, scale: jax.Array, *, axes: tuple[str | None, str | None]):
        self.values = nnx.Param(values, axes=axes)
        self.scale = nnx.Param(scale, axes=axes[1:])
        self.axes = axes

    @classmethod
    def quantize(cls, kernel: Weight, dtype: DTypeLike, place: Place | None = None) -> "Scaled":
        """Rounds to the nearest value, the largest of each output being the dtype's largest.

        `place` says where stacked values and scales go.
        """
        values, scale = _quantized(to_device(kernel.dense()), jnp.dtype(dtype))
        if place is not None:
            inputs, outputs = kernel.axes
            values = jax.device_put(values, place(("layers", inputs, outputs)))
            scale = jax.device_put(scale, place(("layers", outputs)))
        return cls(values, scale, axes=kernel.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def dot(self, x: jax.Array) -> jax.Array:
        sums = dot(x, self.values[...], jnp.float32)
        return (sums * self.scale[...]).astype(x.dtype)

    def dense(self) -> jax.Array:
        return self.values[...].astype(jnp.float32) * self.scale[..., None, :]


def dot(x: jax.Array, kernel: jax.Array, result: DTypeLike | None = None) -> jax.Array:
    """x @ kernel with both in x's dtype; the result is in x's dtype, too, or in `result`."""
    return jnp.dot(
        x,
        kernel.astype(x.dtype),
        precision=matmul_precision(x.dtype),
        preferred_element_type=x.dtype if result is None else result,
    )


@partial(jax.jit, static_argnames="dtype")
def _quantized(dense: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    dense = dense.astype(jnp.float32)
    is_integer = jnp.issubdtype(dtype, jnp.integer)
    largest = float((jnp.iinfo if is_integer else jnp.finfo)(dtype).max)
    peak = jnp.abs(dense).max(axis=-2)
    scale = jnp.where(peak == 0, 1, peak / largest)
    values = dense / scale[..., None, :]
    return (jnp.round(values) if is_integer else values).astype(dtype), scale


def quantize_layers(model: Model, dtype: DTypeLike | None, place: Place | None = None) -> Model:
    """The model with the kernels of its stacked layers in 8 bits, under "....kernel.values" and "....kernel.scale".

    All other arrays are shared. Under `nnx.eval_shape` it makes the abstract model that `with_parameters` needs.
    `place` says where the new arrays go. With dtype None it is the model itself.
    """
    if dtype is None:
        return model
    quantized = nnx.merge(*nnx.split(model))
    blocks: nnx.Module = vars(quantized)["blocks"]
    for _, module in nnx.iter_modules(blocks):
        kernel = vars(module).get("kernel")
        if isinstance(kernel, Dense):
            vars(module)["kernel"] = Scaled.quantize(kernel, dtype, place)
    return quantized
