"""The vision tower of CLIP (a ViT): an image -> features of its patches, which Wan2.1's image to video attends to.

After Radford et al. 2021 (arXiv:2103.00020) and the official wan/modules/clip.py. Wan reads the hidden states before
the last block, without a norm; the last block and the norm after it are kept so that checkpoints stay whole.
"""

from functools import partial
from typing import Unpack

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike

from wan_jax.config import ImageEncoderConfig
from wan_jax.kernels.attention import attention
from wan_jax.kernels.precision import gelu_erf
from wan_jax.models.nn.linear import FeedForward, Linear, Options
from wan_jax.models.nn.norms import LayerNorm
from wan_jax.models.nn.stacked_layers import scan_layers, stack_layers
from wan_jax.runtime.compiled import CompiledFunction

CHANNELS = 3


class ImageEncoder(nnx.Module):
    """Normalised pixels to hidden states; layers are scanned over stacked parameters."""

    def __init__(
        self, config: ImageEncoderConfig, *, dtype: DTypeLike, param_dtype: DTypeLike | None = None, rngs: nnx.Rngs
    ):
        param_dtype = dtype if param_dtype is None else param_dtype
        options = Options(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        dim, patch_features = config.dim, CHANNELS * config.patch_size**2
        self.patch_embedding = Linear(patch_features, dim, axes=(None, "embed"), use_bias=False, **options)
        self.class_embedding = nnx.Param(jax.random.normal(rngs.params(), (dim,), param_dtype), axes=("embed",))
        positions = jax.random.normal(rngs.params(), (config.num_tokens, dim), param_dtype) * dim**-0.5
        self.position_embedding = nnx.Param(positions, axes=(None, "embed"))
        self.input_norm = LayerNorm(dim, axis="embed", eps=config.eps, **options)
        self.blocks = stack_layers(Block, config.num_layers, config, **options)
        self.output_norm = LayerNorm(dim, axis="embed", eps=config.eps, **options)
        self.config = config

    def __call__(self, images: jax.Array) -> jax.Array:
        """Encodes images.

        Args:
          images: [B, image_size, image_size, 3] float32, RGB in [0, 1] less CLIP's mean, over its deviation.

        Returns:
          [B, num_tokens, dim] float32: one token for the whole image, then its patches row by row.

        Raises:
          ValueError: another shape.
        """
        size, patch = self.config.image_size, self.config.patch_size
        if images.ndim != 4 or images.shape[1:] != (size, size, CHANNELS):
            raise ValueError(f"images have shape {images.shape}; the image encoder needs [B, {size}, {size}, 3]")
        patches = rearrange(images, "b (h ph) (w pw) c -> b (h w) (c ph pw)", ph=patch, pw=patch)
        patches = self.patch_embedding(patches).astype(jnp.float32)
        whole = jnp.broadcast_to(self.class_embedding[...].astype(jnp.float32), (len(images), 1, self.config.dim))
        x = jnp.concatenate([whole, patches], axis=1) + self.position_embedding[...].astype(jnp.float32)

        def layer(carry: tuple[jax.Array, jax.Array], block: Block, _: None) -> tuple:
            x = carry[0]
            return (block(x), x), None

        x = self.input_norm(x)
        (_, before_the_last), _ = scan_layers(layer, (x, x), self.blocks)
        return before_the_last


class Block(nnx.Module):
    """Pre-norm self-attention, then a pre-norm feed-forward network. The residual stream is float32."""

    def __init__(self, config: ImageEncoderConfig, **options: Unpack[Options]):
        self.attention_norm = LayerNorm(config.dim, axis="embed", eps=config.eps, **options)
        self.attention = SelfAttention(config, **options)
        self.feed_forward_norm = LayerNorm(config.dim, axis="embed", eps=config.eps, **options)
        self.feed_forward = FeedForward(config.dim, config.ffn_dim, gelu_erf, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, dim] -> [B, T, dim], float32."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.feed_forward_norm(x))


class SelfAttention(nnx.Module):
    """Every token attends to every token; positions are in the embeddings."""

    def __init__(self, config: ImageEncoderConfig, **options: Unpack[Options]):
        linear = partial(Linear, config.dim, config.dim, **options)
        self.query = linear(axes=("embed", "heads"))
        self.key = linear(axes=("embed", "heads"))
        self.value = linear(axes=("embed", "heads"))
        self.output = linear(axes=("heads", "embed"))
        self.num_heads = config.num_heads

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, dim] -> [B, T, dim]."""
        query, key, value = (
            rearrange(projection(x), "b t (h d) -> b t h d", h=self.num_heads)
            for projection in (self.query, self.key, self.value)
        )
        return self.output(rearrange(attention(query, key, value), "b t h d -> b t (h d)"))


def _encode_image(encoder: ImageEncoder, images: jax.Array) -> jax.Array:
    return encoder(images)


encode_image = CompiledFunction(_encode_image)
