"""What the layouts share: the interface, config.json files, and models bound to their tables and fitted together."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from wan_jax.checkpoint.components import Component, bind_component
from wan_jax.checkpoint.family import another_family, assemble_config, infer_conditioning, recognition_notes
from wan_jax.checkpoint.formats.tensors import (
    MAX_NUMBER,
    ReadMany,
    TensorInfo,
    TensorStore,
    brief,
    strict_json,
)
from wan_jax.checkpoint.tables import Naming, infer_config
from wan_jax.config import DenoiserConfig, ModelConfig, PerExpert, SamplingConfig, WanConfig
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
    ) -> dict[str, Any] | None:
        """Writes one model, with its config, into the checkpoint's folder.

        Returns what `finish` shall know of it beside what it holds.
        """
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
    image_encoder: tuple[object, Callable[[], StoredModel]] | None = None,
    sampling: Callable[[WanConfig], tuple[SamplingConfig, Sequence[str]]] | None = None,
    tokenizer_folder: Path | None,
    notes: Sequence[str] = (),
) -> Opened:
    """Binds models to their tables and fits them together into one config.

    Args:
        place: the checkpoint's path, for messages.
        models: by component: text_encoder, vae, and either denoiser or high_noise and low_noise.
        conditionings: how the checkpoint says that a denoiser is conditioned, by component.
        boundary: between the experts, where the checkpoint states it.
        image_encoder: its place and what opens it. Where the denoiser attends to no image it is left out, with a note.
        sampling: gives the sampling defaults, and notes, where the checkpoint states any; else they are the release's.
        tokenizer_folder: where the tokenizer is, if anywhere.
        notes: further notes of the layout.

    Raises:
        InputError: they do not fit together, or are not of this family.
    """
    if boundary is not None and not 0 <= boundary <= 1:
        raise InputError(f"{place}: its boundary {boundary:g} between the experts must be 0 to 1; download it again")
    denoisers = {name: model for name, model in models.items() if isinstance(model.config, DenoiserConfig)}
    denoiser = _same_config(place, denoisers)
    conditioning = ""
    for name, model in denoisers.items():
        conditioning = infer_conditioning(model.store.place, denoiser, (conditionings or {}).get(name))
    all_notes = list(notes)
    if image_encoder is not None and denoiser.image_dim is not None:
        models = {**models, "image_encoder": image_encoder[1]()}
    elif image_encoder is not None:
        all_notes.append(ignored(image_encoder[0]))
    parts = {name: bind_component(name, model.config, model.naming, model.store) for name, model in models.items()}
    others: dict[str, Any] = {
        name: models[name].config if name in models else None for name in ("text_encoder", "vae", "image_encoder")
    }
    config = assemble_config(
        str(place), denoiser, conditioning=conditioning, experts=len(denoisers), boundary=boundary, **others
    )
    needed = ["text_encoder", "vae", *(["image_encoder"] if config.image_encoder is not None else [])]
    absent = [name for name in needed if name not in parts]
    all_notes = [*recognition_notes(str(place), config, sampling is not None), *all_notes]
    if sampling is not None:
        stated, sampling_notes = sampling(config)
        config = dataclasses.replace(config, sampling=stated)
        all_notes += sampling_notes
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


def differing_fields(one: Any, other: Any) -> list[str]:
    names = [field.name for field in dataclasses.fields(one)]
    return [name for name in names if getattr(one, name) != getattr(other, name)]


def ignored(place: object) -> str:
    return f"{place}: ignored, it is no part of this model"


def first_folder(path: Path, *candidates: str) -> Path | None:
    return next((path / candidate for candidate in candidates if (path / candidate).is_dir()), None)


# config.json


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object. Raises InputError for anything else."""
    if not path.is_file():
        raise InputError(f"{path}: missing; is the download complete?")
    try:
        return strict_json(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({brief(error)}); download it again") from None


KINDS = {int: "a whole number above 0", float: "a finite number", bool: "true or false", str: "a text"}


def typed(value: Any, hint: Any) -> Any:
    """A value of JSON as what a field of a config is annotated with. Raises ValueError for any other value.

    Whole numbers in configs count something: they are at least 1.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (UnionType, Union):
        return None if value is None and NoneType in arguments else typed(value, arguments[0])
    if origin is PerExpert:
        return PerExpert(*typed(value, tuple[arguments * 2]))  # type: ignore[misc]
    if origin is tuple and isinstance(value, list | tuple):
        kinds = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        if len(kinds) == len(value):
            return tuple(map(typed, value, kinds))
    elif is_dataclass(hint) and isinstance(value, dict):
        hints = get_type_hints(hint)
        if unknown := value.keys() - hints.keys():
            raise ValueError(f"{min(unknown)} is unknown")
        return hint(**{key: typed(item, hints[key]) for key, item in value.items()})  # type: ignore[operator]
    elif hint is int and type(value) is int and 1 <= value <= MAX_NUMBER:
        return value
    elif hint is float and type(value) in (int, float) and abs(value) < math.inf:
        return float(value)
    elif hint in (bool, str) and type(value) is hint:
        return value
    raise ValueError(f"{value!r} is not {KINDS.get(hint) or f'of the form {hint}'}")


def value_of(path: Path, content: Mapping[str, Any], key: str, hint: Any) -> Any:
    """What a config.json says under a key; None: nothing. Raises InputError for a value of another type."""
    try:
        return typed(content[key], hint) if key in content else None
    except ValueError as error:
        raise InputError(f"{path}: {key}: {error}; download it again") from None


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
        hints, keys = get_type_hints(self.model), self.keys
        return {field: value_of(path, content, key, hints[field]) for field, key in keys.items() if key in content}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {**self.fixed, **{key: getattr(config, field) for field, key in self.keys.items()}}


def require(path: Path, content: Mapping[str, Any], required: Mapping[str, Any]) -> None:
    """Raises InputError where the content of a config.json has another value than the family's."""
    for key, wanted in required.items():
        if key in content and content[key] != wanted:
            raise another_family(path, f"{key} is {content[key]!r}, not {wanted!r}")
