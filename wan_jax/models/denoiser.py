"""The diffusion transformer (DiT) of Wan: given noisy latents, a timestep and a text, it predicts the flow velocity.

    latents [B, C, F, h, w] --patchify--> tokens [B, S, dim] --blocks--> --head, unpatchify--> velocity [B, C, F, h, w]

Every block does self-attention over all tokens of the video, cross-attention to the text, and a feed-forward layer. The
timestep enters as a shift, a scale and a gate around self-attention and around the feed-forward layer. Image-to-video
models of Wan2.1 attend to the features of an image, too, beside the text and with the same queries.

Precision follows the official code run with bfloat16 weights: matrix products and attention in `dtype`; the residual
stream, norms, modulation, time embedding and head in float32. Original: Wan-Video/Wan2.2, wan/modules/model.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike

from wan_jax.config import DenoiserConfig
from wan_jax.kernels.attention import AttentionOptions, attention
from wan_jax.kernels.precision import gelu, gelu_erf
from wan_jax.models.nn.linear import FeedForward, Linear, Options
from wan_jax.models.nn.norms import LayerNorm, RMSNorm, layer_norm
from wan_jax.models.nn.rope import apply_rope, rope_tables
from wan_jax.models.nn.stacked_layers import scan_layers, stack_layers
from wan_jax.parallel import sequence, stages

IMAGE_EPS = 1e-5  # of the image embedding's norms


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CrossAttentionKV:
    """The cross-attention's keys and values of a text and an image, for all layers; each expert computes its own."""

    keys: jax.Array  # [layers, B, text_length, heads, head_dim], normalised
    values: jax.Array  # the same shape
    image_keys: jax.Array | None = None  # [layers, B, image tokens, heads, head_dim]; None: no attention to images
    image_values: jax.Array | None = None

    @property
    def batch(self) -> int:
        return self.keys.shape[1]


@dataclass(frozen=True)
class Conditions:
    """What every layer reads besides its input and the context; on a mesh, for this device's tokens."""

    time: jax.Array  # [B, n, dim] float32, n as in `modulate`
    modulation: jax.Array  # [B, n, 6, dim] float32
    rotary: tuple[jax.Array, jax.Array]  # cos, sin [S, 1, head_dim / 2] float32
    tokens: int  # of the whole video
    attend: Callable[..., jax.Array]  # self-attention of query, key and value
    cross_attend: Callable[..., jax.Array]


