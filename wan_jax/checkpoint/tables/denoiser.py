"""The diffusion transformer's parameters, and its config from their shapes."""

import math
import re

from wan_jax.checkpoint.family import another_family
from wan_jax.checkpoint.tables.mapping import (
    LAYER,
    MODULATION,
    Naming,
    ParamMapping,
    Tensors,
    count_indices,
    linear,
    names,
    norm,
    read_shape,
    weight_and_bias,
)
from wan_jax.config import DenoiserConfig

RELEASED_HEAD_DIM = 128  # of every released model; the tensors alone do not tell the number of heads
PATCH_EMBEDDING = "o c t h w -> (c t h w) o"
IGNORED = (r"blocks\.\d+\.attn2\.norm_added_q\.weight",)  # diffusers ignores it, too


def denoiser_table(config: DenoiserConfig) -> list[ParamMapping]:
    """The denoiser. Beware: official norm3 is the cross-attention norm, which diffusers calls norm2."""
    dim, ffn_dim = config.dim, config.ffn_dim
    text = names("text_embedding", diffusers="condition_embedder.text_embedder")
    time = names("time_embedding", diffusers="condition_embedder.time_embedder")
    block = names(f"blocks.{LAYER}")
    table = [
        *weight_and_bias(names("patch_embedding"), PATCH_EMBEDDING, (dim, config.in_channels, *config.patch_size)),
        *linear(text.child("linear_1", "0"), config.text_dim, dim),
        *linear(text.child("linear_2", "2"), dim, dim),
        *linear(time.child("linear_1", "0"), config.freq_dim, dim),
        *linear(time.child("linear_2", "2"), dim, dim),
        *linear(names("time_projection", "time_projection.1", "condition_embedder.time_proj"), dim, 6 * dim),
        ParamMapping(block.child("modulation", diffusers="scale_shift_table"), MODULATION, (1, 6, dim)),
    ]
    for module in (("self_attention", "self_attn", "attn1"), ("cross_attention", "cross_attn", "attn2")):
        attention = block.child(*module)
        table += [
            *linear(attention.child("query", "q", "to_q"), dim, dim),
            *linear(attention.child("key", "k", "to_k"), dim, dim),
            *linear(attention.child("value", "v", "to_v"), dim, dim),
            *linear(attention.child("output", "o", "to_out.0"), dim, dim),
            *norm(attention.child("query_norm", "norm_q", "norm_q"), dim),
            *norm(attention.child("key_norm", "norm_k", "norm_k"), dim),
        ]
    return [
        *table,
        *_image_table(config),
        *norm(block.child("cross_attention_norm", "norm3", "norm2"), dim, bias=True),
        *linear(block.child("feed_forward.up", "ffn.0", "ffn.net.0.proj"), dim, ffn_dim),
        *linear(block.child("feed_forward.down", "ffn.2", "ffn.net.2"), ffn_dim, dim),
        ParamMapping(names("head.modulation", diffusers="scale_shift_table"), MODULATION, (1, 2, dim)),
        *linear(names("head.linear", "head.head", "proj_out"), dim, math.prod(config.patch_size) * config.out_channels),
    ]


def _image_table(config: DenoiserConfig) -> list[ParamMapping]:
    """What Wan2.1's image-to-video denoisers have in addition."""
    dim, image_dim, length = config.dim, config.image_dim, config.image_position_length
    if image_dim is None:
        return []
    embedding = names("image_embedding", "img_emb", "condition_embedder.image_embedder")
    table = [
        *norm(embedding.child("norm_1", "proj.0", "norm1"), image_dim, bias=True),
        *linear(embedding.child("linear_1", "proj.1", "ff.net.0.proj"), image_dim, image_dim),
        *linear(embedding.child("linear_2", "proj.3", "ff.net.2"), image_dim, dim),
        *norm(embedding.child("norm_2", "proj.4", "norm2"), dim, bias=True),
    ]
    if length is not None:
        positions = embedding.child("positions", "emb_pos", "pos_embed")
        table.append(ParamMapping(positions, MODULATION, (1, length, image_dim)))
    attention = names(f"blocks.{LAYER}").child("cross_attention.image", "cross_attn", "attn2")
    return [
        *table,
        *linear(attention.child("key", "k_img", "add_k_proj"), dim, dim),
        *linear(attention.child("value", "v_img", "add_v_proj"), dim, dim),
        *norm(attention.child("key_norm", "norm_k_img", "norm_added_k"), dim),
    ]


def infer_denoiser(place: str, tensors: Tensors, naming: Naming = "official") -> DenoiserConfig:
    """The config of a denoiser with the official names. Raises InputError for one of another family."""
    assert naming == "official"
    foreign = [name for name in tensors if re.search(r"(^|\.)(vace|ref_conv|control_adapter)", name)]
    if foreign:
        raise another_family(place, f"it has {foreign[0]}")
    dim, in_channels, *patch_size = read_shape(place, tensors, "patch_embedding.weight", 5)
    _, text_dim = read_shape(place, tensors, "text_embedding.0.weight", 2)
    _, freq_dim = read_shape(place, tensors, "time_embedding.0.weight", 2)
    ffn_dim, _ = read_shape(place, tensors, "blocks.0.ffn.0.weight", 2)
    out_features, _ = read_shape(place, tensors, "head.head.weight", 2)
    patch_frames, patch_height, patch_width = patch_size
    image_dim = position_length = None
    if "img_emb.proj.0.weight" in tensors:
        (image_dim,) = read_shape(place, tensors, "img_emb.proj.0.weight", 1)
    if "img_emb.emb_pos" in tensors:
        _, position_length, _ = read_shape(place, tensors, "img_emb.emb_pos", 3)
    return DenoiserConfig(
        num_layers=count_indices(tensors, r"blocks\.(\d+)\."),
        dim=dim,
        num_heads=max(dim // RELEASED_HEAD_DIM, 1),
        ffn_dim=ffn_dim,
        in_channels=in_channels,
        out_channels=out_features // (patch_frames * patch_height * patch_width),
        patch_size=(patch_frames, patch_height, patch_width),
        text_dim=text_dim,
        freq_dim=freq_dim,
        image_dim=image_dim,
        image_position_length=position_length,
    )
