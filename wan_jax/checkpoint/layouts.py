"""One table per model: where each parameter of ours lives in the official and in the diffusers layout.

Import, export, inference of dimensions and the tests' fixtures all derive from these rows. The values never change
between layouts; a `Row.pattern` (einops) says how the axes of the PyTorch tensor are rearranged into ours. Both
PyTorch layouts keep the same shapes, so one pattern serves both.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import einops
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wan_jax.checkpoint.tensors import Box
from wan_jax.checkpoint.vae_names import vae_entries
from wan_jax.config import DenoiserConfig, ImageEncoderConfig, TextEncoderConfig, VAEConfig, WanConfig
from wan_jax.parameters import ParameterInfo, abstract_parameters

Naming = Literal["ours", "official", "diffusers"]
ModelConfig = DenoiserConfig | TextEncoderConfig | VAEConfig | ImageEncoderConfig

# How a PyTorch tensor becomes ours. Sizes come from `Row.shape`.
VECTOR = "n -> n"
TABLE = "row column -> row column"
LINEAR = "o i -> i o"
CONV3D = "o i t h w -> t h w i o"
CONV2D = "o i h w -> h w i o"
CONV2D_AS_LINEAR = "o i 1 1 -> i o"
PATCH_EMBEDDING = "o c t h w -> (c t h w) o"
IMAGE_PATCH_EMBEDDING = "o c h w -> (c h w) o"
MODULATION = "1 m n -> m n"
GAMMA_3D = "n 1 1 1 -> n"
GAMMA_2D = "n 1 1 -> n"

LAYER = "{layer}"  # stands for the layer's index in names of per-layer rows


@dataclass(frozen=True)
class Row:
    """One tensor: its name in every layout, its PyTorch shape, and how its axes become ours."""

    ours: str
    official: str
    diffusers: str
    pattern: str
    shape: tuple[int, ...]

    @property
    def per_layer(self) -> bool:
        return LAYER in self.ours

    @property
    def stacked_name(self) -> str:
        """The name in the model's abstract tree, where layers are stacked."""
        return self.ours.replace(f"{LAYER}.", "")

    @property
    def our_shape(self) -> tuple[int, ...]:
        """The shape of one layer's parameter in our layout."""
        # A zero-strided view: the rearrangement costs no memory whatever the size.
        return self.to_ours(np.broadcast_to(np.int8(0), self.shape)).shape if self.size else ()

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def at(self, layer: int) -> "Row":
        """The row of one layer, with its index in all three names."""
        ours, official, diffusers = (
            name.replace(LAYER, str(layer)) for name in (self.ours, self.official, self.diffusers)
        )
        return replace(self, ours=ours, official=official, diffusers=diffusers)

    def name(self, naming: Naming) -> str:
        return {"ours": self.ours, "official": self.official, "diffusers": self.diffusers}[naming]

    def stored_shape(self, naming: Naming) -> tuple[int, ...]:
        return self.our_shape if naming == "ours" else self.shape

    def to_ours(self, tensor: np.ndarray) -> np.ndarray:
        """PyTorch tensor of `shape` -> our parameter; a view where possible."""
        return einops.rearrange(tensor, self.pattern)

    def stored_box(self, box: Box, naming: Naming) -> Box | None:
        """The part of the stored tensor that is a part of our parameter; None where that is no box."""
        if naming == "ours":
            return box
        source, target = (axes.split() for axes in self.pattern.split(" -> "))
        if any("(" in axis for axis in target):
            return None
        ours = dict(zip(target, box, strict=True))
        return tuple(ours.get(axis, slice(0, size)) for axis, size in zip(source, self.shape, strict=True))

    def from_ours(self, parameter: np.ndarray) -> np.ndarray:
        """The exact inverse of `to_ours`."""
        source, target = self.pattern.split(" -> ")
        sizes = {axis: size for axis, size in zip(source.split(), self.shape, strict=True) if axis != "1"}
        return einops.rearrange(parameter, f"{target} -> {source}", **sizes)


def _linear(ours: str, official: str, diffusers: str, in_features: int, out_features: int) -> list[Row]:
    return [
        Row(f"{ours}.kernel", f"{official}.weight", f"{diffusers}.weight", LINEAR, (out_features, in_features)),
        Row(f"{ours}.bias", f"{official}.bias", f"{diffusers}.bias", VECTOR, (out_features,)),
    ]


def _layer_norm(ours: str, official: str, diffusers: str, features: int) -> list[Row]:
    return [
        Row(f"{ours}.scale", f"{official}.weight", f"{diffusers}.weight", VECTOR, (features,)),
        Row(f"{ours}.bias", f"{official}.bias", f"{diffusers}.bias", VECTOR, (features,)),
    ]


