"""The UMT5 encoder (T5 v1.1 with a relative position bias in every layer): token ids -> text features.

After Raffel et al. 2020 (arXiv:1910.10683), Chung et al. 2023 (arXiv:2304.09151) and the official
wan/modules/t5.py. In bfloat16 it rounds where the official code rounds.
"""

import math
from functools import partial
from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike

from wan_jax.config import TextEncoderConfig
from wan_jax.kernels.precision import matmul_precision, rounded
from wan_jax.models.nn.linear import Linear, Options
from wan_jax.models.nn.norms import RMSNorm
from wan_jax.models.nn.stacked_layers import scan_layers, stack_layers
from wan_jax.parallel import collectives


class TextEncoder(nnx.Module):
    """Token ids to hidden states; layers are scanned over stacked parameters."""

    def __init__(
        self, config: TextEncoderConfig, *, dtype: DTypeLike, param_dtype: DTypeLike | None = None, rngs: nnx.Rngs
    ):
        options = Options(dtype=dtype, param_dtype=dtype if param_dtype is None else param_dtype, rngs=rngs)
        self.config = config
        self.embedding = Embedding(config, **options)
        self.blocks = stack_layers(Block, config.num_layers, config, **options)
        self.final_norm = RMSNorm(config.dim, axis="embed", eps=config.eps, **options)

    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Encodes a batch of padded prompts.

        Args:
          tokens: [B, T] int32, every id below `config.vocab_size`.
          mask: [B, T] int32 or bool; 0 marks padding, which is never attended.

        Returns:
          [B, T, dim] in the compute dtype; rows of padding are zero, as the denoiser expects.
        """
        mask = mask.astype(bool)
        buckets = relative_position_buckets(tokens.shape[1], self.config.num_buckets, self.config.max_distance)
        x = self.embedding(tokens)
        x, _ = scan_layers(lambda x, block, _: (block(x, mask, buckets), None), x, self.blocks)
        return jnp.where(mask[..., None], self.final_norm(x), 0)


class Embedding(nnx.Module):
    """One row per token id, unscaled."""

    def __init__(self, config: TextEncoderConfig, **options: Unpack[Options]):
        shape = config.vocab_size, config.dim
        table = jax.random.normal(options["rngs"].params(), shape, options["param_dtype"])
        self.table = nnx.Param(table, axes=("vocab", "embed"))
        self.dtype = options["dtype"]

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """[B, T] -> [B, T, dim]."""
        return collectives.look_up(self.table[...], tokens).astype(self.dtype)


class Block(nnx.Module):
    """Pre-norm self-attention, then a pre-norm gated feed-forward network."""

    def __init__(self, config: TextEncoderConfig, **options: Unpack[Options]):
        self.attention_norm = RMSNorm(config.dim, axis="embed", eps=config.eps, **options)
        self.attention = SelfAttention(config, **options)
        self.feed_forward_norm = RMSNorm(config.dim, axis="embed", eps=config.eps, **options)
        self.feed_forward = FeedForward(config, **options)

    def __call__(self, x: jax.Array, mask: jax.Array, buckets: np.ndarray) -> jax.Array:
        """x [B, T, dim], mask [B, T] bool, buckets [T, T] -> [B, T, dim]."""
        x = x + self.attention(self.attention_norm(x), mask, buckets)
        return x + self.feed_forward(self.feed_forward_norm(x))


class SelfAttention(nnx.Module):
    """Bidirectional attention with a bias by relative position and, as in every T5, no scaling of the scores."""

    def __init__(self, config: TextEncoderConfig, **options: Unpack[Options]):
        inner = config.num_heads * config.head_dim
        linear = partial(Linear, use_bias=False, **options)
        self.query = linear(config.dim, inner, axes=("embed", "heads"))
        self.key = linear(config.dim, inner, axes=("embed", "heads"))
        self.value = linear(config.dim, inner, axes=("embed", "heads"))
        self.output = linear(inner, config.dim, axes=("heads", "embed"))
        shape = config.num_buckets, config.num_heads
        bias = jax.random.normal(options["rngs"].params(), shape, options["param_dtype"])
        self.relative_bias = nnx.Param(bias, axes=(None, "heads"))
        self.head_dim = config.head_dim

    def __call__(self, x: jax.Array, mask: jax.Array, buckets: np.ndarray) -> jax.Array:
        """x [B, T, dim], mask [B, T] bool, buckets [T, T] -> [B, T, dim]."""
        query, key, value = (
            rearrange(projection(x), "b t (h d) -> b h t d", d=self.head_dim)
            for projection in (self.query, self.key, self.value)
        )
        precision = matmul_precision(x.dtype)
        scores = jnp.einsum(
            "b h q d, b h k d -> b h q k", query, key, precision=precision, preferred_element_type=jnp.float32
        )
        bias = self.relative_bias[...].T[:, buckets].astype(jnp.float32)  # [H, T, T]
        scores = rounded(rounded(scores, x.dtype) + bias, x.dtype)
        scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(scores.dtype).min)
        probabilities = rounded(jax.nn.softmax(scores, axis=-1), x.dtype).astype(x.dtype)
        attended = jnp.einsum(
            "b h q k, b h k d -> b h q d", probabilities, value, precision=precision, preferred_element_type=x.dtype
        )
        return self.output(rearrange(attended, "b h t d -> b t (h d)"))


class FeedForward(nnx.Module):
    """down(gelu(gate(x)) * up(x))."""

    def __init__(self, config: TextEncoderConfig, **options: Unpack[Options]):
        linear = partial(Linear, use_bias=False, **options)
        self.gate = linear(config.dim, config.ffn_dim, axes=("embed", "mlp"))
        self.up = linear(config.dim, config.ffn_dim, axes=("embed", "mlp"))
        self.down = linear(config.ffn_dim, config.dim, axes=("mlp", "embed"))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, dim] -> [B, T, dim]."""
        return self.down(gelu(self.gate(x)) * self.up(x))


def gelu(x: jax.Array) -> jax.Array:
    """GELU by tanh (Hendrycks and Gimpel 2016), with every intermediate result rounded to x's dtype.

    The official code writes it as separate PyTorch operations, each of which rounds; in float32 this is
    jax.nn.gelu(x, approximate=True).
    """
    dtype = x.dtype
    x = rounded(x.astype(jnp.float32), dtype)
    square = rounded(x * x, dtype)
    cube = rounded(square * x, dtype)  # torch.pow(x, 3) multiplies twice and rounds twice
    inner = rounded(x + rounded(0.044715 * cube, dtype), dtype)
    tanh = rounded(jnp.tanh(rounded(math.sqrt(2 / math.pi) * inner, dtype)), dtype)
    return (rounded(0.5 * x, dtype) * rounded(1 + tanh, dtype)).astype(dtype)


def relative_position_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """The row of the bias table for every pair of positions: [length, length] int32, indexed [query, key].

    Half of the buckets are for keys after the query. In each half, the first half are single distances n and the rest
    grow geometrically up to `max_distance`: exact + floor(steps * log(n / exact) / log(max_distance / exact)).
    """
    half = num_buckets // 2
    exact = half // 2
    steps = half - exact
    distance = np.arange(length)
    bucket = np.minimum(distance, exact)
    for step in range(1, steps):
        # The same bound in whole numbers: logarithms may fall on the wrong side where n / exact is a power of two.
        reached = [n**steps * exact**step >= max_distance**step * exact**steps for n in range(length)]
        bucket += np.array(reached)
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]  # key - query
    return (bucket[np.abs(offset)] + half * (offset > 0)).astype(np.int32)
