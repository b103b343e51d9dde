"""How products and roundings are kept as written, whatever the backend would do by itself."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike


def matmul_precision(dtype: DTypeLike) -> lax.Precision | None:
    """float32 means float32: without this, GPUs may use TF32 and TPUs bfloat16 for float32 operands.

    A caller who asks for less by `jax.default_matmul_precision` gets less.
    """
    asked_for = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    if jnp.dtype(dtype) == jnp.float32 and asked_for is None:
        return lax.Precision.HIGHEST
    return None


def rounded(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """float32 values rounded to what `dtype` can hold, still as float32.

    A cast there and back may vanish, because XLA is free to keep excess precision (xla_allow_excess_precision).
    """
    info = jnp.finfo(dtype)
    return lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant)


# While a program is traced `with gelu_in_epilogue(True)`, GELU after a bfloat16 product and its bias becomes part of
# that product: cuBLASLt applies it in float32 to the unrounded sums. Only for programs that NVIDIA GPUs run, compiled
# with xla_flags.CUBLASLT_OPTIONS, and that are not differentiated: elsewhere GELU would be computed, and rounded at
# each operation, in bfloat16.
gelu_in_epilogue = jax.make_user_context(False)


def gelu(x: jax.Array) -> jax.Array:
    """The tanh form, computed in float32 and rounded once."""
    if gelu_in_epilogue.value and x.dtype == jnp.bfloat16:
        return jax.nn.gelu(x, approximate=True)  # the only form in which XLA recognises it
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


def gelu_erf(x: jax.Array) -> jax.Array:
    """GELU as it is defined, not its tanh form, computed in float32 and rounded once."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)
