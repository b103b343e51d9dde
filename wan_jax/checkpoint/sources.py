"""Recognises the layouts in which Wan checkpoints are published and opens each as components.

- diffusers: a tree with model_index.json.
- official: the release's tree, Wan2.2 with one folder per expert or Wan2.1 with the denoiser at the top.
- comfyui: single files, in one folder or in ComfyUI's diffusion_models/, text_encoders/, clip_vision/, vae/.
- orbax: ours (see orbax.py), with wan_jax.json.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from wan_jax.checkpoint.clip_vision import VisionTowerStore
from wan_jax.checkpoint.comfyui import ComfyFile, choose_files, find_files
from wan_jax.checkpoint.components import Component, bind_component
from wan_jax.checkpoint.configs import (
    another_family,
    diffusers_denoiser_config,
    diffusers_image_encoder_config,
    diffusers_text_encoder_config,
    diffusers_vae_config,
    infer_denoiser_config,
    infer_image_encoder_config,
    infer_text_encoder_config,
    infer_vae_config,
    official_denoiser_config,
    read_json,
)
from wan_jax.checkpoint.family import assemble_config, infer_conditioning, recognition_notes
from wan_jax.checkpoint.layouts import ModelConfig
from wan_jax.checkpoint.orbax import MANIFEST, open_orbax
from wan_jax.checkpoint.safetensors import open_safetensors_folder
from wan_jax.checkpoint.torch_pickle import TorchPickleFile
from wan_jax.config import DenoiserConfig, VAEConfig, WanConfig
from wan_jax.errors import InputError

Layout = Literal["orbax", "diffusers", "official", "comfyui"]

EXPERT_FOLDERS = {"high_noise": "high_noise_model", "low_noise": "low_noise_model"}  # of the official tree
OFFICIAL_TEXT_ENCODER = "models_t5_umt5-xxl-enc-bf16.pth"
OFFICIAL_VAES = ("Wan2.1_VAE.pth", "Wan2.2_VAE.pth")
OFFICIAL_IMAGE_ENCODER = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
OFFICIAL_TOKENIZER = "google/umt5-xxl"
# Of model_index.json -> how the model is conditioned, unless expand_timesteps says that it takes a first frame.
DIFFUSERS_PIPELINES = {"WanPipeline": "text", "WanImageToVideoPipeline": "image_latents"}
INCOMPLETE = "CONVERSION_INCOMPLETE"  # a file that marks what a conversion has not finished


def official_vae(config: VAEConfig) -> str:
    """The name of the file that the official tree keeps such a VAE in."""
    return OFFICIAL_VAES[config.residual]


@dataclass(frozen=True)
class Opened:
    """What a layout's opener found."""

    config: WanConfig
    parts: Mapping[str, Component]
    tokenizer_folder: Path | None
    notes: tuple[str, ...] = ()


def detect(path: Path) -> Layout:
    """Says which layout a path is. Raises InputError for anything else."""
    if not path.exists():
        raise InputError(f"{path}: no such checkpoint")
    if path.is_file():
        if path.suffix == ".safetensors":
            return "comfyui"
        raise InputError(f"{path}: a single file must be .safetensors; otherwise give the checkpoint's folder")
    if (path / INCOMPLETE).exists():
        raise InputError(f"{path}: left by an interrupted conversion; convert again (which removes it) or remove it")
    if (path / MANIFEST).is_file():
        return "orbax"
    if (path / "model_index.json").is_file():
        return "diffusers"
    if any((path / name).exists() for name in (*EXPERT_FOLDERS.values(), *OFFICIAL_VAES)) or _is_official_denoiser(
        path
    ):
        return "official"
    if find_files(path):
        return "comfyui"
    raise InputError(
        f"{path}: not a checkpoint that wan_jax knows (its own, the official tree, a diffusers tree or ComfyUI files)"
    )


def _is_official_denoiser(folder: Path) -> bool:
    """Whether a folder is the official one of a denoiser: by its config.json or, without one, by its files' names."""
    config = folder / "config.json"
    if config.is_file():
        return read_json(config).get("_class_name") == "WanModel"
    return any(folder.glob("diffusion_pytorch_model*.safetensors"))


def open_source(layout: Layout, paths: Sequence[Path]) -> Opened:
    """Opens a checkpoint of a known layout; only ComfyUI files may be several."""
    match layout:
        case "orbax":
            return Opened(*open_orbax(paths[0]))
        case "diffusers":
            return open_diffusers(paths[0])
        case "official":
            return open_official(paths[0])
        case "comfyui":
            return open_comfyui(paths)


