"""Our own checkpoints: one Orbax tree per component, layers unstacked, and a manifest.

    wan_jax.json     format version, config, and what each component holds
    tokenizer/
    text_encoder/  vae/  high_noise/  low_noise/     (or denoiser/) Orbax trees

Names are those of the abstract tree with the layer's index ("blocks.17.self_attention.query.kernel"), so that writing
streams and a reader takes only the layers it needs.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
from orbax.checkpoint import v1 as ocp

from wan_jax.checkpoint.components import Component, bind_component
from wan_jax.checkpoint.configs import read_json
from wan_jax.checkpoint.layouts import component_config
from wan_jax.checkpoint.tensors import Box, ReadMany, TensorInfo, TensorStore, cast, split_by_bytes
from wan_jax.config import DenoiserConfig, ImageEncoderConfig, SamplingConfig, TextEncoderConfig, VAEConfig, WanConfig
from wan_jax.errors import InputError

MANIFEST = "wan_jax.json"
TOKENIZER = "tokenizer"
ARRAYS = "state"  # Orbax's own folder in a tree
FORMAT = 1

WRITE_BYTES = 1 << 30  # held in memory per call that saves; fewer calls make the final merge of metadata cheaper
READ_BYTES = 512 << 20  # the same per call that loads; a call for each small tensor would take longer than its data
CHUNK_BYTES = 64 << 20  # a process that needs a slice of a parameter reads whole chunks


class OrbaxStore(TensorStore):
    """The Orbax tree of one component. Raises InputError where Orbax cannot read it."""

    def __init__(self, folder: Path):
        self.place = str(folder)
        self._folder = folder.resolve()
        try:
            self._metadata: Mapping[str, Any] = ocp.metadata(self._folder).metadata
            self.tensors = {
                name: TensorInfo(tuple(leaf.shape), np.dtype(leaf.dtype), self.place)
                for name, leaf in self._metadata.items()
            }
        except Exception as error:  # Orbax has no exception of its own for a damaged checkpoint
            raise InputError(
                f"{self.place}: not a readable Orbax tree ({_one_line(error)}); convert it again"
            ) from None

    def read(self, name: str, dtype: np.dtype | None = None) -> np.ndarray:
        return next(self.read_many([name], dtype))

    def read_box(self, name: str, box: Box, dtype: np.dtype | None = None) -> np.ndarray:
        """Reads the chunks that the box touches, by tensorstore itself: Orbax reads parts only to devices."""
        place = {"driver": "ocdbt", "base": f"file://{self._folder}/{ARRAYS}/", "path": f"{name}/"}
        try:
            array = tensorstore.open({"driver": "zarr3", "kvstore": place}, open=True, read=True).result()
            return cast(array[box].read().result(), dtype)
        except ValueError as error:  # as tensorstore says everything
            raise InputError(f"{self.place}: {name} cannot be read ({_one_line(error)}); convert it again") from None

    def read_many(self, names: Sequence[str], dtype: np.dtype | None = None) -> Iterator[np.ndarray]:
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        for group in split_by_bytes({name: self.tensors[name] for name in names}, READ_BYTES):
            try:
                with context:
                    arrays = ocp.load(self._folder, {name: self._metadata[name] for name in group})
            except Exception as error:
                raise InputError(f"{self.place}: cannot be read ({_one_line(error)}); convert it again") from None
            for name in group:
                yield cast(arrays.pop(name), dtype)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


def write_orbax(folder: Path, tensors: Mapping[str, TensorInfo], read_many: ReadMany) -> None:
    """Writes one component's tree, group by group; until it is complete it stands under another name."""
    context = ocp.Context()
    context.array.saving.use_compression = False  # weights are noise to a general compressor
    context.array.saving.enable_write_sharding_file = False
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    folder = folder.resolve()
    with context:
        for group in split_by_bytes(tensors, WRITE_BYTES):
            ocp.partial.save(folder, dict(zip(group, read_many(list(group)), strict=True)))
        ocp.partial.finalize(folder)


def write_manifest(folder: Path, config: WanConfig, components: Mapping[str, Mapping[str, Any]]) -> None:
    """Makes the folder a checkpoint; to be written last. `components` says what each one holds."""
    content = {"format": FORMAT, "config": dataclasses.asdict(config), "components": components}
    (folder / MANIFEST).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def open_orbax(path: Path) -> tuple[WanConfig, dict[str, Component], Path | None]:
    """Config, components and tokenizer of a checkpoint of ours. Raises InputError where anything is amiss."""
    manifest = path / MANIFEST
    content = read_json(manifest)
    if content.get("format") != FORMAT:
        raise InputError(
            f"{manifest}: format {content.get('format')!r} is not {FORMAT}; this wan_jax cannot read it: update one"
        )
    try:
        config = config_from_json(content["config"])
        names = list(content["components"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{manifest}: damaged or from another version ({_one_line(error)}); convert it again"
        ) from None
    parts = {}
    for name in names:
        if not (path / name).is_dir():
            raise InputError(f"{path}: {name}/ is missing; copy or convert the checkpoint again")
        parts[name] = bind_component(name, component_config(config, name), "ours", OrbaxStore(path / name))
    tokenizer = path / TOKENIZER
    return config, parts, tokenizer if tokenizer.is_dir() else None


def config_from_json(content: Mapping[str, Any]) -> WanConfig:
    """The inverse of dataclasses.asdict and json. Raises TypeError or ValueError for unknown or unusable values."""
    classes = {
        "denoiser": DenoiserConfig,
        "text_encoder": TextEncoderConfig,
        "vae": VAEConfig,
        "sampling": SamplingConfig,
    }
    sections: dict[str, Any] = {name: make(**_tuples(content[name])) for name, make in classes.items()}
    if content.get("image_encoder") is not None:
        sections["image_encoder"] = ImageEncoderConfig(**_tuples(content["image_encoder"]))
    return WanConfig(**{**content, **sections})


def _tuples(section: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in section.items()}
