"""The official layout: the release's tree, Wan2.2 with a folder per expert or Wan2.1 with the denoiser at the top.

The text encoder, the VAE and CLIP are .pth files without configs; their shapes tell the configs. A folder of one expert
alone is a checkpoint, too.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from wan_jax.checkpoint.family import another_family
from wan_jax.checkpoint.formats.safetensors import open_safetensors_folder, write_safetensors
from wan_jax.checkpoint.formats.tensors import BFLOAT16, ReadMany, TensorInfo, visible_files
from wan_jax.checkpoint.formats.torch_pickle import TorchPickleFile, write_torch_pickle
from wan_jax.checkpoint.layouts.base import (
    DIFFUSERS_VERSION,
    ConfigKeys,
    Layout,
    Opened,
    StoredModel,
    assemble,
    differing_fields,
    first_folder,
    read_json,
    value_of,
    write_json,
)
from wan_jax.checkpoint.tables import expanded_table, infer_config
from wan_jax.checkpoint.tables.image_encoder import OfficialClipStore, as_official_clip
from wan_jax.config import DenoiserConfig, ImageEncoderConfig, TextEncoderConfig, VAEConfig, WanConfig
from wan_jax.errors import InputError, located

EXPERT_FOLDERS = {"high_noise": "high_noise_model", "low_noise": "low_noise_model"}
TEXT_ENCODER = "models_t5_umt5-xxl-enc-bf16.pth"
VAES = ("Wan2.1_VAE.pth", "Wan2.2_VAE.pth")
IMAGE_ENCODER = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
TOKENIZER = "google/umt5-xxl"
DENOISER = ConfigKeys(
    DenoiserConfig,
    "num_layers dim num_heads ffn_dim in_channels=in_dim out_channels=out_dim text_length=text_len freq_dim eps",
    {"_class_name": "WanModel"},
)
# model_type of config.json -> how the model is conditioned.
MODEL_TYPES = {"t2v": "text", "i2v": "image_latents", "flf2v": "image_latents", "ti2v": "first_frame"}


def vae_file(config: VAEConfig) -> str:
    """The name of the file that holds such a VAE."""
    return VAES[config.residual]


def model_type(config: WanConfig) -> str:
    """What config.json calls such a model: the inverse of MODEL_TYPES."""
    if config.denoiser.image_position_length is not None:
        return "flf2v"
    return next(name for name, conditioning in MODEL_TYPES.items() if conditioning == config.conditioning)


class OfficialLayout(Layout):
    name = "official"
    writes = True
    naming = "official"
    tokenizer = TOKENIZER

    def recognises(self, path: Path) -> bool:
        if any((path / name).exists() for name in (*EXPERT_FOLDERS.values(), *VAES)):
            return True
        config = path / "config.json"
        if config.is_file():
            return read_json(config).get("_class_name") == DENOISER.fixed["_class_name"]
        return bool(visible_files(path, "diffusion_pytorch_model*.safetensors"))

    def open(self, paths: Sequence[Path]) -> Opened:
        (path,) = paths
        present = {name: path / folder for name, folder in EXPERT_FOLDERS.items() if (path / folder).is_dir()}
        if len(present) == 1:
            missing = next(folder for name, folder in EXPERT_FOLDERS.items() if name not in present)
            raise InputError(f"{path}: {missing}/ is missing; download it, or open the other expert's folder alone")
        models: dict[str, StoredModel] = {}
        conditionings: dict[str, str] = {}
        for name, folder in (present or {"denoiser": path}).items():
            models[name] = StoredModel.infer(DenoiserConfig, open_safetensors_folder(folder))
            if (folder / "config.json").is_file():
                models[name], conditioning = _with_config(models[name], folder / "config.json")
                conditionings |= {} if conditioning is None else {name: conditioning}
        encoder = _only_one(path, "text encoder", visible_files(path, "models_t5_umt5-xxl-enc-*.pth"))
        if encoder is not None:
            models["text_encoder"] = StoredModel.infer(TextEncoderConfig, TorchPickleFile(encoder))
        vae = _only_one(path, "VAE", [path / name for name in VAES if (path / name).is_file()])
        if vae is not None:
            models["vae"] = StoredModel.infer(VAEConfig, TorchPickleFile(vae))
        clip = path / IMAGE_ENCODER
        return assemble(
            path,
            models,
            conditionings=conditionings,
            image_encoder=(clip, partial(_open_clip, clip)) if clip.is_file() else None,
            tokenizer_folder=first_folder(path, TOKENIZER),
        )

    def check_can_hold(self, config: WanConfig, components: Sequence[str]) -> None:
        """Only denoisers have a config.json, so what shapes do not tell must be the released values."""
        for component in components:
            model = config.model(component)
            tensors = {
                mapping.stored_name("official"): TensorInfo(mapping.torch_shape, BFLOAT16, "")
                for mapping in expanded_table(model)
            }
            inferred = infer_config(type(model), f"{component} in the official layout", tensors, "official")
            if isinstance(model, DenoiserConfig):
                inferred = dataclasses.replace(inferred, **{name: getattr(model, name) for name in DENOISER.keys})
            if lost := differing_fields(model, inferred):
                raise InputError(
                    f"the official layout has no place for {component}'s {', '.join(lost)}; convert to orbax or "
                    "diffusers"
                )

    def write_component(
        self, folder: Path, component: str, config: WanConfig, tensors: Mapping[str, TensorInfo], read_many: ReadMany
    ) -> None:
        if component == "text_encoder":
            write_torch_pickle(folder / TEXT_ENCODER, tensors, read_many)
        elif component == "vae":
            write_torch_pickle(folder / vae_file(config.vae), tensors, read_many)
        elif component == "image_encoder":
            write_torch_pickle(folder / IMAGE_ENCODER, *as_official_clip(tensors, read_many))
        else:
            if component in EXPERT_FOLDERS:
                folder = folder / EXPERT_FOLDERS[component]
                folder.mkdir()
            content = {"model_type": model_type(config), "_diffusers_version": DIFFUSERS_VERSION}
            write_json(folder / "config.json", {**DENOISER.write(config.denoiser), **content})
            write_safetensors(folder, "diffusion_pytorch_model", tensors, read_many)

    def finish(
        self, folder: Path, config: WanConfig, contents: Mapping[str, Mapping[str, Any]], tokenizer: bool
    ) -> list[str]:
        if "image_encoder" not in contents:
            return []
        return [
            f"{IMAGE_ENCODER}: written without CLIP's text tower, which the official code asks for (and does not use); "
            "for that code, put the release's file in its place"
        ]


def _open_clip(file: Path) -> StoredModel:
    return StoredModel.infer(ImageEncoderConfig, OfficialClipStore(TorchPickleFile(file)))


def _with_config(model: StoredModel, path: Path) -> tuple[StoredModel, str | None]:
    """The model with what its config.json says, and its conditioning where the file tells.

    The file lacks patch_size, text_dim and what concerns images, which the tensors tell.
    """
    content = read_json(path)
    fields = DENOISER.read(path, content)
    kind = value_of(path, content, "model_type", str | None)
    if kind is not None and kind not in MODEL_TYPES:
        raise another_family(path, f"model_type is {kind!r}, not one of {', '.join(MODEL_TYPES)}")
    with located(path):
        config = dataclasses.replace(model.config, **fields)
    return dataclasses.replace(model, config=config), None if kind is None else MODEL_TYPES[kind]


def _only_one(path: Path, kind: str, files: Sequence[Path]) -> Path | None:
    if len(files) > 1:
        raise InputError(f"{path}: both {files[0].name} and {files[1].name} are a {kind}; keep the one of this model")
    return files[0] if files else None