def open_diffusers(path: Path) -> Opened:
    """A diffusers tree.

    Its scheduler's flow_shift never decides: published trees hold 3.0 where the release uses 12.
    """
    index_path = path / "model_index.json"
    index = read_json(index_path)
    pipeline = index.get("_class_name")
    if pipeline not in DIFFUSERS_PIPELINES:
        raise another_family(index_path, f"its pipeline is {pipeline}")
    conditioning = "first_frame" if index.get("expand_timesteps") else DIFFUSERS_PIPELINES[pipeline]

    def present(name: str, *class_names: str) -> bool:
        library_and_class = index.get(name) or [None, None]
        if library_and_class[1] not in (None, *class_names):
            raise another_family(index_path, f"{name} is {library_and_class[1]}, not {class_names[0]}")
        return library_and_class[1] is not None

    if not present("transformer", "WanTransformer3DModel"):
        raise InputError(f"{index_path}: names no transformer; download the whole checkpoint")
    folders = {"denoiser": path / "transformer"}
    if present("transformer_2", "WanTransformer3DModel"):
        folders = {"high_noise": path / "transformer", "low_noise": path / "transformer_2"}

    denoisers = {name: diffusers_denoiser_config(folder / "config.json") for name, folder in folders.items()}
    denoiser = _same_config(path, denoisers)
    conditioning = infer_conditioning(path, denoiser, conditioning)
    configs: dict[str, ModelConfig] = dict(denoisers)
    text_encoder = vae = image_encoder = None
    if present("text_encoder", "UMT5EncoderModel"):
        folders["text_encoder"] = path / "text_encoder"
        configs["text_encoder"] = text_encoder = diffusers_text_encoder_config(path / "text_encoder" / "config.json")
    if present("vae", "AutoencoderKLWan"):
        folders["vae"] = path / "vae"
        configs["vae"] = vae = diffusers_vae_config(path / "vae" / "config.json")
    has_image_encoder = present("image_encoder", "CLIPVisionModel", "CLIPVisionModelWithProjection")
    if has_image_encoder and denoiser.image_dim is not None:
        folders["image_encoder"] = path / "image_encoder"
        image_encoder = diffusers_image_encoder_config(path / "image_encoder" / "config.json")
        configs["image_encoder"] = image_encoder
    parts = {
        name: bind_component(name, configs[name], "diffusers", open_safetensors_folder(folder))
        for name, folder in folders.items()
    }

    boundary = index.get("boundary_ratio")
    config = assemble_config(
        str(path),
        denoiser,
        conditioning=conditioning,
        experts=len(denoisers),
        text_encoder=text_encoder,
        vae=vae,
        image_encoder=image_encoder,
        boundary=None if boundary is None else float(boundary),
    )
    notes = [*recognition_notes(str(path), config), *_scheduler_notes(path, config), *_absent(path, config, parts)]
    if has_image_encoder and image_encoder is None:
        notes.append(_unused(path / "image_encoder"))
    return Opened(config, parts, _tokenizer(path, "tokenizer"), tuple(notes))


def open_official(path: Path) -> Opened:
    """The official tree, Wan2.2 or Wan2.1, or the folder of one expert alone."""
    present = {name: path / folder for name, folder in EXPERT_FOLDERS.items() if (path / folder).is_dir()}
    if len(present) == 1:
        missing = next(folder for name, folder in EXPERT_FOLDERS.items() if name not in present)
        raise InputError(f"{path}: {missing}/ is missing; download it, or open the other expert's folder alone")
    folders = present or {"denoiser": path}
    stores = {name: open_safetensors_folder(folder) for name, folder in folders.items()}
    denoisers = {}
    said = {}
    for name, folder in folders.items():
        denoisers[name] = infer_denoiser_config(stores[name].place, stores[name].tensors)
        if (folder / "config.json").is_file():
            denoisers[name], said[name] = official_denoiser_config(folder / "config.json", denoisers[name])
    denoiser = _same_config(path, denoisers)
    conditionings = [infer_conditioning(folders[name], denoiser, said.get(name)) for name in folders]
    parts = {name: bind_component(name, denoiser, "official", stores[name]) for name in folders}

    text_encoder = vae = image_encoder = None
    encoders = sorted(path.glob("models_t5_umt5-xxl-enc-*.pth"))
    if len(encoders) > 1:
        raise InputError(f"{path}: both {encoders[0].name} and {encoders[1].name} are a text encoder; keep one")
    if encoders:
        encoder_file = TorchPickleFile(encoders[0])
        text_encoder = infer_text_encoder_config(encoder_file.place, encoder_file.tensors, "official")
        parts["text_encoder"] = bind_component("text_encoder", text_encoder, "official", encoder_file)
    vaes = [path / name for name in OFFICIAL_VAES if (path / name).is_file()]
    if len(vaes) > 1:
        raise InputError(f"{path}: both {vaes[0].name} and {vaes[1].name} are a VAE; keep the one of this model")
    if vaes:
        vae_file = TorchPickleFile(vaes[0])
        vae = infer_vae_config(vae_file.place, vae_file.tensors)
        parts["vae"] = bind_component("vae", vae, "official", vae_file)
    has_image_encoder = (path / OFFICIAL_IMAGE_ENCODER).is_file()
    if has_image_encoder and denoiser.image_dim is not None:
        tower = VisionTowerStore(TorchPickleFile(path / OFFICIAL_IMAGE_ENCODER))
        image_encoder = infer_image_encoder_config(tower.place, tower.tensors, "official")
        parts["image_encoder"] = bind_component("image_encoder", image_encoder, "official", tower)
    config = assemble_config(
        str(path),
        denoiser,
        conditioning=conditionings[0],
        experts=len(folders),
        text_encoder=text_encoder,
        vae=vae,
        image_encoder=image_encoder,
    )
    notes = [*recognition_notes(str(path), config), *_absent(path, config, parts)]
    if has_image_encoder and image_encoder is None:
        notes.append(_unused(path / OFFICIAL_IMAGE_ENCODER))
    return Opened(config, parts, _tokenizer(path, OFFICIAL_TOKENIZER), tuple(notes))


