"""LoRAs out: trained adapters as files that others read, and merged into checkpoints."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from wan_jax.checkpoint.api import Checkpoint
from wan_jax.checkpoint.components import Component
from wan_jax.checkpoint.formats.safetensors import write_safetensors_file
from wan_jax.checkpoint.formats.tensors import TensorInfo, TensorStore, cast
from wan_jax.checkpoint.tables.denoiser import denoiser_table
from wan_jax.config import DenoiserConfig
from wan_jax.errors import unknown_name
from wan_jax.lora.files import ActiveLora, OpenLoras, total_change
from wan_jax.lora.names import EXPERT_METADATA
from wan_jax.models.nn.linear import Adapter

Style = Literal["diffusers", "comfyui"]


def save_lora(
    path: str | Path,
    adapters: Mapping[str, Adapter],
    config: DenoiserConfig,
    style: Style = "diffusers",
    *,
    expert: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes adapters as one safetensors file; `open_lora` reads back the same bits.

    Args:
      adapters: by the Linear's name ("blocks.self_attention.query"), stacked as the model has them; one scale a layer.
      style: "diffusers" (PEFT's names, alpha in the metadata) or "comfyui" (official names, alpha beside each pair).
      expert: "high_noise" or "low_noise": the only one that the file may then be used on.
      metadata: further texts for the file's header.

    Raises InputError for an unknown style, ValueError for a scale that is not one number (a bug).
    """
    if style not in get_args(Style):
        raise unknown_name("style of LoRA files", style, get_args(Style))
    tensors: dict[str, np.ndarray] = {}
    alphas: dict[str, tuple[int, float]] = {}  # module -> rank, alpha
    table = {mapping.stacked_name: mapping for mapping in denoiser_table(config)}
    for name, adapter in adapters.items():
        mapping = table[f"{name}.kernel"]
        down, up, scale = (np.asarray(array[...]) for array in (adapter.down, adapter.up, adapter.scale))
        layers: Sequence[Any] = range(len(down)) if mapping.per_layer else [()]
        for layer in layers:
            names = mapping.at(layer).names if mapping.per_layer else mapping.names
            module = (names.diffusers if style == "diffusers" else names.official).removesuffix(".weight")
            (one_scale,) = np.unique(scale[layer])
            rank = down[layer].shape[-1]
            alphas[module] = rank, _alpha(one_scale, rank)
            inputs, outputs = down[layer].T, up[layer].T
            if style == "diffusers":
                tensors[f"transformer.{module}.lora_A.weight"] = inputs
                tensors[f"transformer.{module}.lora_B.weight"] = outputs
            else:
                tensors[f"diffusion_model.{module}.lora_down.weight"] = inputs
                tensors[f"diffusion_model.{module}.lora_up.weight"] = outputs
                tensors[f"diffusion_model.{module}.alpha"] = _as_float(alphas[module][1])
    texts = dict(metadata or {}) | ({EXPERT_METADATA: expert} if expert else {})
    if style == "diffusers":
        texts["lora_adapter_metadata"] = json.dumps(_peft_config(alphas), sort_keys=True)
    infos = {name: TensorInfo(array.shape, array.dtype, "") for name, array in tensors.items()}
    path = Path(path)
    write_safetensors_file(path, infos, lambda names: (tensors[name] for name in names), texts)


def _alpha(scale: np.float32, rank: int) -> float:
    """The number of the fewest digits that divided by the rank gives the scale again."""
    exact = float(scale) * rank
    short = float(np.float32(exact))
    return short if np.float32(short / rank) == scale else exact


def _as_float(value: float) -> np.ndarray:
    """float32 where that holds the number exactly."""
    return np.array(value, np.float32 if float(np.float32(value)) == value else np.float64)


def _peft_config(alphas: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """What PEFT's LoraConfig needs, under diffusers' prefix; modules that differ from the first are listed."""
    rank, alpha = next(iter(alphas.values()))
    config = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{module}": own for module, (own, _) in alphas.items() if own != rank},
        "alpha_pattern": {f"^{module}": own for module, (_, own) in alphas.items() if own != alpha},
        "target_modules": sorted(alphas),
        "bias": "none",
        "use_dora": False,
        "lora_bias": False,
    }
    return {f"transformer.{name}": value for name, value in config.items()}


def merge_loras(checkpoint: Checkpoint, loras: OpenLoras) -> Checkpoint:
    """The checkpoint with LoRAs merged as it is read: the sum in float32, rounded once to the dtype that is asked for.

    Raises InputError where the checkpoint lacks an expert that a LoRA changes.
    """
    parts = dict(checkpoint.parts)
    for expert, active in loras.by_expert.items():
        if active:
            part = checkpoint.part(expert)
            parts[expert] = replace(part, store=MergedStore(part, active))
    return replace(checkpoint, parts=parts, notes=(*checkpoint.notes, *loras.notes))


class MergedStore(TensorStore):
    """A store whose tensors come with LoRAs merged in; as large in memory as the store itself, and one change."""

    def __init__(self, component: Component, loras: Sequence[ActiveLora]):
        self.place = component.store.place
        self.tensors = component.store.tensors
        self._component = component
        self._loras = loras
        self._mappings = {
            stored: mapping for mapping in component.table for stored in component.stored_names[mapping.name]
        }

    def read(self, name: str, dtype: np.dtype | None = None) -> np.ndarray:
        (tensor,) = self.read_many([name], dtype)
        return tensor

    def read_many(self, names: Sequence[str], dtype: np.dtype | None = None) -> Iterator[np.ndarray]:
        # float32 holds every dtype that weights have, so tensors that nothing changes come out as they are.
        stored = self._component.store.read_many(names, np.dtype(np.float32))
        for name, tensor in zip(names, stored, strict=True):
            mapping = self._mappings[name]
            change = total_change(self._loras, mapping.name)
            if change is not None:
                tensor = tensor + (mapping.from_torch(change) if self._component.naming == "wan_jax" else change)
            yield cast(tensor, self.tensors[name].dtype if dtype is None else dtype)
