"""Model configs from what a checkpoint has: config.json of diffusers and of the official release, or only tensors.

Everything raises InputError where a checkpoint belongs to another family of models.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wan_jax.checkpoint.layouts import Naming, Row, image_encoder_rows, other_names, text_encoder_rows
from wan_jax.checkpoint.tensors import TensorInfo
from wan_jax.config import DenoiserConfig, ImageEncoderConfig, TextEncoderConfig, VAEConfig
from wan_jax.errors import InputError
from wan_jax.presets import PRESETS, WAN22_VAE

# Of every released model; the tensors alone do not tell the number of heads.
RELEASED_HEAD_DIM = 128
RELEASED_IMAGE_HEAD_DIM = 80

Shapes = Mapping[str, TensorInfo]


def another_family(place: object, why: str) -> InputError:
    return InputError(
        f"{place}: checkpoint of another family: {why}; wan_jax runs the text-to-video and image-to-video models of "
        "Wan2.1 and Wan2.2"
    )


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: missing; is the download complete?") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a JSON object; download it again")
    return content


def _require(place: Path, content: Mapping[str, Any], required: Mapping[str, Any]) -> None:
    for key, wanted in required.items():
        if key in content and content[key] != wanted:
            raise another_family(place, f"{key} is {content[key]!r}, not {wanted!r}")


def _build(place: Path, config_class: type, content: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    """The fields of `config_class` that `content` holds under `keys` (our name -> theirs), as the right types."""
    defaults = config_class()
    fields: dict[str, Any] = {}
    for ours, theirs in keys.items():
        if theirs not in content:
            continue
        default, value = getattr(defaults, ours), content[theirs]
        try:
            if default is None:  # every field that is None by default is a whole number otherwise
                fields[ours] = int(value)
            elif isinstance(default, tuple):
                fields[ours] = tuple(type(default[0])(item) for item in value)
            else:
                fields[ours] = type(default)(value)
        except (TypeError, ValueError):
            raise InputError(f"{place}: {theirs} is {value!r}, which is not a {type(default).__name__}") from None
    return fields


DIFFUSERS_DENOISER_KEYS = {
    "num_layers": "num_layers",
    "num_heads": "num_attention_heads",
    "ffn_dim": "ffn_dim",
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "patch_size": "patch_size",
    "text_dim": "text_dim",
    "freq_dim": "freq_dim",
    "eps": "eps",
    "image_dim": "image_dim",
    "image_position_length": "pos_embed_seq_len",
}
DIFFUSERS_DENOISER_FIXED = {
    "_class_name": "WanTransformer3DModel",
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
}


def diffusers_denoiser_config(path: Path) -> DenoiserConfig:
    """From transformer/config.json of a diffusers tree."""
    content = {key: value for key, value in read_json(path).items() if value is not None}
    _require(path, content, DIFFUSERS_DENOISER_FIXED)
    fields = _build(path, DenoiserConfig, content, DIFFUSERS_DENOISER_KEYS)
    heads = fields.get("num_heads", DenoiserConfig.num_heads)
    config = DenoiserConfig(dim=heads * int(content.get("attention_head_dim", RELEASED_HEAD_DIM)), **fields)
    _require(path, {"added_kv_proj_dim": None} | content, diffusers_image_attention(config))
    # The layout has no place for text_length: a preset of this structure says it.
    for preset in PRESETS.values():
        if dataclasses.replace(config, text_length=preset.denoiser.text_length) == preset.denoiser:
            return preset.denoiser
    return config


def diffusers_image_attention(config: DenoiserConfig) -> dict[str, int | None]:
    """What transformer/config.json says of attention to images beside image_dim: the width that features come with."""
    return {"added_kv_proj_dim": None if config.image_dim is None else config.dim}


CLIP_KEYS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "ffn_dim": "intermediate_size",
    "eps": "layer_norm_eps",
}
CLIP_FIXED = {"model_type": "clip_vision_model", "hidden_act": "gelu"}


def diffusers_image_encoder_config(path: Path) -> ImageEncoderConfig:
    """From image_encoder/config.json of a diffusers tree (transformers' CLIPVisionConfig)."""
    content = read_json(path)
    _require(path, content, CLIP_FIXED)
    return ImageEncoderConfig(**_build(path, ImageEncoderConfig, content, CLIP_KEYS))


UMT5_KEYS = {
    "vocab_size": "vocab_size",
    "dim": "d_model",
    "num_layers": "num_layers",
    "num_heads": "num_heads",
    "head_dim": "d_kv",
    "ffn_dim": "d_ff",
    "num_buckets": "relative_attention_num_buckets",
    "max_distance": "relative_attention_max_distance",
    "eps": "layer_norm_epsilon",
}
UMT5_FIXED = {"model_type": "umt5", "feed_forward_proj": "gated-gelu"}


def diffusers_text_encoder_config(path: Path) -> TextEncoderConfig:
    """From text_encoder/config.json of a diffusers tree (transformers' UMT5Config)."""
    content = read_json(path)
    _require(path, content, UMT5_FIXED)
    return TextEncoderConfig(**_build(path, TextEncoderConfig, content, UMT5_KEYS))


DIFFUSERS_VAE_KEYS = {
    "z_dim": "z_dim",
    "base_dim": "base_dim",
    "decoder_base_dim": "decoder_base_dim",
    "dim_mult": "dim_mult",
    "num_res_blocks": "num_res_blocks",
    "temporal_downsample": "temperal_downsample",  # diffusers' spelling
    "patch_size": "patch_size",
    "residual": "is_residual",
    "latents_mean": "latents_mean",
    "latents_std": "latents_std",
}
DIFFUSERS_VAE_FIXED = {"_class_name": "AutoencoderKLWan", "attn_scales": []}


def diffusers_vae_config(path: Path) -> VAEConfig:
    """From vae/config.json of a diffusers tree."""
    content = read_json(path)
    _require(path, content, DIFFUSERS_VAE_FIXED)
    # null is how diffusers says our defaults of patch_size and decoder_base_dim.
    given = {key: value for key, value in content.items() if value is not None}
    config = VAEConfig(**_build(path, VAEConfig, given, DIFFUSERS_VAE_KEYS))
    if config.decoder_base_dim == config.base_dim:  # some files spell the default out
        config = dataclasses.replace(config, decoder_base_dim=None)
    _require(path, {"in_channels": 3, "out_channels": 3} | given, diffusers_image_channels(config))
    return config


def diffusers_image_channels(config: VAEConfig) -> dict[str, int]:
    """What vae/config.json says of frames."""
    return {"in_channels": config.image_channels, "out_channels": config.image_channels}


OFFICIAL_DENOISER_KEYS = {
    "num_layers": "num_layers",
    "dim": "dim",
    "num_heads": "num_heads",
    "ffn_dim": "ffn_dim",
    "in_channels": "in_dim",
    "out_channels": "out_dim",
    "text_length": "text_len",
    "freq_dim": "freq_dim",
    "eps": "eps",
}
OFFICIAL_DENOISER_FIXED = {"_class_name": "WanModel"}
# model_type of config.json -> how the model is conditioned.
OFFICIAL_MODEL_TYPES = {"t2v": "text", "i2v": "image_latents", "flf2v": "image_latents", "ti2v": "first_frame"}


def official_denoiser_config(path: Path, inferred: DenoiserConfig) -> tuple[DenoiserConfig, str | None]:
    """From config.json of an expert's official folder: its config, and its conditioning where the file tells.

    The file lacks patch_size, text_dim and what concerns images, which the tensors tell.
    """
    content = read_json(path)
    _require(path, content, OFFICIAL_DENOISER_FIXED)
    model_type = content.get("model_type")
    if model_type is not None and model_type not in OFFICIAL_MODEL_TYPES:
        raise another_family(path, f"model_type is {model_type!r}, not one of {', '.join(OFFICIAL_MODEL_TYPES)}")
    fields = _build(path, DenoiserConfig, content, OFFICIAL_DENOISER_KEYS)
    return dataclasses.replace(inferred, **fields), None if model_type is None else OFFICIAL_MODEL_TYPES[model_type]


def _dims(place: str, tensors: Shapes, name: str, rank: int) -> tuple[int, ...]:
    if name not in tensors:
        raise InputError(f"{place}: tensor {name} is missing; is the file complete?")
    shape = tensors[name].shape
    if len(shape) != rank or 0 in shape:
        raise InputError(f"{place}: tensor {name} has shape {list(shape)}, it needs {rank} dimensions")
    return shape


def _count(tensors: Shapes, pattern: str) -> int:
    """One more than the highest index that `pattern` (with one group of digits) finds in the names."""
    return 1 + max((int(match[1]) for name in tensors if (match := re.match(pattern, name))), default=-1)


def infer_denoiser_config(place: str, tensors: Shapes) -> DenoiserConfig:
    """From the shapes of an official-named denoiser."""
    foreign = [name for name in tensors if re.search(r"(^|\.)(vace|ref_conv|control_adapter)", name)]
    if foreign:
        raise another_family(place, f"it has {foreign[0]}")
    dim, in_channels, *patch_size = _dims(place, tensors, "patch_embedding.weight", 5)
    _, text_dim = _dims(place, tensors, "text_embedding.0.weight", 2)
    _, freq_dim = _dims(place, tensors, "time_embedding.0.weight", 2)
    ffn_dim, _ = _dims(place, tensors, "blocks.0.ffn.0.weight", 2)
    out_features, _ = _dims(place, tensors, "head.head.weight", 2)
    patch_frames, patch_height, patch_width = patch_size
    image_dim = position_length = None
    if "img_emb.proj.0.weight" in tensors:
        (image_dim,) = _dims(place, tensors, "img_emb.proj.0.weight", 1)
    if "img_emb.emb_pos" in tensors:
        _, position_length, _ = _dims(place, tensors, "img_emb.emb_pos", 3)
    return DenoiserConfig(
        num_layers=_count(tensors, r"blocks\.(\d+)\."),
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


def _stored_name(tensors: Shapes, row: Row, naming: Naming) -> str:
    """The name under which a file holds a row's tensor; the usual one if it holds none."""
    names = (row.name(naming), *other_names(row, naming))
    return next((name for name in names if name in tensors), names[0])


def infer_image_encoder_config(place: str, tensors: Shapes, naming: Naming) -> ImageEncoderConfig:
    """From the shapes of CLIP's vision tower in the official (see clip_vision.py) or the HuggingFace naming."""
    rows = {row.at(0).ours: row.at(0) for row in image_encoder_rows(ImageEncoderConfig())}

    def dims(ours: str, rank: int) -> tuple[int, ...]:
        return _dims(place, tensors, _stored_name(tensors, rows[ours], naming), rank)

    dim, _, patch_size, _ = dims("patch_embedding.kernel", 4)
    tokens, _ = dims("position_embedding", 2)
    ffn_dim, _ = dims("blocks.0.feed_forward.up.kernel", 2)
    layers = {"official": r"visual\.transformer", "diffusers": r"(?:vision_model\.)?encoder\.layers"}[naming]
    return ImageEncoderConfig(
        image_size=patch_size * math.isqrt(max(tokens - 1, 0)),
        patch_size=patch_size,
        dim=dim,
        num_layers=_count(tensors, rf"{layers}\.(\d+)\."),
        num_heads=max(dim // RELEASED_IMAGE_HEAD_DIM, 1),
        ffn_dim=ffn_dim,
    )


def infer_text_encoder_config(place: str, tensors: Shapes, naming: Naming) -> TextEncoderConfig:
    """From the shapes of a UMT5 encoder in the official or the HuggingFace naming."""
    names = {row.at(0).ours: row.at(0) for row in text_encoder_rows(TextEncoderConfig())}

    def dims(ours: str) -> tuple[int, ...]:
        return _dims(place, tensors, names[ours].name(naming), 2)

    vocab_size, dim = _dims(place, tensors, _stored_name(tensors, names["embedding.table"], naming), 2)
    num_buckets, num_heads = dims("blocks.0.attention.relative_bias")
    inner, _ = dims("blocks.0.attention.query.kernel")
    ffn_dim, _ = dims("blocks.0.feed_forward.up.kernel")
    return TextEncoderConfig(
        vocab_size=vocab_size,
        dim=dim,
        num_layers=_count(tensors, r"blocks\.(\d+)\." if naming == "official" else r"encoder\.block\.(\d+)\."),
        num_heads=num_heads,
        head_dim=inner // num_heads,
        ffn_dim=ffn_dim,
        num_buckets=num_buckets,
    )


def infer_vae_config(place: str, tensors: Shapes) -> VAEConfig:
    """From the shapes of an official-named VAE; its latents' mean and deviation are those of the released one."""
    z_dim = _dims(place, tensors, "conv2.weight", 5)[0]
    # Wan2.2 has a list of modules for each stage, Wan2.1 one for all.
    residual = "encoder.downsamples.0.downsamples.0.residual.2.weight" in tensors
    released = WAN22_VAE if residual else VAEConfig()
    if z_dim != released.z_dim:
        raise another_family(
            place, f"its VAE has {z_dim} latent channels, and this layout does not say their mean and deviation"
        )
    base_dim, image_channels, *_ = _dims(place, tensors, "encoder.conv1.weight", 5)
    patch_size = math.isqrt(image_channels // 3)
    if residual:
        stage_count = _count(tensors, r"encoder\.downsamples\.(\d+)\.")
        lists = [f"encoder.downsamples.{stage}.downsamples" for stage in range(stage_count)]
    else:
        lists = ["encoder.downsamples"]
    stages: list[list[int]] = []  # output channels of every residual block, by stage
    temporal_downsample = []
    for modules in lists:
        stages.append([])
        for index in range(_count(tensors, rf"{re.escape(modules)}\.(\d+)\.")):
            module = f"{modules}.{index}"
            if f"{module}.resample.1.weight" in tensors:
                temporal_downsample.append(f"{module}.time_conv.weight" in tensors)
                if not residual:
                    stages.append([])
            else:
                stages[-1].append(_dims(place, tensors, f"{module}.residual.2.weight", 5)[0])
    if not all(stages):
        raise another_family(place, "its VAE has a stage without residual blocks")
    dim_mult = tuple(widths[-1] // base_dim for widths in stages)
    decoder_base_dim = _dims(place, tensors, "decoder.head.2.weight", 5)[1] // dim_mult[0]
    return VAEConfig(
        z_dim=z_dim,
        base_dim=base_dim,
        decoder_base_dim=None if decoder_base_dim == base_dim else decoder_base_dim,
        dim_mult=dim_mult,
        num_res_blocks=len(stages[0]),
        temporal_downsample=tuple(temporal_downsample),
        patch_size=patch_size,
        residual=residual,
        latents_mean=released.latents_mean,
        latents_std=released.latents_std,
    )