def denoiser_rows(config: DenoiserConfig) -> list[Row]:
    """The diffusion transformer. Beware: official norm3 is the cross-attention norm, which diffusers calls norm2."""
    dim, ffn_dim = config.dim, config.ffn_dim
    patch = math.prod(config.patch_size)
    rows = [
        Row(
            "patch_embedding.kernel",
            "patch_embedding.weight",
            "patch_embedding.weight",
            PATCH_EMBEDDING,
            (dim, config.in_channels, *config.patch_size),
        ),
        Row("patch_embedding.bias", "patch_embedding.bias", "patch_embedding.bias", VECTOR, (dim,)),
        *_linear(
            "text_embedding.linear_1",
            "text_embedding.0",
            "condition_embedder.text_embedder.linear_1",
            config.text_dim,
            dim,
        ),
        *_linear("text_embedding.linear_2", "text_embedding.2", "condition_embedder.text_embedder.linear_2", dim, dim),
        *_linear(
            "time_embedding.linear_1",
            "time_embedding.0",
            "condition_embedder.time_embedder.linear_1",
            config.freq_dim,
            dim,
        ),
        *_linear("time_embedding.linear_2", "time_embedding.2", "condition_embedder.time_embedder.linear_2", dim, dim),
        *_linear("time_projection", "time_projection.1", "condition_embedder.time_proj", dim, 6 * dim),
        Row(
            "blocks.{layer}.modulation",
            "blocks.{layer}.modulation",
            "blocks.{layer}.scale_shift_table",
            MODULATION,
            (1, 6, dim),
        ),
    ]
    for ours, official, diffusers in (
        ("self_attention", "self_attn", "attn1"),
        ("cross_attention", "cross_attn", "attn2"),
    ):
        ours, official, diffusers = (f"blocks.{LAYER}.{name}" for name in (ours, official, diffusers))
        rows += [
            *_linear(f"{ours}.query", f"{official}.q", f"{diffusers}.to_q", dim, dim),
            *_linear(f"{ours}.key", f"{official}.k", f"{diffusers}.to_k", dim, dim),
            *_linear(f"{ours}.value", f"{official}.v", f"{diffusers}.to_v", dim, dim),
            *_linear(f"{ours}.output", f"{official}.o", f"{diffusers}.to_out.0", dim, dim),
            Row(f"{ours}.query_norm.scale", f"{official}.norm_q.weight", f"{diffusers}.norm_q.weight", VECTOR, (dim,)),
            Row(f"{ours}.key_norm.scale", f"{official}.norm_k.weight", f"{diffusers}.norm_k.weight", VECTOR, (dim,)),
        ]
    block = f"blocks.{LAYER}"
    return [
        *rows,
        *_image_rows(config),
        *_layer_norm(f"{block}.cross_attention_norm", f"{block}.norm3", f"{block}.norm2", dim),
        *_linear(f"{block}.feed_forward.up", f"{block}.ffn.0", f"{block}.ffn.net.0.proj", dim, ffn_dim),
        *_linear(f"{block}.feed_forward.down", f"{block}.ffn.2", f"{block}.ffn.net.2", ffn_dim, dim),
        Row("head.modulation", "head.modulation", "scale_shift_table", MODULATION, (1, 2, dim)),
        *_linear("head.linear", "head.head", "proj_out", dim, patch * config.out_channels),
    ]


def _image_rows(config: DenoiserConfig) -> list[Row]:
    """What Wan2.1's image-to-video denoisers have in addition."""
    dim, image_dim, length = config.dim, config.image_dim, config.image_position_length
    if image_dim is None:
        return []
    ours, official, diffusers = "image_embedding", "img_emb", "condition_embedder.image_embedder"
    rows = [
        *_layer_norm(f"{ours}.norm_1", f"{official}.proj.0", f"{diffusers}.norm1", image_dim),
        *_linear(f"{ours}.linear_1", f"{official}.proj.1", f"{diffusers}.ff.net.0.proj", image_dim, image_dim),
        *_linear(f"{ours}.linear_2", f"{official}.proj.3", f"{diffusers}.ff.net.2", image_dim, dim),
        *_layer_norm(f"{ours}.norm_2", f"{official}.proj.4", f"{diffusers}.norm2", dim),
    ]
    if length is not None:
        shape = (1, length, image_dim)
        rows.append(Row(f"{ours}.positions", f"{official}.emb_pos", f"{diffusers}.pos_embed", MODULATION, shape))
    ours, official, diffusers = (f"blocks.{LAYER}.{name}" for name in ("cross_attention.image", "cross_attn", "attn2"))
    norm = (f"{ours}.key_norm.scale", f"{official}.norm_k_img.weight", f"{diffusers}.norm_added_k.weight")
    return [
        *rows,
        *_linear(f"{ours}.key", f"{official}.k_img", f"{diffusers}.add_k_proj", dim, dim),
        *_linear(f"{ours}.value", f"{official}.v_img", f"{diffusers}.add_v_proj", dim, dim),
        Row(*norm, VECTOR, (dim,)),
    ]


