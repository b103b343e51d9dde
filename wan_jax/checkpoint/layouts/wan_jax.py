"""Our own layout: one Orbax tree per component, layers unstacked, and a manifest.

    wan_jax.json     format version, config, and what each component holds
    tokenizer/
    text_encoder/  vae/  high_noise/  low_noise/     (or denoiser/) Orbax trees

Names are those of the abstract tree with the layer's index ("blocks.17.self_attention.query.kernel"), so that writing
streams and a reader takes only the layers it needs.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wan_jax.checkpoint.components import bind_component
from wan_jax.checkpoint.formats.orbax import OrbaxStore, write_orbax
from wan_jax.checkpoint.formats.tensors import ReadMany, TensorInfo, brief
from wan_jax.checkpoint.layouts.base import Layout, Opened, first_folder, read_json, typed
from wan_jax.config import WanConfig
from wan_jax.errors import InputError

MANIFEST = "wan_jax.json"
FORMAT = 1


class WanJaxLayout(Layout):
    name = "orbax"
    writes = True
    naming = "wan_jax"

    def recognises(self, path: Path) -> bool:
        return (path / MANIFEST).is_file()

    def open(self, paths: Sequence[Path]) -> Opened:
        (path,) = paths
        manifest = path / MANIFEST
        content = read_json(manifest)
        if content.get("format") != FORMAT:
            raise InputError(
                f"{manifest}: format {content.get('format')!r} is not {FORMAT}; this wan_jax cannot read it: update one"
            )
        try:
            config = config_from_json(content["config"])
            components = {name: dict(held.get("crc32") or {}) for name, held in content["components"].items()}
            allowed = {"text_encoder", "vae", "image_encoder", *config.experts}
            if foreign := components.keys() - allowed:
                raise ValueError(f"{min(foreign)} is no component")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"{manifest}: damaged or from another version ({brief(error)}); convert it again"
            ) from None
        parts = {}
        for name, checksums in components.items():
            if not (path / name).is_dir():
                raise InputError(f"{path}: {name}/ is missing; copy or convert the checkpoint again")
            store = OrbaxStore(path / name, checksums)
            parts[name] = bind_component(name, config.model(name), self.naming, store)
        return Opened(config, parts, first_folder(path, self.tokenizer))

    def write_component(
        self, folder: Path, component: str, config: WanConfig, tensors: Mapping[str, TensorInfo], read_many: ReadMany
    ) -> dict[str, Any]:
        return {"crc32": write_orbax(folder / component, tensors, read_many)}

    def finish(
        self, folder: Path, config: WanConfig, contents: Mapping[str, Mapping[str, Any]], tokenizer: bool
    ) -> list[str]:
        """Writes the manifest, which makes the folder a checkpoint."""
        content = {"format": FORMAT, "config": dataclasses.asdict(config), "components": contents}
        (folder / MANIFEST).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        return []


def config_from_json(content: Mapping[str, Any]) -> WanConfig:
    """The inverse of dataclasses.asdict and json. Raises KeyError or ValueError for unknown or unusable values."""
    for section in ("denoiser", "text_encoder", "vae", "sampling"):
        content[section]  # without it, the defaults are another model's
    return typed(content, WanConfig)
