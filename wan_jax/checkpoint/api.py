"""Opens a checkpoint of any layout and loads its models: the one door to weights."""

import dataclasses
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from wan_jax import assets
from wan_jax.checkpoint.components import Component, Shardings, load_component
from wan_jax.checkpoint.formats.tensors import Progress, TensorInfo, brief, readable
from wan_jax.checkpoint.hub import local_checkpoint
from wan_jax.checkpoint.layouts import recognise
from wan_jax.config import WanConfig
from wan_jax.errors import InputError
from wan_jax.text.tokenizer import check_whole


@dataclass(frozen=True)
class ComponentInfo:
    """One model of a checkpoint. str() is for people."""

    name: str
    tensors: int
    parameters: int
    nbytes: int
    dtypes: Mapping[str, int]  # dtype -> number of tensors, the most frequent first

    def as_json(self) -> dict[str, Any]:
        return {
            "tensors": self.tensors,
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "dtypes": dict(self.dtypes),
        }

    def __str__(self) -> str:
        dtypes = " + ".join(self.dtypes)
        return (
            f"{self.name:<13} {self.parameters:>15,} parameters in {self.tensors:>5,} tensors, "
            f"{readable(self.nbytes):>9}, {dtypes}"
        )


def describe(component: Component, tensors: Mapping[str, TensorInfo]) -> ComponentInfo:
    """Sums up a component whose tensors are (to be) stored like this."""
    dtypes = Counter(info.dtype.name for info in tensors.values())
    nbytes = sum(info.nbytes for info in tensors.values())
    return ComponentInfo(component.name, len(tensors), component.size, nbytes, dict(dtypes.most_common()))


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint is. str() is for people."""

    path: str
    layout: str
    model: str
    components: tuple[ComponentInfo, ...]
    tokenizer: bool
    notes: tuple[str, ...]

    @property
    def parameters(self) -> int:
        return sum(component.parameters for component in self.components)

    @property
    def nbytes(self) -> int:
        return sum(component.nbytes for component in self.components)

    def __str__(self) -> str:
        return "\n".join(
            [
                f"{self.path}: {self.model}, {self.layout} layout, {self.parameters:,} parameters, "
                f"{readable(self.nbytes)}, {'with' if self.tokenizer else 'without'} tokenizer",
                *map(str, self.components),
                *(f"note: {note}" for note in self.notes),
            ]
        )


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint: headers and configs are read and verified, the data is not touched until `load`."""

    path: Path
    layout: str
    config: WanConfig
    parts: Mapping[str, Component]
    tokenizer_folder: Path | None
    notes: tuple[str, ...]  # what the user should know, one line each

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the models that it holds: text_encoder, vae, image_encoder and the denoisers of `config.experts`."""
        return tuple(self.parts)

    def part(self, component: str) -> Component:
        """Raises InputError where the checkpoint has no such component."""
        if component not in self.parts:
            raise InputError(f"{self.path}: has no {component}; it holds {', '.join(self.parts)}")
        return self.parts[component]

    def load(
        self,
        component: str,
        dtype: DTypeLike = jnp.bfloat16,
        sharding: Shardings = None,
        progress: Progress | None = None,
        *,
        vae_dtype: DTypeLike = jnp.float32,
    ) -> dict[str, jax.Array]:
        """Reads one model onto its devices, keyed and stacked as in its abstract tree (parameters.py).

        Host memory beside the result stays at one stacked parameter.

        Args:
            component: one of `components`.
            dtype: of the text encoder and the denoisers. The image encoder is always float32: it runs once, on a few
                hundred tokens.
            sharding: one for every parameter, or one per name.
            progress: called as progress(component, bytes done, bytes in all) after every tensor.
            vae_dtype: of the VAE: the official pipeline runs it in float32 whatever the rest.

        Raises:
            InputError: a component that is absent, or a file that changed since it was opened.
        """
        part = self.part(component)
        total = part.nbytes
        dtypes = {"vae": vae_dtype, "image_encoder": jnp.float32}
        return load_component(
            part,
            np.dtype(dtypes.get(component, dtype)),
            sharding,
            lambda done: progress(component, done, total) if progress else None,
        )

    def info(self) -> CheckpointInfo:
        """A summary for people."""
        components = tuple(
            describe(part, {mapping.name: part.info(mapping) for mapping in part.table}) for part in self.parts.values()
        )
        return CheckpointInfo(
            str(self.path), self.layout, self.config.name, components, self.tokenizer_folder is not None, self.notes
        )


def open_checkpoint(path: str | os.PathLike | Sequence[str | os.PathLike] | None) -> Checkpoint:
    """Opens a checkpoint of any layout (checkpoint/layouts) and verifies every name, shape and dtype.

    Args:
        path: a folder, a file, or a hub id ("organisation/name"), which is downloaded; None for the nano model, which
            ships with the package. Several paths are ComfyUI files of one model, such as the two experts.

    Raises:
        InputError: anything is missing, damaged, unexpected or of another family; one line.
    """
    if path is None:
        return _open_nano()
    items = [path] if isinstance(path, str | os.PathLike) else path
    if not isinstance(items, list | tuple) or not all(isinstance(item, str | os.PathLike) for item in items):
        raise TypeError(f"path must be a path, a hub id or a list of files, not {type(path).__name__}")
    if not items:
        raise InputError("no checkpoint given; name a folder or files")
    try:
        return _open([local_checkpoint(item) for item in items])
    except OSError as error:
        raise InputError(f"checkpoint {items[0]} cannot be read ({brief(error)})") from None


def _open(paths: Sequence[Path]) -> Checkpoint:
    layouts = [recognise(item) for item in paths]
    if len(paths) > 1 and not all(layout.takes_several_paths for layout in layouts):
        raise InputError(f"{paths[0]} and {paths[1]}: only ComfyUI files can be opened together; give one folder")
    opened = layouts[0].open(paths)
    if opened.tokenizer_folder is not None:
        check_whole(opened.tokenizer_folder)
    return Checkpoint(paths[0], layouts[0].name, opened.config, opened.parts, opened.tokenizer_folder, opened.notes)


def _open_nano() -> Checkpoint:
    if not assets.NANO_WEIGHTS.is_dir():
        raise InputError("no checkpoint given, and this installation lacks the nano model; give a checkpoint")
    checkpoint = open_checkpoint(assets.NANO_WEIGHTS)
    note = "no checkpoint given: this is the nano model, which knows coloured shapes and digits that move"
    return dataclasses.replace(checkpoint, notes=(note, *checkpoint.notes))