def text_encoder_rows(config: TextEncoderConfig) -> list[Row]:
    """UMT5. The relative position bias is one table per layer, unlike T5's."""
    dim, inner, ffn_dim = config.dim, config.num_heads * config.head_dim, config.ffn_dim
    attention = (f"blocks.{LAYER}.attention", f"blocks.{LAYER}.attn", f"encoder.block.{LAYER}.layer.0.SelfAttention")
    feed_forward = (
        f"blocks.{LAYER}.feed_forward",
        f"blocks.{LAYER}.ffn",
        f"encoder.block.{LAYER}.layer.1.DenseReluDense",
    )

    def kernel(module: tuple[str, str, str], ours: str, official: str, diffusers: str, shape: tuple[int, int]) -> Row:
        return Row(
            f"{module[0]}.{ours}.kernel",
            f"{module[1]}.{official}.weight",
            f"{module[2]}.{diffusers}.weight",
            LINEAR,
            shape,
        )

    def norm(ours: str, official: str, diffusers: str) -> Row:
        return Row(f"{ours}.scale", f"{official}.weight", f"{diffusers}.weight", VECTOR, (dim,))

    return [
        Row("embedding.table", "token_embedding.weight", "shared.weight", TABLE, (config.vocab_size, dim)),
        norm(f"blocks.{LAYER}.attention_norm", f"blocks.{LAYER}.norm1", f"encoder.block.{LAYER}.layer.0.layer_norm"),
        kernel(attention, "query", "q", "q", (inner, dim)),
        kernel(attention, "key", "k", "k", (inner, dim)),
        kernel(attention, "value", "v", "v", (inner, dim)),
        kernel(attention, "output", "o", "o", (dim, inner)),
        Row(
            f"{attention[0]}.relative_bias",
            f"blocks.{LAYER}.pos_embedding.embedding.weight",
            f"{attention[2]}.relative_attention_bias.weight",
            TABLE,
            (config.num_buckets, config.num_heads),
        ),
        norm(f"blocks.{LAYER}.feed_forward_norm", f"blocks.{LAYER}.norm2", f"encoder.block.{LAYER}.layer.1.layer_norm"),
        kernel(feed_forward, "gate", "gate.0", "wi_0", (ffn_dim, dim)),
        kernel(feed_forward, "up", "fc1", "wi_1", (ffn_dim, dim)),
        kernel(feed_forward, "down", "fc2", "wo", (dim, ffn_dim)),
        norm("final_norm", "norm", "encoder.final_layer_norm"),
    ]


def vae_rows(config: VAEConfig) -> list[Row]:
    """The VAE of Wan2.1 or Wan2.2; the official names carry indices that depend on the config."""
    patterns = {"conv3d": CONV3D, "conv2d": CONV2D, "conv2d_1x1": CONV2D_AS_LINEAR}
    rows = []
    for kind, names, shape in vae_entries(config):
        ours, official, diffusers = names
        if kind == "gamma":
            pattern = GAMMA_3D if len(shape) == 4 else GAMMA_2D
            rows.append(Row(f"{ours}.scale", f"{official}.gamma", f"{diffusers}.gamma", pattern, shape))
        else:
            rows.append(Row(f"{ours}.kernel", f"{official}.weight", f"{diffusers}.weight", patterns[kind], shape))
            rows.append(Row(f"{ours}.bias", f"{official}.bias", f"{diffusers}.bias", VECTOR, shape[:1]))
    return rows