def open_comfyui(paths: Sequence[Path]) -> Opened:
    """ComfyUI files: a folder of them, one file, or several (such as the two experts)."""
    place = ", ".join(map(str, paths))
    files = [ComfyFile(file) for path in paths for file in (find_files(path) if path.is_dir() else [path])]
    chosen, others = choose_files(files, place)
    denoisers = {
        name: infer_denoiser_config(file.place, file.tensors)
        for name, file in chosen.items()
        if file.role == "denoiser"
    }
    if not denoisers:
        raise InputError(f"{place}: holds no denoiser of Wan; give the folder or file with the diffusion model")
    denoiser = _same_config(place, denoisers)
    conditioning = infer_conditioning(place, denoiser)
    parts = {name: bind_component(name, denoiser, "official", chosen[name]) for name in denoisers}
    text_encoder = vae = image_encoder = None
    if file := chosen.get("text_encoder"):
        text_encoder = infer_text_encoder_config(file.place, file.tensors, file.naming)
        parts["text_encoder"] = bind_component("text_encoder", text_encoder, file.naming, file)
    if file := chosen.get("vae"):
        vae = infer_vae_config(file.place, file.tensors)
        parts["vae"] = bind_component("vae", vae, file.naming, file)
    if (file := chosen.get("image_encoder")) and denoiser.image_dim is None:
        others.append(file)
    elif file:
        tower = VisionTowerStore(file) if file.naming == "official" else file
        image_encoder = infer_image_encoder_config(tower.place, tower.tensors, file.naming)
        parts["image_encoder"] = bind_component("image_encoder", image_encoder, file.naming, tower)
    config = assemble_config(
        place,
        denoiser,
        conditioning=conditioning,
        experts=len(denoisers),
        text_encoder=text_encoder,
        vae=vae,
        image_encoder=image_encoder,
    )
    notes = recognition_notes(place, config)
    notes += [f"{file.place}: stored in float8, dequantised when read" for file in chosen.values() if file.quantized]
    notes += [_unused(file.path) for file in others]
    folder = paths[0] if paths[0].is_dir() else paths[0].parent
    tokenizer = _tokenizer(folder, "tokenizer", OFFICIAL_TOKENIZER)
    return Opened(config, parts, tokenizer, (*notes, *_absent(place, config, parts)))


def _same_config(place: object, denoisers: Mapping[str, DenoiserConfig]) -> DenoiserConfig:
    first, *rest = denoisers.values()
    for config in rest:
        if config != first:
            name = next(
                field.name for field in fields(first) if getattr(first, field.name) != getattr(config, field.name)
            )
            raise InputError(
                f"{place}: the two experts differ: {name} is {getattr(first, name)} and {getattr(config, name)}; are "
                "they from one release?"
            )
    return first


def _tokenizer(path: Path, *candidates: str) -> Path | None:
    return next((path / candidate for candidate in candidates if (path / candidate).is_dir()), None)


def _unused(place: Path) -> str:
    return f"{place}: ignored, it is no part of this model"


def _absent(place: object, config: WanConfig, parts: Mapping[str, Component]) -> list[str]:
    needed = ["text_encoder", "vae"] + (["image_encoder"] if config.image_encoder is not None else [])
    names = [name for name in needed if name not in parts]
    return [f"{place}: holds no {' and no '.join(names)}"] if names else []


def _scheduler_notes(path: Path, config: WanConfig) -> tuple[str, ...]:
    scheduler = path / "scheduler" / "scheduler_config.json"
    if not scheduler.is_file():
        return ()
    content = read_json(scheduler)
    shift = content.get("flow_shift", content.get("shift"))
    if shift is None or float(shift) == config.sampling.shift:
        return ()
    return (
        f"{scheduler}: flow_shift {float(shift):g} is not used; the release's shift {config.sampling.shift:g} is "
        "(override it with shift)",
    )
