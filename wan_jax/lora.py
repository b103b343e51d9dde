"""LoRAs at work: from files to adapters on a pipeline's denoisers.

    pipe.set_loras([Lora("style.safetensors", 0.8), Lora("fast_high.safetensors", expert="high_noise")])

The base weights are never written. Low-rank changes become adapters (models/layers.py), which the forward pass adds to
each kernel in float32; the few parameters that a file changes whole are copies. So taking a LoRA away gives back the
same bits, strengths are numbers that the compiled step is called with, and files of the same rank compile nothing.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from wan_jax.checkpoint.components import copy_into
from wan_jax.checkpoint.layouts import denoiser_rows
from wan_jax.checkpoint.lora import ActiveLora, Change, Lora, LoraFile, OpenLoras, open_loras
from wan_jax.checkpoint.lora_export import save_lora
from wan_jax.checkpoint.tensors import cast
from wan_jax.config import DenoiserConfig
from wan_jax.memory import single_device
from wan_jax.models.adapters import adapt, find_linear
from wan_jax.models.denoiser import Denoiser
from wan_jax.models.layers import Adapter
from wan_jax.models.parameters import named_parameters

__all__ = ["AdaptedDenoiser", "Lora", "LoraFile", "OpenLoras", "adapter_bytes", "open_loras", "save_lora"]

# Ranks are filled up to multiples of this with zeros, so that few of them need a program of their own.
RANK_MULTIPLE = 16


@dataclass(frozen=True)
class Part:
    """What one LoRA changes of one layer of a parameter."""

    lora: int  # its index
    layer: tuple[int, ...]  # () for a parameter without a layers axis
    change: Change


@dataclass(frozen=True)
class Factors:
    """The factors of all LoRAs of one kernel, side by side."""

    down: jax.Array  # float32 [layers, inputs, rank]
    up: jax.Array  # float32 [layers, rank, outputs]
    scales: np.ndarray  # [loras, layers, rank]: alpha / rank in the columns of a LoRA, else 0


class AdaptedDenoiser:
    """One expert and the LoRAs on it.

    Args:
      base: stays as it is, and shares its arrays with the models made from it.
      sharding: where the adapters wait; the models' running place is memory.py's business.
    """

    def __init__(self, base: Denoiser, sharding: Sharding):
        self.base = base
        self._sharding = sharding
        self._device = next(iter(sharding.device_set))
        self._parameters = named_parameters(base)
        self._files: list[tuple] = []
        self._factors: dict[str, Factors] = {}

    def with_loras(self, loras: Sequence[ActiveLora]) -> Denoiser:
        """The expert with these LoRAs, or the base itself without any.

        Factors are read again only if the files are others than the last time.
        """
        parts = parts_by_parameter(loras, self.base.config)
        whole = {name for name, each in parts.items() if any(part.change.diffs for part in each)}
        low_rank = [name for name in parts if name not in whole]
        files = [lora.identity for lora in loras]
        if files != self._files:
            self._files, self._factors = [], {}  # frees the old ones first
            with ThreadPoolExecutor() as threads:
                loaded = threads.map(lambda name: self._load(parts[name], loras, name), low_rank)
                self._factors = dict(zip(low_rank, loaded, strict=True))
            self._files = files
        if not loras:
            return self.base
        strengths = np.array([lora.strength for lora in loras], np.float32)
        adapters = {linear_of(name): self._adapter(name, factors, strengths) for name, factors in self._factors.items()}
        tensors = {name: self._changed(name, parts[name], loras) for name in whole}
        return adapt(self.base, adapters, tensors)

    def _adapter(self, name: str, factors: Factors, strengths: np.ndarray) -> Adapter:
        scale = np.tensordot(strengths, factors.scales, 1)
        axes = find_linear(self.base, linear_of(name)).kernel.get_metadata()["axes"]
        return Adapter(factors.down, factors.up, jax.device_put(scale, self._sharding), axes=axes)

    def _load(self, parts: Sequence[Part], loras: Sequence[ActiveLora], name: str) -> Factors:
        """Reads the factors of one kernel onto the device."""
        *layers, inputs, outputs = self._parameters[name].shape
        offsets, total = _columns(parts, loras)
        dtypes = {part_dtype(part, loras) for part in parts}
        dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
        # As the files have them; the device turns them around.
        down = np.zeros((*layers, total, inputs), dtype)
        up = np.zeros((*layers, outputs, total), dtype)
        scales = np.zeros((len(loras), *layers, total), np.float32)
        for part in parts:
            one_down, one_up = loras[part.lora].file.factors(part.change)
            columns = slice(offsets[part.lora], offsets[part.lora] + len(one_down))
            copy_into(down[part.layer][columns], cast(one_down, dtype))
            copy_into(up[part.layer][:, columns], cast(one_up, dtype))
            scales[part.lora][part.layer][columns] = part.change.scale
        here = single_device(self._device, on_host=False)
        # Waiting here keeps one kernel's factors on their way for each thread.
        device_down, device_up = (
            jax.device_put(_turned(jax.device_put(factor, here)), self._sharding).block_until_ready()
            for factor in (down, up)
        )
        return Factors(device_down, device_up, scales)

    def _changed(self, name: str, parts: Sequence[Part], loras: Sequence[ActiveLora]) -> jax.Array:
        """A parameter that is changed whole: the sum in float32, rounded once."""
        base = self._parameters[name]
        host = np.array(base)
        for layer in sorted({part.layer for part in parts}):
            here = [part for part in parts if part.layer == layer]
            change = np.zeros(here[0].change.row.shape, np.float32)
            for part in here:
                lora = loras[part.lora]
                change += np.float32(lora.strength) * lora.file.delta(part.change)
            row = here[0].change.row
            host[layer] = (host[layer].astype(np.float32) + row.to_ours(change)).astype(host.dtype)
        return jax.device_put(host, base.sharding)


@jax.jit
def _turned(factor: jax.Array) -> jax.Array:
    # float32 whatever the file has, so that files of another dtype need no program of their own.
    return jnp.swapaxes(factor, -1, -2).astype(jnp.float32)


def parts_by_parameter(loras: Sequence[ActiveLora], config: DenoiserConfig) -> dict[str, list[Part]]:
    """The changes by the stacked parameter's name ("blocks.feed_forward.up.kernel"), in the table's order."""
    places: dict[str, tuple[str, tuple[int, ...]]] = {}
    for row in denoiser_rows(config):
        layers = range(config.num_layers) if row.per_layer else ()
        places |= {row.at(layer).ours: (row.stacked_name, (layer,)) for layer in layers}
        if not row.per_layer:
            places[row.ours] = row.ours, ()
    found: dict[str, list[Part]] = {name: [] for name, _ in places.values()}
    for index, lora in enumerate(loras):
        for ours, change in lora.changes.items():
            name, layer = places[ours]
            found[name].append(Part(index, layer, change))
    return {name: parts for name, parts in found.items() if parts}


def adapter_bytes(loras: Iterable[ActiveLora], config: DenoiserConfig) -> int:
    """Memory of one expert's adapters."""
    loras = list(loras)
    total = 0
    for parts in parts_by_parameter(loras, config).values():
        if not any(part.change.diffs for part in parts):
            outputs, *inputs = parts[0].change.row.shape
            layers = config.num_layers if parts[0].layer else 1
            total += 4 * layers * (outputs + math.prod(inputs) + 1) * _columns(parts, loras)[1]
    return total


def _columns(parts: Sequence[Part], loras: Sequence[ActiveLora]) -> tuple[Mapping[int, int], int]:
    """The first column of each LoRA in a kernel's factors, and the number of all columns."""
    ranks: dict[int, int] = {}
    for part in parts:
        ranks[part.lora] = max(ranks.get(part.lora, 0), loras[part.lora].file.rank(part.change))
    offsets, total = {}, 0
    for index in sorted(ranks):
        offsets[index] = total
        total += ranks[index]
    return offsets, -(-total // RANK_MULTIPLE) * RANK_MULTIPLE


def part_dtype(part: Part, loras: Sequence[ActiveLora]) -> np.dtype:
    file = loras[part.lora].file
    assert part.change.down is not None
    return file.store.tensors[part.change.down].dtype


def linear_of(kernel: str) -> str:
    return kernel.removesuffix(".kernel")
