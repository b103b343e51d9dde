"""What the layouts share: the interface, config.json files, and models bound to their tables and fitted together."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wan_jax.checkpoint.components import Component, bind_component
from wan_jax.checkpoint.family import another_family, assemble_config, infer_conditioning, recognition_notes
from wan_jax.checkpoint.formats.tensors import ReadMany, TensorInfo, TensorStore
from wan_jax.checkpoint.tables import Naming, infer_config
from wan_jax.config import DenoiserConfig, ModelConfig, WanConfig
from wan_jax.errors import InputError

DIFFUSERS_VERSION = "0.36.0"  # written into config.json: the oldest we test with; loaders only compare it


@dataclass(frozen=True)
class Opened:
    """What a layout found in its files."""

    config: WanConfig
    parts: Mapping[str, Component]
    tokenizer_folder: Path | None
    notes: tuple[str, ...] = ()  # what the user should know, one line each


class Layout:
    """One way in which checkpoints are laid out in files. Layouts that only read leave `writes` False."""

    name: str  # as users read and write it
    writes = False
    naming: Naming  # of the tensors that it writes
    tokenizer = "tokenizer"  # the folder that it writes
    takes_several_paths = False

    def recognises(self, path: Path) -> bool:
        """Whether the folder or file is laid out like this, by names of files alone where they tell."""
        raise NotImplementedError

    def open(self, paths: Sequence[Path]) -> Opened:
        """Reads headers and configs, and verifies every name and shape. Raises InputError, one line."""
        raise NotImplementedError

    def check_can_hold(self, config: WanConfig, components: Sequence[str]) -> None:
        """Raises InputError for a config that would not be read back from this layout."""

    def write_component(
        self, folder: Path, component: str, config: WanConfig, tensors: Mapping[str, TensorInfo], read_many: ReadMany
    ) -> None:
        """Writes one model, with its config, into the checkpoint's folder."""
        raise NotImplementedError

    def finish(
        self, folder: Path, config: WanConfig, contents: Mapping[str, Mapping[str, Any]], tokenizer: bool
    ) -> list[str]:
        """Writes, after all models, the files about the whole. Returns notes.

        Args:
            folder: the checkpoint's.
            config: the checkpoint's.
            contents: what each component holds, as JSON, by its name.
            tokenizer: whether the folder has one.
        """
        return []


@dataclass(frozen=True)
class StoredModel:
    """A model's tensors and the config that describes them."""

    config: ModelConfig
    naming: Naming
    store: TensorStore

    @classmethod
    def infer(cls, model: type, store: TensorStore, naming: Naming = "official") -> "StoredModel":
        """The config from the shapes of the tensors."""
        return cls(infer_config(model, store.place, store.tensors, naming), naming, store)


def assemble(
    place: object,
    models: Mapping[str, StoredModel],
    *,
    conditionings: Mapping[str, str] | None = None,
    boundary: float | None = None,
    tokenizer_folder: Path | None,
    notes: Sequence[str] = (),
) -> Opened:
    """Binds models to their tables and fits them together into one config.

    Args:
        place: the checkpoint's path, for messages.
        models: by component: text_encoder, vae, image_encoder, and either denoiser or high_noise and low_noise. An
            image encoder that the denoiser does not attend to is left out, with a note.
        conditionings: how the checkpoint says that a denoiser is conditioned, by component.
        boundary: between the experts, where the checkpoint states it.
        tokenizer_folder: where the tokenizer is, if anywhere.
        notes: further notes of the layout.

    Raises:
        InputError: they do not fit together, or are not of this family.
    """
    denoisers = {name: model for name, model in models.items() if isinstance(model.config, DenoiserConfig)}
    denoiser = _same_config(place, denoisers)
    conditioning = ""
    for name, model in denoisers.items():
        conditioning = infer_conditioning(model.store.place, denoiser, (conditionings or {}).get(name))
    unused = []
    if denoiser.image_dim is None and "image_encoder" in models:
        unused = [ignored(models["image_encoder"].store.place)]
        models = {name: model for name, model in models.items() if name != "image_encoder"}
    parts = {name: bind_component(name, model.config, model.naming, model.store) for name, model in models.items()}
    others: dict[str, Any] = {
        name: models[name].config if name in models else None for name in ("text_encoder", "vae", "image_encoder")
    }
    config = assemble_config(
        str(place), denoiser, conditioning=conditioning, experts=len(denoisers), boundary=boundary, **others
    )
    needed = ["text_encoder", "vae", *(["image_encoder"] if config.image_encoder is not None else [])]
    absent = [name for name in needed if name not in parts]
    all_notes = [*recognition_notes(str(place), config), *notes, *unused]
    if absent:
        all_notes.append(f"{place}: holds no {' and no '.join(absent)}")
    return Opened(config, parts, tokenizer_folder, tuple(all_notes))


def _same_config(place: object, denoisers: Mapping[str, StoredModel]) -> DenoiserConfig:
    first, *rest = (model.config for model in denoisers.values())
    assert isinstance(first, DenoiserConfig)
    for config in rest:
        if config != first:
            name = differing_fields(first, config)[0]
            raise InputError(
                f"{place}: the two experts differ: {name} is {getattr(first, name)} and {getattr(config, name)}; are "
                "they from one release?"
            )
    return first


def differing_fields(one: ModelConfig, other: ModelConfig) -> list[str]:
    names = [field.name for field in dataclasses.fields(one)]
    return [name for name in names if getattr(one, name) != getattr(other, name)]


def ignored(place: object) -> str:
    return f"{place}: ignored, it is no part of this model"


def first_folder(path: Path, *candidates: str) -> Path | None:
    return next((path / candidate for candidate in candidates if (path / candidate).is_dir()), None)


# config.json


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object. Raises InputError for anything else."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: missing; is the download complete?") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a JSON object; download it again")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


@dataclass(frozen=True)
class ConfigKeys:
    """What config.json says of one kind of model.

    Attributes:
        model: the type of its config.
        table: our fields, each "field" or "field=key" where the key there is another.
        fixed: keys whose values every model of this family has.
    """

    model: type
    table: str
    fixed: Mapping[str, Any]

    @property
    def keys(self) -> dict[str, str]:
        """Our fields -> the keys there."""
        return {entry.partition("=")[0]: entry.rpartition("=")[2] for entry in self.table.split()}

    def read(self, path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of our config that the content of a file has, as the right types.

        Raises InputError for a model of another family and for a value of another type.
        """
        require(path, content, self.fixed)
        defaults = self.model()
        fields: dict[str, Any] = {}
        for field, key in self.keys.items():
            if key not in content:
                continue
            default, value = getattr(defaults, field), content[key]
            try:
                if default is None:  # every field that is None by default is a whole number where it is set
                    fields[field] = int(value)
                elif isinstance(default, tuple):
                    fields[field] = tuple(type(default[0])(item) for item in value)
                else:
                    fields[field] = type(default)(value)
            except (TypeError, ValueError):
                raise InputError(f"{path}: {key} is {value!r}, which is not a {type(default).__name__}") from None
        return fields

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {**self.fixed, **{key: getattr(config, field) for field, key in self.keys.items()}}


def require(path: Path, content: Mapping[str, Any], required: Mapping[str, Any]) -> None:
    """Raises InputError where the content of a config.json has another value than the family's."""
    for key, wanted in required.items():
        if key in content and content[key] != wanted:
            raise another_family(path, f"{key} is {content[key]!r}, not {wanted!r}")
