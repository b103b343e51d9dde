"""Recognises the layouts in which Wan checkpoints are published and opens each as components.

- diffusers: a tree with model_index.json.
- official: the release's tree, Wan2.2 with one folder per expert or Wan2.1 with the denoiser at the top.
- comfyui: single files, in one folder or in ComfyUI's diffusion_models/, text_encoders/, vae/.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from wan_jax.checkpoint.components import Component, bind_component
from wan_jax.checkpoint.configs import (
    another_family,
    assemble_config,
    diffusers_denoiser_config,
    diffusers_text_encoder_config,
    diffusers_vae_config,
    read_json,
)
from wan_jax.checkpoint.layouts import ModelConfig
from wan_jax.checkpoint.safetensors import open_safetensors_folder
from wan_jax.config import WanConfig
from wan_jax.errors import InputError

Layout = Literal["orbax", "diffusers", "official", "comfyui"]

MANIFEST = "wan_jax.json"


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
    if (path / MANIFEST).is_file():
        return "orbax"
    if (path / "model_index.json").is_file():
        return "diffusers"
    raise InputError(
        f"{path}: not a checkpoint that wan_jax knows (its own, the official tree, a diffusers tree or ComfyUI files)"
    )


def open_diffusers(path: Path) -> Opened:
    """A diffusers tree.

    Its scheduler's flow_shift never decides: published trees hold 3.0 where the release uses 12.
    """
    index_path = path / "model_index.json"
    index = read_json(index_path)
    if index.get("_class_name") != "WanPipeline":
        raise another_family(index_path, f"its pipeline is {index.get('_class_name')}")
    if index.get("expand_timesteps"):
        raise another_family(index_path, "expand_timesteps is set (TI2V-5B)")

    def present(name: str, class_name: str) -> bool:
        library_and_class = index.get(name) or [None, None]
        if library_and_class[1] not in (None, class_name):
            raise another_family(index_path, f"{name} is {library_and_class[1]}, not {class_name}")
        return library_and_class[1] is not None

    if not present("transformer", "WanTransformer3DModel"):
        raise InputError(f"{index_path}: names no transformer; download the whole checkpoint")
    folders = {"denoiser": path / "transformer"}
    if present("transformer_2", "WanTransformer3DModel"):
        folders = {"high_noise": path / "transformer", "low_noise": path / "transformer_2"}

    denoisers = {name: diffusers_denoiser_config(folder / "config.json") for name, folder in folders.items()}
    if len(set(denoisers.values())) > 1:
        raise InputError(f"{path}: the configs of transformer and transformer_2 differ; are they from one release?")
    configs: dict[str, ModelConfig] = dict(denoisers)
    text_encoder = vae = None
    if present("text_encoder", "UMT5EncoderModel"):
        folders["text_encoder"] = path / "text_encoder"
        configs["text_encoder"] = text_encoder = diffusers_text_encoder_config(path / "text_encoder" / "config.json")
    if present("vae", "AutoencoderKLWan"):
        folders["vae"] = path / "vae"
        configs["vae"] = vae = diffusers_vae_config(path / "vae" / "config.json")
    parts = {
        name: bind_component(name, configs[name], "diffusers", open_safetensors_folder(folder))
        for name, folder in folders.items()
    }

    boundary = index.get("boundary_ratio")
    config = assemble_config(
        str(path),
        next(iter(denoisers.values())),
        experts=len(denoisers),
        text_encoder=text_encoder,
        vae=vae,
        boundary=None if boundary is None else float(boundary),
    )
    tokenizer = path / "tokenizer"
    return Opened(config, parts, tokenizer if tokenizer.is_dir() else None, _scheduler_notes(path, config))


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