def image_encoder_rows(config: ImageEncoderConfig) -> list[Row]:
    """CLIP's vision tower; how the official file's fused projections become three is in clip_vision.py."""
    dim, patch = config.dim, config.patch_size
    embeddings = "vision_model.embeddings"
    ours, official, diffusers = (
        f"{name}.{LAYER}" for name in ("blocks", "visual.transformer", "vision_model.encoder.layers")
    )
    rows = [
        Row(
            "patch_embedding.kernel",
            "visual.patch_embedding.weight",
            f"{embeddings}.patch_embedding.weight",
            IMAGE_PATCH_EMBEDDING,
            (dim, 3, patch, patch),
        ),
        Row("class_embedding", "visual.cls_embedding", f"{embeddings}.class_embedding", VECTOR, (dim,)),
        Row(
            "position_embedding",
            "visual.pos_embedding",
            f"{embeddings}.position_embedding.weight",
            TABLE,
            (config.num_tokens, dim),
        ),
        *_layer_norm("input_norm", "visual.pre_norm", "vision_model.pre_layrnorm", dim),  # transformers' spelling
        *_layer_norm(f"{ours}.attention_norm", f"{official}.norm1", f"{diffusers}.layer_norm1", dim),
    ]
    for part, letter in (("query", "q"), ("key", "k"), ("value", "v")):
        names = (f"{ours}.attention.{part}", f"{official}.attn.to_qkv", f"{diffusers}.self_attn.{letter}_proj")
        kernel, bias = _linear(*names, dim, dim)
        rows += [replace(row, official=f"{row.official}[{part}]") for row in (kernel, bias)]
    return [
        *rows,
        *_linear(f"{ours}.attention.output", f"{official}.attn.proj", f"{diffusers}.self_attn.out_proj", dim, dim),
        *_layer_norm(f"{ours}.feed_forward_norm", f"{official}.norm2", f"{diffusers}.layer_norm2", dim),
        *_linear(f"{ours}.feed_forward.up", f"{official}.mlp.0", f"{diffusers}.mlp.fc1", dim, config.ffn_dim),
        *_linear(f"{ours}.feed_forward.down", f"{official}.mlp.2", f"{diffusers}.mlp.fc2", config.ffn_dim, dim),
        *_layer_norm("output_norm", "visual.post_norm", "vision_model.post_layernorm", dim),
    ]


def other_names(row: Row, naming: Naming) -> tuple[str, ...]:
    """Further names under which a published file may hold (a copy of) the same tensor."""
    if naming == "diffusers" and row.ours == "embedding.table":
        return ("encoder.embed_tokens.weight",)
    if naming == "diffusers" and row.diffusers.startswith("vision_model."):  # transformers 5 saves without
        return (row.diffusers.removeprefix("vision_model."),)
    return ()


# Regular expressions of tensors that published files hold and the models do not have, left out on purpose.
IGNORED: dict[type, tuple[str, ...]] = {
    DenoiserConfig: (r"blocks\.\d+\.attn2\.norm_added_q\.weight",),  # diffusers ignores it, too
    TextEncoderConfig: (),
    VAEConfig: (),
    # CLIP's text tower, what makes its two towers comparable, and a buffer.
    ImageEncoderConfig: (
        r"textual\..+",
        r"log_scale|visual\.head|visual_projection\.weight",
        r"(vision_model\.)?embeddings\.position_ids",
    ),
}


def is_ignored(config: ModelConfig, stored_name: str) -> bool:
    """Whether a file may hold this tensor beside the model's own."""
    return any(re.fullmatch(pattern, stored_name) for pattern in IGNORED[type(config)])


def model_rows(config: ModelConfig) -> list[Row]:
    """The table of one model, with LAYER where a row repeats for every layer."""
    match config:
        case DenoiserConfig():
            return denoiser_rows(config)
        case TextEncoderConfig():
            return text_encoder_rows(config)
        case VAEConfig():
            return vae_rows(config)
        case ImageEncoderConfig():
            return image_encoder_rows(config)


def num_layers(config: ModelConfig) -> int:
    return 0 if isinstance(config, VAEConfig) else config.num_layers


def expand_layers(rows: Iterable[Row], layers: int) -> list[Row]:
    """Concrete rows, layer by layer: first those without a layer index, then layer 0's, layer 1's, ..."""
    rows = list(rows)
    return [row for row in rows if not row.per_layer] + [
        row.at(layer) for layer in range(layers) for row in rows if row.per_layer
    ]


def component_config(config: WanConfig, component: str) -> ModelConfig:
    """The config of "text_encoder", "vae", "image_encoder" or a denoiser ("high_noise", "low_noise", "denoiser").

    Raises ValueError for the image encoder of a model that has none.
    """
    match component:
        case "text_encoder":
            return config.text_encoder
        case "vae":
            return config.vae
        case "image_encoder":
            if config.image_encoder is None:
                raise ValueError(f"{config.name} has no image encoder")
            return config.image_encoder
        case _:
            return config.denoiser


def abstract_model(config: ModelConfig) -> dict[str, ParameterInfo]:
    """The abstract tree of the model that `config` describes (see models/parameters.py)."""
    match config:
        case DenoiserConfig():
            from wan_jax.models.denoiser import Denoiser

            return abstract_parameters(lambda: Denoiser(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))
        case TextEncoderConfig():
            from wan_jax.models.text_encoder import TextEncoder

            return abstract_parameters(lambda: TextEncoder(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))
        case VAEConfig():
            from wan_jax.models.vae import VAE

            return abstract_parameters(lambda: VAE(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))
        case ImageEncoderConfig():
            from wan_jax.models.image_encoder import ImageEncoder

            return abstract_parameters(lambda: ImageEncoder(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))
