"""Writes the published layouts: the diffusers tree and the official tree, with the configs their loaders need."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wan_jax.checkpoint.clip_vision import as_official
from wan_jax.checkpoint.configs import (
    CLIP_FIXED,
    CLIP_KEYS,
    DIFFUSERS_DENOISER_FIXED,
    DIFFUSERS_DENOISER_KEYS,
    DIFFUSERS_VAE_FIXED,
    DIFFUSERS_VAE_KEYS,
    OFFICIAL_DENOISER_FIXED,
    OFFICIAL_DENOISER_KEYS,
    UMT5_FIXED,
    UMT5_KEYS,
    diffusers_image_attention,
    diffusers_image_channels,
    infer_denoiser_config,
    infer_image_encoder_config,
    infer_text_encoder_config,
    infer_vae_config,
)
from wan_jax.checkpoint.family import official_model_type
from wan_jax.checkpoint.layouts import ModelConfig, component_config, expand_layers, model_rows, num_layers
from wan_jax.checkpoint.safetensors import write_safetensors
from wan_jax.checkpoint.sources import EXPERT_FOLDERS, OFFICIAL_IMAGE_ENCODER, OFFICIAL_TEXT_ENCODER, official_vae
from wan_jax.checkpoint.tensors import BFLOAT16, ReadMany, TensorInfo
from wan_jax.checkpoint.torch_pickle import write_torch_pickle
from wan_jax.config import DenoiserConfig, ImageEncoderConfig, TextEncoderConfig, WanConfig
from wan_jax.errors import InputError
from wan_jax.presets import PRESETS

DIFFUSERS_VERSION = "0.36.0"  # the oldest we test with; loaders only compare it
DIFFUSERS_FOLDERS = {
    "denoiser": "transformer",
    "high_noise": "transformer",
    "low_noise": "transformer_2",
    "text_encoder": "text_encoder",
    "vae": "vae",
    "image_encoder": "image_encoder",
}
_DIFFUSERS_CLASSES = {
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": ["diffusers", "WanTransformer3DModel"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
    "image_encoder": ["transformers", "CLIPVisionModel"],
}
# What CLIP was trained on, as transformers' image processors say it.
_CLIP_PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "resample": 3,  # bicubic
    "do_center_crop": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def check_diffusers_can_hold(config: WanConfig) -> None:
    """Raises InputError for a config that the diffusers layout has no place for."""
    known = any(config.denoiser == preset.denoiser for preset in PRESETS.values())  # readers take it from the preset
    if config.denoiser.text_length != DenoiserConfig.text_length and not known:
        raise InputError(
            f"the diffusers layout has no place for text_length {config.denoiser.text_length}; convert to orbax"
        )


def check_official_can_hold(config: WanConfig, components: Sequence[str]) -> None:
    """Raises InputError for a config that the official layout, which has almost no configs, would not give back."""
    for component in components:
        model = component_config(config, component)
        tensors = {
            row.official: TensorInfo(row.shape, BFLOAT16, "")
            for row in expand_layers(model_rows(model), num_layers(model))
        }
        place = f"{component} in the official layout"
        inferred: ModelConfig
        if isinstance(model, DenoiserConfig):
            inferred = infer_denoiser_config(place, tensors)
            inferred = dataclasses.replace(inferred, **{name: getattr(model, name) for name in OFFICIAL_DENOISER_KEYS})
        elif isinstance(model, TextEncoderConfig):
            inferred = infer_text_encoder_config(place, tensors, "official")
        elif isinstance(model, ImageEncoderConfig):
            inferred = infer_image_encoder_config(place, tensors, "official")
        else:
            inferred = infer_vae_config(place, tensors)
        if inferred != model:
            differing = [
                field.name
                for field in dataclasses.fields(model)
                if getattr(model, field.name) != getattr(inferred, field.name)
            ]
            raise InputError(
                f"the official layout has no place for {component}'s {', '.join(differing)}; "
                "convert to orbax or diffusers"
            )


def write_diffusers_component(
    folder: Path, component: str, config: WanConfig, tensors: Mapping[str, TensorInfo], read_many: ReadMany
) -> None:
    """One model of a diffusers tree: its config.json and its safetensors."""
    folder = folder / DIFFUSERS_FOLDERS[component]
    folder.mkdir()
    stem = "diffusion_pytorch_model"
    if component == "text_encoder":
        stem = "model"
        _write_json(folder / "config.json", _umt5_json(config.text_encoder, tensors))
    elif component == "vae":
        _write_json(folder / "config.json", _diffusers_vae_json(config))
    elif component == "image_encoder" and config.image_encoder is not None:
        stem = "model"
        _write_json(folder / "config.json", _clip_json(config.image_encoder, tensors))
        _write_clip_preprocessor(folder.parent / "image_processor", config.image_encoder.image_size)
    else:
        _write_json(folder / "config.json", _diffusers_denoiser_json(config.denoiser))
    write_safetensors(folder, stem, tensors, read_many)


def write_diffusers_index(folder: Path, config: WanConfig, components: Sequence[str], tokenizer: bool) -> None:
    """model_index.json and the scheduler: what makes the folder a pipeline."""
    entries: dict[str, Any] = {"transformer_2": [None, None]}
    entries |= {name: _DIFFUSERS_CLASSES[name] for name in (DIFFUSERS_FOLDERS[component] for component in components)}
    if tokenizer:
        entries["tokenizer"] = ["transformers", "T5TokenizerFast"]
    if "image_encoder" in components:
        entries["image_processor"] = ["transformers", "CLIPImageProcessor"]
    takes_images = config.conditioning == "image_latents"
    if takes_images:
        entries = {"image_encoder": [None, None], "image_processor": [None, None]} | entries
    scheduler = {
        "_class_name": "UniPCMultistepScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": config.sampling.shift,
        "solver_order": 2,
        "solver_type": "bh2",
        "predict_x0": True,
        "lower_order_final": True,
        "final_sigmas_type": "zero",
    }
    (folder / "scheduler").mkdir()
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index = {
        "_class_name": "WanImageToVideoPipeline" if takes_images else "WanPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "boundary_ratio": config.sampling.boundary,
        "expand_timesteps": config.conditioning == "first_frame",
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        **entries,
    }
    _write_json(folder / "model_index.json", index)


def write_official_component(
    folder: Path, component: str, config: WanConfig, tensors: Mapping[str, TensorInfo], read_many: ReadMany
) -> None:
    """One model of an official tree: a .pth file, or an expert's folder of safetensors with its config.json."""
    if component == "text_encoder":
        write_torch_pickle(folder / OFFICIAL_TEXT_ENCODER, tensors, read_many)
    elif component == "vae":
        write_torch_pickle(folder / official_vae(config.vae), tensors, read_many)
    elif component == "image_encoder":
        write_torch_pickle(folder / OFFICIAL_IMAGE_ENCODER, *as_official(tensors, read_many))
    else:
        if component in EXPERT_FOLDERS:
            folder = folder / EXPERT_FOLDERS[component]
            folder.mkdir()
        content = _values(config.denoiser, OFFICIAL_DENOISER_KEYS) | OFFICIAL_DENOISER_FIXED
        content["model_type"] = official_model_type(config)
        _write_json(folder / "config.json", {**content, "_diffusers_version": DIFFUSERS_VERSION})
        write_safetensors(folder, "diffusion_pytorch_model", tensors, read_many)


