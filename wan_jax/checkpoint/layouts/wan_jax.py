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
from wan_jax.checkpoint.formats.orbax import OrbaxStore, one_line, write_orbax
from wan_jax.checkpoint.formats.tensors import ReadMany, TensorInfo
from wan_jax.checkpoint.layouts.base import Layout, Opened, first_folder, read_json
from wan_jax.config import (
    DenoiserConfig,
    ImageEncoderConfig,
    PerExpert,
    SamplingConfig,
    TextEncoderConfig,
    VAEConfig,
    WanConfig,
)
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
            components = list(content["components"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{manifest}: damaged or from another version ({one_line(error)}); convert it again"
            ) from None
        parts = {}
        for name in components:
            if not (path / name).is_dir():
                raise InputError(f"{path}: {name}/ is missing; copy or convert the checkpoint again")
            parts[name] = bind_component(name, config.model(name), self.naming, OrbaxStore(path / name))
        return Opened(config, parts, first_folder(path, self.tokenizer))

    def write_component(
        self, folder: Path, component: str, config: WanConfig, tensors: Mapping[str, TensorInfo], read_many: ReadMany
    ) -> None:
        write_orbax(folder / component, tensors, read_many)

    def finish(
        self, folder: Path, config: WanConfig, contents: Mapping[str, Mapping[str, Any]], tokenizer: bool
    ) -> list[str]:
        """Writes the manifest, which makes the folder a checkpoint."""
        content = {"format": FORMAT, "config": dataclasses.asdict(config), "components": contents}
        (folder / MANIFEST).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        return []


def config_from_json(content: Mapping[str, Any]) -> WanConfig:
    """The inverse of dataclasses.asdict and json. Raises TypeError or ValueError for unknown or unusable values."""
    classes: dict[str, type] = {
        "denoiser": DenoiserConfig,
        "text_encoder": TextEncoderConfig,
        "vae": VAEConfig,
        "sampling": SamplingConfig,
        "image_encoder": ImageEncoderConfig,
    }
    sections: dict[str, Any] = {
        name: {key: tuple(value) if isinstance(value, list) else value for key, value in content[name].items()}
        for name in classes
        if name != "image_encoder" or content.get(name) is not None
    }
    sections["sampling"]["guidance"] = PerExpert(*sections["sampling"]["guidance"])
    return WanConfig(**{**content, **{name: classes[name](**fields) for name, fields in sections.items()}})
