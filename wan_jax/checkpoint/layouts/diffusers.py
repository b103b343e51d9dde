"""The diffusers layout: a tree with model_index.json, and a folder with a config.json for each model.

The scheduler's flow_shift does not decide for a release: published trees hold 3.0 where the release uses 12.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from wan_jax.checkpoint.family import another_family
from wan_jax.checkpoint.formats.safetensors import open_safetensors_folder, write_safetensors
from wan_jax.checkpoint.formats.tensors import ReadMany, TensorInfo
from wan_jax.checkpoint.layouts.base import (
    DIFFUSERS_VERSION,
    ConfigKeys,
    Layout,
    Opened,
    StoredModel,
    assemble,
    first_folder,
    read_json,
    require,
    value_of,
    write_json,
)
from wan_jax.checkpoint.tables.denoiser import RELEASED_HEAD_DIM
from wan_jax.config import (
    DenoiserConfig,
    ImageEncoderConfig,
    ModelConfig,
    PerExpert,
    SamplingConfig,
    TextEncoderConfig,
    VAEConfig,
    WanConfig,
)
from wan_jax.errors import InputError, located
from wan_jax.presets import PRESETS

INDEX = "model_index.json"
SAMPLING_KEY = "_wan_jax_sampling"  # ours, in model_index.json: diffusers ignores private keys
# What diffusers' pipelines of Wan do where nothing is said.
DEFAULT_SAMPLING = SamplingConfig(size=(832, 480), steps=50, guidance=PerExpert(low=5.0, high=5.0), negative_prompt="")
# Of model_index.json -> how the model is conditioned, unless expand_timesteps says that it takes a first frame.
PIPELINES = {"WanPipeline": "text", "WanImageToVideoPipeline": "image_latents"}
FOLDERS = {
    "denoiser": "transformer",
    "high_noise": "transformer",
    "low_noise": "transformer_2",
    "text_encoder": "text_encoder",
    "vae": "vae",
    "image_encoder": "image_encoder",
}
# Of each folder: the library and the class that we write, after which come other classes that we read.
CLASSES = {
    "transformer": ("diffusers", "WanTransformer3DModel"),
    "transformer_2": ("diffusers", "WanTransformer3DModel"),
    "text_encoder": ("transformers", "UMT5EncoderModel"),
    "vae": ("diffusers", "AutoencoderKLWan"),
    "image_encoder": ("transformers", "CLIPVisionModel", "CLIPVisionModelWithProjection"),
}
DENOISER = ConfigKeys(
    DenoiserConfig,
    "num_layers num_heads=num_attention_heads ffn_dim in_channels out_channels patch_size text_dim freq_dim eps "
    "image_dim image_position_length=pos_embed_seq_len",
    {"_class_name": "WanTransformer3DModel", "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads"},
)
CLIP = ConfigKeys(
    ImageEncoderConfig,
    "image_size patch_size dim=hidden_size num_layers=num_hidden_layers num_heads=num_attention_heads "
    "ffn_dim=intermediate_size eps=layer_norm_eps",
    {"model_type": "clip_vision_model", "hidden_act": "gelu"},
)
UMT5 = ConfigKeys(
    TextEncoderConfig,
    "vocab_size dim=d_model num_layers num_heads head_dim=d_kv ffn_dim=d_ff "
    "num_buckets=relative_attention_num_buckets max_distance=relative_attention_max_distance "
    "eps=layer_norm_epsilon",
    {"model_type": "umt5", "feed_forward_proj": "gated-gelu"},
)
VAE = ConfigKeys(
    VAEConfig,
    "z_dim base_dim decoder_base_dim dim_mult num_res_blocks temporal_downsample=temperal_downsample patch_size "
    "residual=is_residual latents_mean latents_std",
    {"_class_name": "AutoencoderKLWan", "attn_scales": []},
)
# What CLIP was trained on, as transformers' image processors say it; resample 3 is bicubic.
CLIP_PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    **dict.fromkeys(("do_convert_rgb", "do_resize", "do_center_crop", "do_rescale", "do_normalize"), True),
    "resample": 3,
    "rescale_factor": 1 / 255,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
# What transformers needs to know of UMT5 and CLIP, and no config of ours says. Some versions leave the encoder's
# embedding unset where tie_word_embeddings is false.
UMT5_EXTRAS = {
    "architectures": ["UMT5EncoderModel"],
    **dict.fromkeys(("is_encoder_decoder", "is_gated_act", "tie_word_embeddings", "use_cache"), True),
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "initializer_factor": 1.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
CLIP_EXTRAS = {
    "architectures": ["CLIPVisionModel"],
    "num_channels": 3,
    "projection_dim": 1024,
    "attention_dropout": 0.0,
}
SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler",
    "_diffusers_version": DIFFUSERS_VERSION,
    "num_train_timesteps": 1000,
    "prediction_type": "flow_prediction",
    "solver_order": 2,
    "solver_type": "bh2",
    **dict.fromkeys(("use_flow_sigmas", "predict_x0", "lower_order_final"), True),
    "final_sigmas_type": "zero",
}


class DiffusersLayout(Layout):
    name = "diffusers"
    writes = True
    naming = "diffusers"

    def recognises(self, path: Path) -> bool:
        return (path / INDEX).is_file()

    def open(self, paths: Sequence[Path]) -> Opened:
        (path,) = paths
        index_path = path / INDEX
        index = read_json(index_path)
        pipeline = str(index.get("_class_name"))
        if pipeline not in PIPELINES:
            raise another_family(index_path, f"its pipeline is {pipeline}")
        takes_frame = value_of(index_path, index, "expand_timesteps", bool | None)
        conditioning = "first_frame" if takes_frame else PIPELINES[pipeline]
        folders = {folder for folder in CLASSES if _is_present(index_path, index, folder)}
        if "transformer" not in folders:
            raise InputError(f"{index_path}: names no transformer; download the whole checkpoint")
        experts = ("high_noise", "low_noise") if "transformer_2" in folders else ("denoiser",)
        models = {
            component: _open_model(component, path / FOLDERS[component])
            for component in (*experts, "text_encoder", "vae")
            if FOLDERS[component] in folders
        }
        clip = path / "image_encoder"
        return assemble(
            path,
            models,
            conditionings=dict.fromkeys(experts, conditioning),
            boundary=value_of(index_path, index, "boundary_ratio", float | None),
            image_encoder=(clip, partial(_open_model, clip.name, clip)) if clip.name in folders else None,
            sampling=partial(_sampling, path, index),
            tokenizer_folder=first_folder(path, self.tokenizer),
        )

    def check_can_hold(self, config: WanConfig, components: Sequence[str]) -> None:
        known = any(
            config.denoiser == preset.denoiser for preset in PRESETS.values()
        )  # readers take it from the preset
        if config.denoiser.text_length != DenoiserConfig.text_length and not known:
            raise InputError(
                f"the diffusers layout has no place for text_length {config.denoiser.text_length}; convert to orbax"
            )

    def write_component(
        self, folder: Path, component: str, config: WanConfig, tensors: Mapping[str, TensorInfo], read_many: ReadMany
    ) -> None:
        folder = folder / FOLDERS[component]
        folder.mkdir()
        model = config.model(component)
        dtype = next(iter(tensors.values())).dtype.name
        write_json(folder / "config.json", _config_json(model, dtype))
        if isinstance(model, ImageEncoderConfig):
            _write_preprocessor(folder.parent / "image_processor", model.image_size)
        of_transformers = component in ("text_encoder", "image_encoder")
        write_safetensors(folder, "model" if of_transformers else "diffusion_pytorch_model", tensors, read_many)

    def finish(
        self, folder: Path, config: WanConfig, contents: Mapping[str, Mapping[str, Any]], tokenizer: bool
    ) -> list[str]:
        """Writes model_index.json and the scheduler: what makes the folder a pipeline."""
        entries: dict[str, Any] = {"transformer_2": [None, None]}
        entries |= {FOLDERS[component]: CLASSES[FOLDERS[component]][:2] for component in contents}
        if tokenizer:
            entries["tokenizer"] = ["transformers", "T5TokenizerFast"]
        if "image_encoder" in contents:
            entries["image_processor"] = ["transformers", "CLIPImageProcessor"]
        takes_images = config.conditioning == "image_latents"
        if takes_images:
            entries = {"image_encoder": [None, None], "image_processor": [None, None]} | entries
        (folder / "scheduler").mkdir()
        scheduler = {**SCHEDULER, "flow_shift": config.sampling.shift}
        write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
        index = {
            "_class_name": "WanImageToVideoPipeline" if takes_images else "WanPipeline",
            "_diffusers_version": DIFFUSERS_VERSION,
            "boundary_ratio": config.sampling.boundary,
            SAMPLING_KEY: dataclasses.asdict(config.sampling),
            "expand_timesteps": config.conditioning == "first_frame",
            "scheduler": ["diffusers", SCHEDULER["_class_name"]],
            **entries,
        }
        write_json(folder / INDEX, index)
        return []


def _is_present(index_path: Path, index: Mapping[str, Any], folder: str) -> bool:
    entry = index.get(folder) or [None, None]
    class_name = entry[1] if isinstance(entry, list) and len(entry) == 2 else entry
    classes = CLASSES[folder][1:]
    if class_name not in (None, *classes):
        raise another_family(index_path, f"{folder} is {class_name}, not {classes[0]}")
    return class_name is not None


def _open_model(component: str, folder: Path) -> StoredModel:
    path = folder / "config.json"
    content = read_json(path)
    config: ModelConfig
    with located(path):
        if component == "text_encoder":
            config = TextEncoderConfig(**UMT5.read(path, content))
        elif component == "image_encoder":
            config = ImageEncoderConfig(**CLIP.read(path, content))
        elif component == "vae":
            config = _vae_config(path, content)
        else:
            config = _denoiser_config(path, content)
    return StoredModel(config, "diffusers", open_safetensors_folder(folder))


def _denoiser_config(path: Path, content: Mapping[str, Any]) -> DenoiserConfig:
    content = {key: value for key, value in content.items() if value is not None}
    fields = DENOISER.read(path, content)
    heads = fields.get("num_heads", DenoiserConfig.num_heads)
    config = DenoiserConfig(
        dim=heads * (value_of(path, content, "attention_head_dim", int) or RELEASED_HEAD_DIM), **fields
    )
    require(path, {"added_kv_proj_dim": None} | content, _image_attention(config))
    # The layout has no place for text_length: a preset of this structure says it.
    for preset in PRESETS.values():
        if dataclasses.replace(config, text_length=preset.denoiser.text_length) == preset.denoiser:
            return preset.denoiser
    return config


def _image_attention(config: DenoiserConfig) -> dict[str, int | None]:
    """What config.json says of attention to images beside image_dim: the width that features come with."""
    return {"added_kv_proj_dim": None if config.image_dim is None else config.dim}


def _vae_config(path: Path, content: Mapping[str, Any]) -> VAEConfig:
    # null is how diffusers says our defaults of patch_size and decoder_base_dim.
    content = {key: value for key, value in content.items() if value is not None}
    config = VAEConfig(**VAE.read(path, content))
    if config.decoder_base_dim == config.base_dim:  # some files spell the default out
        config = dataclasses.replace(config, decoder_base_dim=None)
    require(path, {"in_channels": 3, "out_channels": 3} | content, _image_channels(config))
    return config


def _image_channels(config: VAEConfig) -> dict[str, int]:
    """What config.json says of frames."""
    return {"in_channels": config.image_channels, "out_channels": config.image_channels}


def _config_json(config: ModelConfig, dtype: str) -> dict[str, Any]:
    own: dict[str, Any]
    match config:
        case DenoiserConfig():
            own = {**_image_attention(config), "attention_head_dim": config.head_dim, "rope_max_seq_len": 1024}
            return {**DENOISER.write(config), **own, "_diffusers_version": DIFFUSERS_VERSION}
        case VAEConfig():
            return {
                **VAE.write(config),
                **_image_channels(config),
                "patch_size": None if config.patch_size == 1 else config.patch_size,
                "dropout": 0.0,
                "scale_factor_temporal": config.temporal_stride,
                "scale_factor_spatial": config.spatial_stride,
                "_diffusers_version": DIFFUSERS_VERSION,
            }
        case TextEncoderConfig():
            own = {"num_decoder_layers": config.num_layers, "torch_dtype": dtype}
            return {**UMT5.write(config), **UMT5_EXTRAS, **own}
        case ImageEncoderConfig():
            return {**CLIP.write(config), **CLIP_EXTRAS, "torch_dtype": dtype}


def _write_preprocessor(folder: Path, image_size: int) -> None:
    folder.mkdir()
    sizes = {"size": {"shortest_edge": image_size}, "crop_size": {"height": image_size, "width": image_size}}
    write_json(folder / "preprocessor_config.json", CLIP_PREPROCESSOR | sizes)


def _sampling(path: Path, index: Mapping[str, Any], config: WanConfig) -> tuple[SamplingConfig, list[str]]:
    """The sampling defaults, and notes: ours where we wrote them, the release's, or for other models diffusers'."""
    release = config.sampling
    if SAMPLING_KEY in index:
        own = value_of(path / INDEX, index, SAMPLING_KEY, SamplingConfig)
        return dataclasses.replace(own, boundary=release.boundary), []
    scheduler = path / "scheduler" / "scheduler_config.json"
    content = read_json(scheduler) if scheduler.is_file() else {}
    shift = value_of(scheduler, content, "flow_shift" if "flow_shift" in content else "shift", float | None)
    if shift is not None and shift <= 0:
        raise InputError(f"{scheduler}: flow_shift {shift:g} must be above 0; download it again")
    if config.name == "custom":
        own = dataclasses.replace(
            DEFAULT_SAMPLING, shift=release.shift if shift is None else shift, boundary=release.boundary
        )
        note = (
            f"{path}: has the structure of no release: shift {own.shift:g} is its scheduler's; size, steps, guidance "
            "and negative prompt are the defaults of diffusers (override them)"
        )
        return own, [note]
    if shift is None or shift == release.shift:
        return release, []
    note = f"flow_shift {shift:g} is not used; the release's shift {release.shift:g} is (override it with shift)"
    return release, [f"{scheduler}: {note}"]
