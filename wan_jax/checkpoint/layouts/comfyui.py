"""ComfyUI's layout: single files, in one folder or in diffusion_models/, text_encoders/, clip_vision/, vae/.

The denoiser and the VAE keep the official names, the text encoder HuggingFace's, the image encoder (CLIP) either. In
an "fp8_scaled" file a layer's weight is float8 and a scale stands beside it: W = float8 * scale, one scale per tensor
or one per output row. Which model a file holds is told by the names inside.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from wan_jax.checkpoint.formats.safetensors import SafetensorsFile
from wan_jax.checkpoint.formats.tensors import (
    BFLOAT16,
    FLOAT8_DTYPES,
    WEIGHT_DTYPES,
    TensorInfo,
    TensorStore,
    cast,
    visible_files,
)
from wan_jax.checkpoint.layouts.base import Layout, Opened, StoredModel, assemble, first_folder, ignored
from wan_jax.checkpoint.tables import Naming
from wan_jax.checkpoint.tables.image_encoder import OfficialClipStore
from wan_jax.config import DenoiserConfig, ImageEncoderConfig, TextEncoderConfig, VAEConfig
from wan_jax.errors import InputError

# Where ComfyUI and its repackaged downloads keep the files.
FOLDERS = (
    "",
    *(
        f"{parent}{name}"
        for parent in ("", "models/", "split_files/")
        for name in ("diffusion_models", "unet", "text_encoders", "clip", "clip_vision", "vae")
    ),
)
PREFIXES = ("model.diffusion_model.", "diffusion_model.")
SCALES = (".scale_weight", ".weight_scale")  # the two spellings of a layer's scale
# Hints and markers without meaning for the values: activation scales, the file's fp8 type, an embedded tokenizer.
IGNORED_ENDINGS = (".scale_input", ".input_scale", ".comfy_quant")
IGNORED_NAMES = ("scaled_fp8", "spiece_model")

# What a file is: a type of config and a naming by names that all must be there.
_EVIDENCE: tuple[tuple[type, Naming, tuple[str, ...]], ...] = (
    (DenoiserConfig, "official", ("patch_embedding.weight", "head.head.weight")),
    (TextEncoderConfig, "diffusers", ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",)),
    (VAEConfig, "official", ("conv2.weight", "decoder.conv1.weight", "decoder.middle.1.to_qkv.weight")),
    (ImageEncoderConfig, "official", ("visual.cls_embedding", "visual.pre_norm.weight")),
    (
        ImageEncoderConfig,
        "diffusers",
        ("vision_model.embeddings.class_embedding", "vision_model.pre_layrnorm.weight"),
    ),
    (ImageEncoderConfig, "diffusers", ("embeddings.class_embedding", "pre_layrnorm.weight")),
)
_COMPONENTS = {TextEncoderConfig: "text_encoder", VAEConfig: "vae", ImageEncoderConfig: "image_encoder"}


class ComfyUILayout(Layout):
    name = "comfyui"
    takes_several_paths = True

    def recognises(self, path: Path) -> bool:
        return path.suffix == ".safetensors" if path.is_file() else bool(_find_files(path))

    def open(self, paths: Sequence[Path]) -> Opened:
        place = ", ".join(map(str, paths))
        files = [ComfyFile(file) for path in paths for file in (_find_files(path) if path.is_dir() else [path])]
        chosen = _choose_files(files, place)
        if not any(file.kind is DenoiserConfig for file in chosen.values()):
            raise InputError(f"{place}: holds no denoiser of Wan; give the folder or file with the diffusion model")
        notes = [f"{file.place}: stored in float8, dequantised when read" for file in chosen.values() if file.quantized]
        notes += [ignored(file.path) for file in files if file.kind is None]
        folder = paths[0] if paths[0].is_dir() else paths[0].parent
        encoder = chosen.pop("image_encoder", None)
        return assemble(
            place,
            {component: file.as_model() for component, file in chosen.items()},
            image_encoder=None if encoder is None else (encoder.path, encoder.as_model),
            tokenizer_folder=first_folder(folder, "tokenizer", "google/umt5-xxl"),
            notes=notes,
        )


def _find_files(folder: Path) -> list[Path]:
    return [file for name in FOLDERS for file in visible_files(folder / name, "*.safetensors")]


class ComfyFile(TensorStore):
    """One file: prefixes stripped, markers hidden, fp8 weights dequantised when read.

    Dequantised weights are described as bfloat16. Raises InputError for scales that do not fit.
    """

    def __init__(self, path: Path):
        self._file = SafetensorsFile(path)
        self.path = path
        self.place = self._file.place
        stored: dict[str, str] = {}
        for name in self._file.tensors:
            if _without_prefix(name) in stored:
                raise InputError(f"{self.place}: {_without_prefix(name)} is there twice: with and without a prefix")
            stored[_without_prefix(name)] = name
        self._stored_names: dict[str, str] = {}
        self._scales: dict[str, str] = {}  # weight -> stored name of its scale
        for name, stored_name in stored.items():
            if name in IGNORED_NAMES or name.endswith(IGNORED_ENDINGS):
                continue
            ending = next((ending for ending in SCALES if name.endswith(ending)), None)
            if ending is None or f"{name.removesuffix(ending)}.weight" not in stored:
                self._stored_names[name] = stored_name
                continue
            weight = f"{name.removesuffix(ending)}.weight"
            if weight in self._scales:
                raise InputError(f"{self.place}: {weight} has two scales; use a file with one")
            self._scales[weight] = stored_name
        self.tensors = {name: self._describe(name) for name in self._stored_names}

        kinds = (
            (kind, naming) for kind, naming, evidence in _EVIDENCE if all(name in self.tensors for name in evidence)
        )
        # The type of the model's config; None for a file that is no model of Wan.
        self.kind: type | None
        self.naming: Naming
        self.kind, self.naming = next(kinds, (None, "official"))

    @property
    def quantized(self) -> bool:
        return any(info.dtype in FLOAT8_DTYPES for info in self._file.tensors.values())

    def as_model(self) -> StoredModel:
        """Its tensors and config; of a file that is a model of Wan."""
        assert self.kind is not None
        store = OfficialClipStore(self) if self.kind is ImageEncoderConfig and self.naming == "official" else self
        return StoredModel.infer(self.kind, store, self.naming)

    def read(self, name: str, dtype: np.dtype | None = None) -> np.ndarray:
        target = self.tensors[name].dtype if dtype is None else dtype
        tensor = self._file.read(self._stored_names[name])
        if tensor.dtype not in FLOAT8_DTYPES:
            return cast(tensor, target)
        # A table of the 256 values is much faster than a cast, and exact.
        values = np.arange(256, dtype=np.uint8).view(tensor.dtype).astype(np.float32)
        weight = values[tensor.view(np.uint8)]
        if name in self._scales:
            scale = self._file.read(self._scales[name], np.dtype(np.float32))
            weight *= scale.reshape(-1, *[1] * (weight.ndim - 1)) if scale.size > 1 else scale.reshape(())
        return cast(weight, target)

    def _describe(self, name: str) -> TensorInfo:
        info = self._file.tensors[self._stored_names[name]]
        if name in self._scales:
            scale = self._file.tensors[self._scales[name]]
            rows = info.shape[0] if info.shape else 1
            if info.dtype not in FLOAT8_DTYPES or scale.dtype not in WEIGHT_DTYPES:
                raise InputError(
                    f"{self.place}: {name} is {info.dtype.name} with a scale of {scale.dtype.name}; only float8 "
                    "weights with float scales can be read"
                )
            if scale.size != 1 and scale.shape not in ((rows,), (rows, 1)):
                raise InputError(
                    f"{self.place}: the scale of {name} has shape {list(scale.shape)}; it needs one number or "
                    f"{rows} rows"
                )
        elif info.dtype in FLOAT8_DTYPES and self._scales:
            raise InputError(
                f"{self.place}: {name} is {info.dtype.name} and its scale is missing; download the file again"
            )
        if info.dtype in FLOAT8_DTYPES:
            return TensorInfo(info.shape, BFLOAT16, info.file)
        return info


def _without_prefix(name: str) -> str:
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def _choose_files(files: Sequence[ComfyFile], place: str) -> dict[str, ComfyFile]:
    """The file of each component. Raises InputError where two files are one component, or an expert has no name."""
    chosen: dict[str, ComfyFile] = {}
    experts = sum(file.kind is DenoiserConfig for file in files)
    for file in files:
        if file.kind is None:
            continue
        component = _COMPONENTS.get(file.kind) or _expert(file, experts, place)
        if component in chosen:
            raise InputError(
                f"{place}: both {chosen[component].path.name} and {file.path.name} are a "
                f"{component.replace('_', ' ')}; keep one"
            )
        chosen[component] = file
    return chosen


def _expert(file: ComfyFile, experts: int, place: str) -> str:
    if experts == 1:
        return "denoiser"
    levels = [name for name in ("high", "low") if name in file.path.name.lower()]
    if len(levels) != 1:
        raise InputError(
            f"{place}: of several denoisers, {file.path.name} does not say whether it is the high or the low noise "
            "one; put that into its name"
        )
    return f"{levels[0]}_noise"