class Denoiser(nnx.Module):
    """One expert: its parameters for all layers, stacked, and one forward pass.

    Args:
      dtype: of matrix products and attention, bfloat16 or float32.
      param_dtype: in which parameters are stored; `dtype` if None.
      remat: for training, what the backward pass recomputes; see `scan_layers`.
      unroll: for training small models, whether layers are unrolled; see `scan_layers`.
    """

    def __init__(
        self,
        config: DenoiserConfig,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike | None = None,
        remat: str | None = None,
        unroll: bool = False,
        rngs: nnx.Rngs,
    ):
        options = Options(dtype=dtype, param_dtype=dtype if param_dtype is None else param_dtype, rngs=rngs)
        in_float32 = options | Options(dtype=jnp.float32)
        dim, patch_features = config.dim, config.in_channels * math.prod(config.patch_size)
        self.patch_embedding = Linear(patch_features, dim, axes=(None, "embed"), **options)
        self.text_embedding = TimestepEmbedder(config.text_dim, dim, gelu, **options)
        self.time_embedding = TimestepEmbedder(config.freq_dim, dim, jax.nn.silu, **in_float32)
        self.image_embedding = None if config.image_dim is None else ImageEmbedding(config, config.image_dim, **options)
        self.time_projection = Linear(dim, 6 * dim, axes=("embed", None), **in_float32)
        self.blocks = stack_layers(DenoiserBlock, config.num_layers, config, **options)
        self.head = Head(config, **in_float32)
        self.config = config
        self.dtype = dtype
        self.attention = AttentionOptions()
        self.remat = remat
        self.unroll = unroll

    def with_attention(self, attention: AttentionOptions) -> "Denoiser":
        """Returns a model with these attention options that shares this model's parameters."""
        other = nnx.merge(*nnx.split(self))
        other.attention = attention
        return other

    def encode_context(self, text: jax.Array, image: jax.Array | None = None) -> CrossAttentionKV:
        """Projects a text and an image to the keys and values of every layer's cross-attention.

        Args:
          text: [B, text_length, text_dim], the text encoder's output. Rows after the text are zeros. They are needed:
            the model attends to them, as in training.
          image: [B, image tokens, image_dim], the image encoder's output; of two images, the first's tokens come first.
            Only for models whose config has an image_dim.

        Raises:
          ValueError: a wrong shape, or an image missing or unexpected.
        """
        self.check_context_shapes(text, image)
        text = self.text_embedding(text)
        if image is not None and self.image_embedding is not None:
            image = self.image_embedding(image)
        _, context = scan_layers(
            lambda _, layer, __: (None, layer.project_context(text, image)),
            None,
            self.blocks.cross_attention,
            remat=self.remat,
        )
        return context

    def __call__(self, latents: jax.Array, timesteps: jax.Array, context: CrossAttentionKV) -> jax.Array:
        """Predicts the velocity noise - clean of latents = (1 - sigma) clean + sigma noise.

        Args:
          latents: [B, in_channels, F, h, w], float32; F, h, w are multiples of the patch size.
          timesteps: [B] float32, 1000 sigma; or one for each latent frame, [B, F / patch], or for each token, [B, S] in
            the order (F, h, w).
          context: what `encode_context` of this denoiser returned for B texts.

        Returns:
          [B, out_channels, F, h, w], float32.

        Raises:
          ValueError: a shape that does not fit.
        """
        grid = self.check_shapes(latents, timesteps, context)
        conditions = self.embed_conditions(timesteps, grid)
        x = self.embed(latents, grid)
        x = self.run_blocks(x, conditions, context)
        return self.unembed(x, conditions, grid)

    def embed(self, latents: jax.Array, grid: tuple[int, int, int]) -> jax.Array:
        """Latents [B, in_channels, F, h, w] -> tokens [B, S, dim] float32; on a mesh, this device's tokens."""
        # Features of a patch: the channel varies slowest on the way in and fastest on the way out.
        pattern = "b c (f pt) (h ph) (w pw) -> b (f h w) (c pt ph pw)"
        patches = sequence.split_tokens(rearrange(latents, pattern, **self._patch_axes(grid)), axis=1)
        return self.patch_embedding(patches).astype(jnp.float32)

    def embed_conditions(self, timesteps: jax.Array, grid: tuple[int, int, int]) -> "Conditions":
        """Computes what all layers need to know of the timesteps and of the tokens' positions."""
        # Tokens with one timestep share a row: n is 1, the number of frames, or S. `modulate` repeats the rows.
        tokens, timesteps = math.prod(grid), timesteps.reshape(timesteps.shape[0], -1)
        time = self.time_embedding(sinusoidal_embedding(timesteps, self.config.freq_dim))  # [B, n, dim]
        modulation = rearrange(self.time_projection(jax.nn.silu(time)), "b s (six dim) -> b s six dim", six=6)
        if time.shape[1] > 1 and sequence.is_split():
            # A device's tokens begin and end anywhere in a frame.
            places = sequence.split_tokens(jnp.arange(tokens) // (tokens // time.shape[1]), axis=0)
            time, modulation = time[:, places], modulation[:, places]
        rotary = sequence.split_tokens(rope_tables(grid, self.config.head_dim), axis=0)
        make_lists, implementation = self.attention.block_lists, self.attention.implementation
        lists = None if make_lists is None else make_lists(grid)
        attend = partial(sequence.sequence_parallel_attention, tokens=tokens, block_lists=lists)
        attends = (partial(each, implementation=implementation) for each in (attend, attention))
        return Conditions(time, modulation, rotary, tokens, *attends)

    def run_blocks(self, x: jax.Array, conditions: "Conditions", context: CrossAttentionKV) -> jax.Array:
        """Tokens [B, S, dim] through all layers."""

        def run_layers(x: jax.Array, rows: tuple[jax.Array, jax.Array], context: CrossAttentionKV) -> jax.Array:
            return self.run_layers(x, replace(conditions, time=rows[0], modulation=rows[1]), context)

        return stages.run_stages(run_layers, x, (conditions.time, conditions.modulation), context)

    def run_layers(self, x: jax.Array, conditions: "Conditions", context: CrossAttentionKV) -> jax.Array:
        """Tokens [B, S, dim] through the layers that this device has."""

        def layer(x: jax.Array, block: DenoiserBlock, context: CrossAttentionKV) -> tuple[jax.Array, None]:
            return block(x, conditions, context), None

        return scan_layers(layer, x, self.blocks, context, remat=self.remat, unroll=self.unroll)[0]

    def run_stage(
        self, arrived: jax.Array, latents: jax.Array, timesteps: jax.Array, context: CrossAttentionKV
    ) -> tuple[jax.Array, jax.Array]:
        """One tick of a pipeline: each stage takes a video of its own through its layers.

        Args:
          arrived: [1, S, dim] float32, the output of the stage before for this stage's video; unused on the first.
          latents, timesteps, context: as in a call, of this stage's video.

        Returns:
          [1, S, dim], what arrives at this stage for the next tick, and on all stages the last stage's velocity.
        """
        grid = self.check_shapes(latents, timesteps, context)
        conditions = self.embed_conditions(timesteps, grid)
        x = jnp.where(stages.is_first_stage(), self.embed(latents, grid), arrived)
        x = self.run_layers(x, conditions, context)
        return stages.to_next_stage(x), self.unembed(x, conditions, grid)

    def unembed(self, x: jax.Array, conditions: "Conditions", grid: tuple[int, int, int]) -> jax.Array:
        """Tokens [B, S, dim] -> velocity [B, out_channels, F, h, w], float32; on a mesh, of all tokens."""
        velocity = stages.from_last_stage(self.head(x, conditions.time))  # [B, S, pt * ph * pw * out_channels]
        velocity = sequence.join_tokens(velocity, axis=1, tokens=conditions.tokens)
        pattern = "b (f h w) (pt ph pw c) -> b c (f pt) (h ph) (w pw)"
        return rearrange(velocity, pattern, **self._patch_axes(grid))

    def _patch_axes(self, grid: tuple[int, int, int]) -> dict[str, int]:
        return dict(zip(("f", "h", "w", "pt", "ph", "pw"), (*grid, *self.config.patch_size), strict=True))

    def check_context_shapes(self, text: jax.Array, image: jax.Array | None) -> None:
        config = self.config
        needed = f"the denoiser needs [B, {config.text_length}, {config.text_dim}]"
        check(text.shape[1:] == (config.text_length, config.text_dim), f"the text has shape {text.shape}; {needed}")
        if image is None:
            needed = f"[B, image tokens, {config.image_dim}]"
            check(config.image_dim is None, f"this denoiser attends to an image's features; give them, {needed}")
            return
        check(config.image_dim is not None, "this denoiser attends to no image; give the text alone")
        needed = f"[{len(text)}, {config.image_position_length or 'image tokens'}, {config.image_dim}]"
        tokens = image.shape[1] if config.image_position_length is None else config.image_position_length
        fits = image.shape == (len(text), tokens, config.image_dim)
        check(fits, f"the image's features have shape {image.shape}; the denoiser needs {needed}")

    def check_shapes(self, latents: jax.Array, timesteps: jax.Array, context: CrossAttentionKV) -> tuple[int, int, int]:
        """Returns the number of tokens along frames, height and width."""
        channels, patch = self.config.in_channels, self.config.patch_size
        fits = latents.ndim == 5 and latents.shape[1] == channels
        check(fits, f"latents have shape {latents.shape}; the denoiser needs [B, {channels}, F, h, w]")
        batch, _, *sizes = latents.shape
        fits = not any(size % step for size, step in zip(sizes, patch, strict=True))
        check(fits, f"latents of {sizes} (frames, height, width) do not divide into patches of {list(patch)}")
        frames, height, width = (size // step for size, step in zip(sizes, patch, strict=True))
        shapes = (batch,), (batch, frames), (batch, frames * height * width)  # one for each video, frame or token
        check(timesteps.shape in shapes, f"timesteps have shape {timesteps.shape}; give one of {shapes}")
        check(context.batch == batch, f"the context holds {context.batch} texts and there are {batch} latents")
        return frames, height, width


def check(fits: bool, message: str) -> None:
    if not fits:
        raise ValueError(message)


class DenoiserBlock(nnx.Module):
    """One layer of the transformer."""

    def __init__(self, config: DenoiserConfig, **options: Unpack[Options]):
        self.modulation = scale_shift_table(6, config.dim, **options)
        self.self_attention = SelfAttention(config, **options)
        self.cross_attention_norm = LayerNorm(config.dim, axis="embed", eps=config.eps, **options)
        self.cross_attention = CrossAttention(config, **options)
        self.feed_forward = FeedForward(config.dim, config.ffn_dim, gelu, **options)
        self.eps = config.eps

    def __call__(self, x: jax.Array, conditions: Conditions, context: CrossAttentionKV) -> jax.Array:
        """x [B, S, dim] in float32; this layer's part of the context."""
        vectors = modulate(self.modulation, conditions.modulation, x.shape[1])
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = vectors
        y = layer_norm(x, self.eps) * (1 + scale_1) + shift_1
        x = x + gate_1 * self.self_attention(y, conditions)
        x = x + self.cross_attention(self.cross_attention_norm(x), context, conditions.cross_attend)
        y = layer_norm(x, self.eps) * (1 + scale_2) + shift_2
        return x + gate_2 * self.feed_forward(y)


class MultiHeadAttention(nnx.Module):
    """The projections of self- and cross-attention. Query and key are normalised before the split into heads."""

    def __init__(self, config: DenoiserConfig, **options: Unpack[Options]):
        linear = partial(Linear, config.dim, config.dim, **options)
        self.query = linear(axes=("embed", "heads"))
        self.key = linear(axes=("embed", "heads"))
        self.value = linear(axes=("embed", "heads"))
        self.output = linear(axes=("heads", "embed"))
        self.query_norm = RMSNorm(config.dim, axis="heads", eps=config.eps, **options)
        self.key_norm = RMSNorm(config.dim, axis="heads", eps=config.eps, **options)
        self.head_dim = config.head_dim

    def project_query(self, x: jax.Array) -> jax.Array:
        """[B, S, dim] -> [B, S, heads, head_dim]."""
        return self.split_heads(self.query_norm(self.query(x)))

    def project_key_value(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, T, dim] -> two of [B, T, heads, head_dim]."""
        return self.split_heads(self.key_norm(self.key(x))), self.split_heads(self.value(x))

    def split_heads(self, x: jax.Array) -> jax.Array:
        return rearrange(x, "b s (h d) -> b s h d", d=self.head_dim)


class SelfAttention(MultiHeadAttention):
    """Every token of the video attends to every token, at rotary positions."""

    def __call__(self, x: jax.Array, conditions: Conditions) -> jax.Array:
        query, (key, value) = self.project_query(x), self.project_key_value(x)
        query, key = apply_rope(query, conditions.rotary), apply_rope(key, conditions.rotary)
        y = conditions.attend(query, key, value)
        return self.output(rearrange(y, "b s h d -> b s (h d)"))


class CrossAttention(MultiHeadAttention):
    """Every token of the video attends to all rows of the text, padding included, and separately to an image's."""

    def __init__(self, config: DenoiserConfig, **options: Unpack[Options]):
        super().__init__(config, **options)
        self.image = None if config.image_dim is None else ImageKeyValue(config, **options)

    def project_context(self, text: jax.Array, image: jax.Array | None) -> CrossAttentionKV:
        """Keys and values, which do not depend on the video; text and image are [B, T, dim]."""
        context = CrossAttentionKV(*self.project_key_value(text))
        if image is None or self.image is None:
            return context
        keys, values = map(self.split_heads, self.image(image))
        return replace(context, image_keys=keys, image_values=values)

    def __call__(self, x: jax.Array, context: CrossAttentionKV, attend: Callable[..., jax.Array]) -> jax.Array:
        query = self.project_query(x)
        y = attend(query, context.keys, context.values)
        if context.image_keys is not None:
            y = y + attend(query, context.image_keys, context.image_values)
        return self.output(rearrange(y, "b s h d -> b s (h d)"))


class ImageKeyValue(nnx.Module):
    """Keys and values of an image's tokens, which the queries for the text attend to as well."""

    def __init__(self, config: DenoiserConfig, **options: Unpack[Options]):
        self.key = Linear(config.dim, config.dim, axes=("embed", "heads"), **options)
        self.value = Linear(config.dim, config.dim, axes=("embed", "heads"), **options)
        self.key_norm = RMSNorm(config.dim, axis="heads", eps=config.eps, **options)

    def __call__(self, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, T, dim] -> keys, normalised, and values, [B, T, dim] each."""
        return self.key_norm(self.key(image)), self.value(image)


class Head(nnx.Module):
    """Tokens to patches of velocity, all in float32. Its modulation adds to the time embedding itself."""

    def __init__(self, config: DenoiserConfig, **options: Unpack[Options]):
        features = config.out_channels * math.prod(config.patch_size)
        self.modulation = scale_shift_table(2, config.dim, **options)
        self.linear = Linear(config.dim, features, axes=("embed", None), **options)
        self.eps = config.eps

    def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
        """x [B, S, dim], time [B, n, dim] -> [B, S, features]."""
        shift, scale = modulate(self.modulation, time[:, :, None], x.shape[1])
        return self.linear(layer_norm(x, self.eps) * (1 + scale) + shift)


class TimestepEmbedder(nnx.Module):
    """Linear, activation, Linear: brings the text or the timestep to the model's width."""

    def __init__(
        self, in_features: int, dim: int, activation: Callable[[jax.Array], jax.Array], **options: Unpack[Options]
    ):
        self.linear_1 = Linear(in_features, dim, axes=(None, "mlp"), **options)
        self.linear_2 = Linear(dim, dim, axes=("mlp", "embed"), **options)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear_2(self.activation(self.linear_1(x)))


class ImageEmbedding(nnx.Module):
    """An image's features at the model's width: norm, Linear, GELU, Linear, norm. Norms are in float32."""

    def __init__(self, config: DenoiserConfig, image_dim: int, **options: Unpack[Options]):
        length = config.image_position_length
        table = jax.random.normal(options["rngs"].params(), (length or 0, image_dim), options["param_dtype"]) * 0.02
        self.positions = None if length is None else nnx.Param(table, axes=(None, None))
        self.norm_1 = LayerNorm(image_dim, axis=None, eps=IMAGE_EPS, **options)
        self.linear_1 = Linear(image_dim, image_dim, axes=(None, "mlp"), **options)
        self.linear_2 = Linear(image_dim, config.dim, axes=("mlp", "embed"), **options)
        self.norm_2 = LayerNorm(config.dim, axis="embed", eps=IMAGE_EPS, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, image_dim] -> [B, T, dim], float32."""
        if self.positions is not None:
            x = x + self.positions[...].astype(x.dtype)
        return self.norm_2(self.linear_2(gelu_erf(self.linear_1(self.norm_1(x)))))


def scale_shift_table(rows: int, dim: int, **options: Unpack[Options]) -> nnx.Param:
    """What a layer adds to the time embedding to get its shifts, scales and gates."""
    table = jax.random.normal(options["rngs"].params(), (rows, dim), options["param_dtype"]) * dim**-0.5
    return nnx.Param(table, axes=(None, "embed"))


def modulate(table: nnx.Param, time: jax.Array, tokens: int) -> list[jax.Array]:
    """Table (rows, dim) + time [B, n, rows or 1, dim] -> rows arrays [B, 1 or S, dim], in float32.

    n divides the S tokens, in runs of equal length. XLA spreads n to S where the values are used, not in memory.
    """
    rows = list(jnp.unstack(table[...].astype(jnp.float32) + time, axis=2))
    if 1 < time.shape[1] < tokens:
        rows = [jnp.repeat(row, tokens // time.shape[1], axis=1) for row in rows]
    return rows


def sinusoidal_embedding(timesteps: jax.Array, dim: int) -> jax.Array:
    """[...] -> [..., dim] float32: the cosines, then the sines, of timestep * 10000^(-j / (dim / 2)).

    The official code computes this in float64. In float32 the product alone would be off by up to 3e-5 radians, so it
    is made in turns, of which only the fraction matters: whole timesteps times the leading 14 bits of a frequency are
    exact, and what is left is small. The result is within 5e-7 for timesteps up to 6000.
    """
    half = dim // 2
    turns = 10000.0 ** (-np.arange(half) / half) / (2 * np.pi)  # per unit of timestep, float64
    leading = np.round(turns * 2**14) / 2**14
    whole = jnp.floor(timesteps)[..., None]
    exact = whole * np.float32(leading)
    phase = whole * np.float32(turns - leading) + (timesteps[..., None] - whole) * np.float32(turns)
    angle = (exact - jnp.round(exact) + phase) * np.float32(2 * np.pi)
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
