"""UMT5's parameters, and its config from their shapes. The relative bias is one table per layer, unlike T5's."""

from wan_jax.checkpoint.tables.mapping import (
    LAYER,
    TABLE,
    Naming,
    ParamMapping,
    Tensors,
    count_indices,
    linear,
    names,
    norm,
    present_name,
    read_shape,
)
from wan_jax.config import TextEncoderConfig


def text_encoder_table(config: TextEncoderConfig) -> list[ParamMapping]:
    dim, inner, ffn_dim = config.dim, config.num_heads * config.head_dim, config.ffn_dim
    block = names(f"blocks.{LAYER}", diffusers=f"encoder.block.{LAYER}")
    attention = block.child("attention", "attn", "layer.0.SelfAttention")
    feed_forward = block.child("feed_forward", "ffn", "layer.1.DenseReluDense")
    bias_names = attention.child("relative_bias", diffusers="relative_attention_bias.weight")
    bias_names = bias_names._replace(official=f"blocks.{LAYER}.pos_embedding.embedding.weight")
    return [
        ParamMapping(
            names("embedding.table", "token_embedding.weight", "shared.weight"),
            TABLE,
            (config.vocab_size, dim),
            aliases=("encoder.embed_tokens.weight",),
        ),
        *norm(block.child("attention_norm", "norm1", "layer.0.layer_norm"), dim),
        *linear(attention.child("query", "q", "q"), dim, inner, bias=False),
        *linear(attention.child("key", "k", "k"), dim, inner, bias=False),
        *linear(attention.child("value", "v", "v"), dim, inner, bias=False),
        *linear(attention.child("output", "o", "o"), inner, dim, bias=False),
        ParamMapping(bias_names, TABLE, (config.num_buckets, config.num_heads)),
        *norm(block.child("feed_forward_norm", "norm2", "layer.1.layer_norm"), dim),
        *linear(feed_forward.child("gate", "gate.0", "wi_0"), dim, ffn_dim, bias=False),
        *linear(feed_forward.child("up", "fc1", "wi_1"), dim, ffn_dim, bias=False),
        *linear(feed_forward.child("down", "fc2", "wo"), ffn_dim, dim, bias=False),
        *norm(names("final_norm", "norm", "encoder.final_layer_norm"), dim),
    ]


def infer_text_encoder(place: str, tensors: Tensors, naming: Naming) -> TextEncoderConfig:
    """The config of a UMT5 encoder with the official or HuggingFace's names."""
    table = {mapping.stacked_name: mapping.at(0) for mapping in text_encoder_table(TextEncoderConfig())}

    def shape(name: str) -> tuple[int, ...]:
        return read_shape(place, tensors, present_name(table[name], tensors, naming), 2)

    vocab_size, dim = shape("embedding.table")
    num_buckets, num_heads = shape("blocks.attention.relative_bias")
    inner, _ = shape("blocks.attention.query.kernel")
    ffn_dim, _ = shape("blocks.feed_forward.up.kernel")
    return TextEncoderConfig(
        vocab_size=vocab_size,
        dim=dim,
        num_layers=count_indices(tensors, r"blocks\.(\d+)\." if naming == "official" else r"encoder\.block\.(\d+)\."),
        num_heads=num_heads,
        head_dim=inner // num_heads,
        ffn_dim=ffn_dim,
        num_buckets=num_buckets,
    )
