"""The parameters of CLIP's vision tower, its config from their shapes, and the official file of CLIP.

In the official file one projection makes queries, keys and values, and embeddings have leading axes of size 1. The
table has them apart, as diffusers does: its official names are "...to_qkv.weight[query]" and so on, which
`OfficialClipStore` reads and `as_official_clip` writes. The file's text tower is ignored.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from wan_jax.checkpoint.formats.tensors import ReadMany, TensorInfo, TensorStore
from wan_jax.checkpoint.tables.mapping import (
    LAYER,
    TABLE,
    VECTOR,
    Naming,
    ParamMapping,
    Tensors,
    count_indices,
    linear,
    names,
    norm,
    present_name,
    read_shape,
    weight_and_bias,
)
from wan_jax.config import ImageEncoderConfig

RELEASED_HEAD_DIM = 80  # the tensors alone do not tell the number of heads
PATCH_EMBEDDING = "o c h w -> (c h w) o"
# CLIP's text tower, what makes its two towers comparable, and a buffer.
IGNORED = (
    r"textual\..+",
    r"log_scale|visual\.head|visual_projection\.weight",
    r"(vision_model\.)?embeddings\.position_ids",
)
PREFIX = "visual."
FUSED = ".attn.to_qkv."
PARTS = ("query", "key", "value")
LEADING_AXES = {"visual.cls_embedding": (1, 1), "visual.pos_embedding": (1,)}  # before those of the table


def image_encoder_table(config: ImageEncoderConfig) -> list[ParamMapping]:
    dim, patch = config.dim, config.patch_size
    embeddings = "vision_model.embeddings"
    block = names(f"blocks.{LAYER}", f"visual.transformer.{LAYER}", f"vision_model.encoder.layers.{LAYER}")
    patch_embedding = names("patch_embedding", "visual.patch_embedding", f"{embeddings}.patch_embedding")
    class_embedding = names("class_embedding", "visual.cls_embedding", f"{embeddings}.class_embedding")
    positions = names("position_embedding", "visual.pos_embedding", f"{embeddings}.position_embedding.weight")
    table = [
        *weight_and_bias(patch_embedding, PATCH_EMBEDDING, (dim, 3, patch, patch), bias=False),
        ParamMapping(class_embedding, VECTOR, (dim,)),
        ParamMapping(positions, TABLE, (config.num_tokens, dim)),
        # transformers' spelling
        *norm(names("input_norm", "visual.pre_norm", "vision_model.pre_layrnorm"), dim, bias=True),
        *norm(block.child("attention_norm", "norm1", "layer_norm1"), dim, bias=True),
    ]
    for part in PARTS:
        projection = linear(block.child(f"attention.{part}", "attn.to_qkv", f"self_attn.{part[0]}_proj"), dim, dim)
        table += [
            replace(mapping, names=mapping.names._replace(official=f"{mapping.names.official}[{part}]"))
            for mapping in projection
        ]
    table += [
        *linear(block.child("attention.output", "attn.proj", "self_attn.out_proj"), dim, dim),
        *norm(block.child("feed_forward_norm", "norm2", "layer_norm2"), dim, bias=True),
        *linear(block.child("feed_forward.up", "mlp.0", "mlp.fc1"), dim, config.ffn_dim),
        *linear(block.child("feed_forward.down", "mlp.2", "mlp.fc2"), config.ffn_dim, dim),
        *norm(names("output_norm", "visual.post_norm", "vision_model.post_layernorm"), dim, bias=True),
    ]
    # transformers 5 saves the tower without its prefix.
    return [replace(mapping, aliases=(mapping.names.diffusers.removeprefix("vision_model."),)) for mapping in table]


def infer_image_encoder(place: str, tensors: Tensors, naming: Naming) -> ImageEncoderConfig:
    """The config of CLIP's vision tower with the official (see OfficialClipStore) or HuggingFace's names."""
    table = {mapping.stacked_name: mapping.at(0) for mapping in image_encoder_table(ImageEncoderConfig())}

    def shape(name: str, rank: int) -> tuple[int, ...]:
        return read_shape(place, tensors, present_name(table[name], tensors, naming), rank)

    dim, _, patch_size, _ = shape("patch_embedding.kernel", 4)
    tokens, _ = shape("position_embedding", 2)
    ffn_dim, _ = shape("blocks.feed_forward.up.kernel", 2)
    layers = r"visual\.transformer" if naming == "official" else r"(?:vision_model\.)?encoder\.layers"
    return ImageEncoderConfig(
        image_size=patch_size * math.isqrt(max(tokens - 1, 0)),
        patch_size=patch_size,
        dim=dim,
        num_layers=count_indices(tensors, rf"{layers}\.(\d+)\."),
        num_heads=max(dim // RELEASED_HEAD_DIM, 1),
        ffn_dim=ffn_dim,
    )


class OfficialClipStore(TensorStore):
    """The official file, with the names and shapes of the table."""

    def __init__(self, store: TensorStore):
        self.place = store.place
        self._store = store
        self.tensors = {}
        self._sources: dict[str, tuple[str, int]] = {}  # table's name -> stored name, and where the part begins
        for name, info in store.tensors.items():
            axes = LEADING_AXES.get(name, ())
            if name.startswith(PREFIX) and FUSED in name and info.shape and info.shape[0] % len(PARTS) == 0:
                rows = info.shape[0] // len(PARTS)
                for index, part in enumerate(PARTS):
                    self.tensors[f"{name}[{part}]"] = replace(info, shape=(rows, *info.shape[1:]))
                    self._sources[f"{name}[{part}]"] = name, index * rows
                continue
            if info.shape[: len(axes)] == axes:  # any other shape is one that the table does not have
                info = replace(info, shape=info.shape[len(axes) :])
            self.tensors[name] = info
            self._sources[name] = name, 0

    def read(self, name: str, dtype: np.dtype | None = None) -> np.ndarray:
        stored_name, start = self._sources[name]
        shape = self.tensors[name].shape
        tensor = self._store.read(stored_name, dtype)
        return tensor[start : start + shape[0]] if name != stored_name else tensor.reshape(shape)


def as_official_clip(tensors: Mapping[str, TensorInfo], read_many: ReadMany) -> tuple[dict[str, TensorInfo], ReadMany]:
    """What to write for the table's tensors: the official names and shapes, and a reader of them."""
    stored = dict.fromkeys(name.partition("[")[0] for name in tensors)
    sources = {name: [f"{name}[{part}]" for part in PARTS] if FUSED in name else [name] for name in stored}
    written = {}
    for name, parts in sources.items():
        rows = sum(tensors[part].shape[0] for part in parts)
        first = tensors[parts[0]]
        written[name] = replace(first, shape=(*LEADING_AXES.get(name, ()), rows, *first.shape[1:]))

    def read(names: Sequence[str]) -> Iterator[np.ndarray]:
        arrays = read_many([part for name in names for part in sources[name]])
        for name in names:
            yield np.concatenate([next(arrays) for _ in sources[name]]).reshape(written[name].shape)

    return written, read