def _diffusers_denoiser_json(config: DenoiserConfig) -> dict[str, Any]:
    return {
        **DIFFUSERS_DENOISER_FIXED,
        **_values(config, DIFFUSERS_DENOISER_KEYS),
        **diffusers_image_attention(config),
        "_diffusers_version": DIFFUSERS_VERSION,
        "attention_head_dim": config.head_dim,
        "rope_max_seq_len": 1024,
    }


def _diffusers_vae_json(config: WanConfig) -> dict[str, Any]:
    return {
        **DIFFUSERS_VAE_FIXED,
        **_values(config.vae, DIFFUSERS_VAE_KEYS),
        **diffusers_image_channels(config.vae),
        "patch_size": None if config.vae.patch_size == 1 else config.vae.patch_size,
        "_diffusers_version": DIFFUSERS_VERSION,
        "dropout": 0.0,
        "scale_factor_temporal": config.vae.temporal_stride,
        "scale_factor_spatial": config.vae.spatial_stride,
    }


def _umt5_json(config: TextEncoderConfig, tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    return {
        **UMT5_FIXED,
        **_values(config, UMT5_KEYS),
        "architectures": ["UMT5EncoderModel"],
        "torch_dtype": next(iter(tensors.values())).dtype.name,
        "is_encoder_decoder": True,
        "is_gated_act": True,
        "dense_act_fn": "gelu_new",
        "num_decoder_layers": config.num_layers,
        "dropout_rate": 0.1,
        "initializer_factor": 1.0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        # Some versions of transformers leave the encoder's embedding unset where this is false.
        "tie_word_embeddings": True,
        "use_cache": True,
    }


def _clip_json(config: ImageEncoderConfig, tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    return {
        **CLIP_FIXED,
        **_values(config, CLIP_KEYS),
        "architectures": ["CLIPVisionModel"],
        "torch_dtype": next(iter(tensors.values())).dtype.name,
        "num_channels": 3,
        "projection_dim": 1024,
        "attention_dropout": 0.0,
    }


def _write_clip_preprocessor(folder: Path, image_size: int) -> None:
    folder.mkdir()
    sizes = {"size": {"shortest_edge": image_size}, "crop_size": {"height": image_size, "width": image_size}}
    _write_json(folder / "preprocessor_config.json", _CLIP_PREPROCESSOR | sizes)


def _values(config: ModelConfig, keys: Mapping[str, str]) -> dict[str, Any]:
    return {theirs: getattr(config, ours) for ours, theirs in keys.items()}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
