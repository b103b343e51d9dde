"""Linear layers, and low-rank changes of them (LoRA)."""

from collections.abc import Callable
from typing import TypedDict, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from wan_jax.kernels.precision import rounded
from wan_jax.models.nn.weights import Dense, Weight, dot
from wan_jax.parallel import collectives


class Options(TypedDict, total=False):
    """What every layer is told besides its sizes."""

    dtype: DTypeLike  # of the computation
    param_dtype: DTypeLike  # of the stored parameters
    rngs: nnx.Rngs


class Adapter(nnx.Module):
    """A low-rank change of a Linear's kernel: kernel + (down * scale) @ up (LoRA, arXiv 2106.09685).

    The kernel itself stays as it is. Several LoRAs of one kernel stand side by side along the rank; columns of zeros
    change nothing.

    Args:
      down: [in_features, rank].
      up: [rank, out_features].
      scale: [rank] float32: strength * alpha / rank of the LoRA that a column belongs to.
      axes: the kernel's logical axes.
      merge: True adds the change to the kernel in float32 and rounds the sum once, as a merged checkpoint has it; its
        cost does not depend on the number of tokens. False (for training) computes the change of the product,
        ((x @ down) * scale) @ up, whose gradient needs no array of the kernel's size.
    """

    def __init__(
        self,
        down: jax.Array,
        up: jax.Array,
        scale: jax.Array,
        *,
        axes: tuple[str | None, str | None],
        merge: bool = True,
    ):
        self.down = nnx.LoRAParam(down, axes=(axes[0], None))
        self.up = nnx.LoRAParam(up, axes=(None, axes[1]))
        self.scale = nnx.Variable(scale, axes=(None,))
        self.merge = merge

    def merged(self, kernel: jax.Array) -> jax.Array:
        """The changed kernel, [in_features, out_features] in the kernel's dtype."""
        change = dot(self.down[...].astype(jnp.float32) * self.scale[...], self.up[...])
        return rounded(kernel.astype(jnp.float32) + change, kernel.dtype).astype(kernel.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The change of x @ kernel: [..., in_features] -> [..., out_features] in x's dtype."""
        low = dot(x, self.down[...], jnp.float32) * self.scale[...]
        return dot(low.astype(x.dtype), self.up[...])


class Linear(nnx.Module):
    """y = x @ kernel + bias in `dtype`, for a kernel in any format of `weights`.

    In bfloat16 the product accumulates in float32 and is rounded once; on GPUs XLA folds the bias into the same
    epilogue, as PyTorch's linear does. `adapter` is None unless `lora.adapters.adapt` sets one.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        axes: tuple[str | None, str | None],
        use_bias: bool = True,
        **options: Unpack[Options],
    ):
        dtype, param_dtype, rngs = options["dtype"], options["param_dtype"], options["rngs"]
        kernel = jax.random.normal(rngs.params(), (in_features, out_features), param_dtype) * in_features**-0.5
        self.kernel: Weight = Dense(kernel.astype(param_dtype), axes=axes)
        self.bias = nnx.Param(jnp.zeros((out_features,), param_dtype), axes=axes[1:]) if use_bias else None
        self.adapter: Adapter | None = None
        self.contracted_axis = axes[0]
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in_features] -> [..., out_features] in `dtype`."""
        x, adapter = x.astype(self.dtype), self.adapter
        if adapter is None:
            y = self.kernel.dot(x)
        elif adapter.merge:
            y = dot(x, adapter.merged(self.kernel.dense()))
        else:
            y = self.kernel.dot(x) + adapter(x)
        y = collectives.sum_over_contracted(y, self.contracted_axis)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class FeedForward(nnx.Module):
    """Linear, activation, Linear: [..., dim] -> [..., dim]."""

    def __init__(self, dim: int, hidden: int, activation: Callable[[jax.Array], jax.Array], **options: Unpack[Options]):
        self.up = Linear(dim, hidden, axes=("embed", "mlp"), **options)
        self.down = Linear(hidden, dim, axes=("mlp", "embed"), **options)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.activation(self.up(x)))
