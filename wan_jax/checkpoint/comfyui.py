"""ComfyUI's single files: which model a file holds, and fp8 weights with their scales.

The denoiser and the VAE keep the official names, the text encoder HuggingFace's, the image encoder (CLIP) either. In
an "fp8_scaled" file a layer's weight is float8 and a scale stands beside it: W = float8 * scale, one scale per tensor
or one per output row.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from wan_jax.checkpoint.layouts import Naming
from wan_jax.checkpoint.safetensors import SafetensorsFile
from wan_jax.checkpoint.tensors import BFLOAT16, FLOAT8_DTYPES, WEIGHT_DTYPES, TensorInfo, TensorStore, cast
from wan_jax.errors import InputError

Role = Literal["denoiser", "text_encoder", "vae", "image_encoder"]

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

# What a file is: a role and a naming by names that all must be there.
_EVIDENCE: tuple[tuple[Role, Naming, tuple[str, ...]], ...] = (
    ("denoiser", "official", ("patch_embedding.weight", "head.head.weight")),
    ("text_encoder", "diffusers", ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",)),
    ("vae", "official", ("conv2.weight", "decoder.conv1.weight", "decoder.middle.1.to_qkv.weight")),
    ("image_encoder", "official", ("visual.cls_embedding", "visual.pre_norm.weight")),
    ("image_encoder", "diffusers", ("vision_model.embeddings.class_embedding", "vision_model.pre_layrnorm.weight")),
    ("image_encoder", "diffusers", ("embeddings.class_embedding", "pre_layrnorm.weight")),
)


def find_files(path: Path) -> list[Path]:
    """The safetensors files of a folder in ComfyUI's style."""
    return [file for folder in FOLDERS for file in sorted((path / folder).glob("*.safetensors"))]


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

    @property
    def quantized(self) -> bool:
        return any(info.dtype in FLOAT8_DTYPES for info in self._file.tensors.values())

    @property
    def role(self) -> Role | None:
        """Which model this is, by the names inside; None for anything else."""
        return self._kind[0] if self._kind else None

    @property
    def naming(self) -> Naming:
        """Whose names it has; of a file with a role."""
        if self._kind is None:
            raise ValueError(f"{self.place} is no model of Wan")
        return self._kind[1]

    @property
    def _kind(self) -> tuple[Role, Naming] | None:
        for role, naming, evidence in _EVIDENCE:
            if all(name in self.tensors for name in evidence):
                return role, naming
        return None

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


def choose_files(files: Sequence[ComfyFile], place: str) -> tuple[Mapping[str, ComfyFile], list[ComfyFile]]:
    """The file of each component, and the files that are none.

    Raises InputError where two files claim one role, or only one of two experts is there.
    """
    chosen: dict[str, ComfyFile] = {}
    others = []
    denoisers = [file for file in files if file.role == "denoiser"]
    for file in files:
        if file.role is None:
            others.append(file)
            continue
        name = _expert(file, denoisers, place) if file.role == "denoiser" else file.role
        if name in chosen:
            raise InputError(
                f"{place}: both {chosen[name].path.name} and {file.path.name} are a {name.replace('_', ' ')}; keep one"
            )
        chosen[name] = file
    return chosen, others


def _expert(file: ComfyFile, denoisers: Sequence[ComfyFile], place: str) -> str:
    if len(denoisers) == 1:
        return "denoiser"
    names = [name for name in ("high", "low") if name in file.path.name.lower()]
    if len(names) != 1:
        raise InputError(
            f"{place}: of several denoisers, {file.path.name} does not say whether it is the high or the low noise "
            "one; put that into its name"
        )
    return f"{names[0]}_noise"
