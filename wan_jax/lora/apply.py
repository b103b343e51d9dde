"""LoRAs at work: from files to adapters on a pipeline's denoisers.

    pipe.set_loras([Lora("style.safetensors", 0.8), Lora("fast_high.safetensors", expert="high_noise")])

The base weights are never written. Low-rank changes become adapters (models/nn/linear.py), which the forward pass adds
to each kernel in float32; the few parameters that a file changes whole are copies. So taking a LoRA away gives back the
same bits, scales are numbers that the compiled step is called with, and files of the same rank compile nothing.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from wan_jax.checkpoint.tables.denoiser import denoiser_table
from wan_jax.config import DenoiserConfig
from wan_jax.lora.adapters import adapt, find_linear
from wan_jax.lora.files import ActiveLora, Change, OpenLoras, total_change
from wan_jax.models.denoiser import Denoiser
from wan_jax.models.nn.linear import Adapter
from wan_jax.models.nn.weights import Weight
from wan_jax.parallel.placement import put
from wan_jax.parameters import named_parameters
from wan_jax.runtime.offload import single_device

# Ranks are filled up to multiples of this with zeros, so that few of them need a program of their own.
RANK_MULTIPLE = 16


@dataclass(frozen=True)
class LayerChange:
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
      place: where an adapter's array of these logical axes, "layers" first where layers are stacked, waits.
    """

    def __init__(self, base: Denoiser, place: Callable[[tuple[str | None, ...]], Sharding]):
        self.base = base
        self._place = place
        self._parameters = named_parameters(base)
        self._files: list[tuple] = []
        self._factors: dict[str, Factors] = {}

    def with_loras(self, loras: Sequence[ActiveLora]) -> Denoiser:
        """The expert with these LoRAs, or the base itself without any.

        Factors are read again only if the files are others than the last time.
        """
        if not loras:
            self._files, self._factors = [], {}
            return self.base
        parts = parts_by_parameter(loras, self.base.config)
        # In the table's order, which is that of every process: what is split over processes is gathered by all at once.
        whole = [name for name, each in parts.items() if any(part.change.diffs for part in each)]
        files = [lora.identity for lora in loras]
        if files != self._files:
            self._files, self._factors = [], {}  # frees the old ones first
            self._factors = self._load({name: parts[name] for name in parts if name not in whole}, loras)
            self._files = files
        loras_scales = np.array([lora.scale for lora in loras], np.float32)
        adapters = {
            linear_of(name): self._adapter(name, factors, loras_scales) for name, factors in self._factors.items()
        }
        tensors = {name: self._changed(name, parts[name], loras) for name in whole}
        return adapt(self.base, adapters, tensors)

    def _adapter(self, name: str, factors: Factors, loras_scales: np.ndarray) -> Adapter:
        scale = put(np.tensordot(loras_scales, factors.scales, 1), self._places(name)[2])
        return Adapter(factors.down, factors.up, scale, axes=self._kernel(name).axes)

    def _kernel(self, name: str) -> Weight:
        return find_linear(self.base, linear_of(name)).kernel

    def _places(self, name: str) -> tuple[Sharding, Sharding, Sharding]:
        """Of an adapter's down, up and scale."""
        kernel = self._kernel(name)
        layers = ("layers",) if len(kernel.shape) == 3 else ()
        inputs, outputs = kernel.axes
        return self._place((*layers, inputs, None)), self._place((*layers, None, outputs)), self._place((*layers, None))

    def _load(self, parts: Mapping[str, Sequence[LayerChange]], loras: Sequence[ActiveLora]) -> dict[str, Factors]:
        """Reads the factors of all kernels onto the devices, by way of one of this process."""
        device = single_device(next(iter(self._place(()).addressable_devices)), on_host=False)

        def read(name: str) -> tuple[jax.Array, jax.Array, np.ndarray]:
            down, up, scales = read_factors(parts[name], loras, self._kernel(name).shape)
            return jax.device_put(down, device), jax.device_put(up, device), scales

        with ThreadPoolExecutor() as threads:
            stored = dict(zip(parts, threads.map(read, parts), strict=True))
        transposed = _transposed({name: (down, up) for name, (down, up, _) in stored.items()})
        placed = {name: tuple(map(put, transposed[name], self._places(name))) for name in parts}
        jax.block_until_ready(placed)
        return {name: Factors(placed[name][0], placed[name][1], scales) for name, (_, _, scales) in stored.items()}

    def _changed(self, name: str, parts: Sequence[LayerChange], loras: Sequence[ActiveLora]) -> jax.Array:
        """A parameter that is changed whole: the sum in float32, rounded once."""
        base = self._parameters[name]
        host = np.array(base if base.is_fully_addressable else jax.device_put(base, self._place(())))
        for layer, mapping in {part.layer: part.change.mapping for part in parts}.items():
            change = total_change(loras, mapping.name)
            assert change is not None
            host[layer] = (host[layer].astype(np.float32) + mapping.from_torch(change)).astype(host.dtype)
        return put(host, base.sharding)


def with_loras(experts: Mapping[str, AdaptedDenoiser], loras: OpenLoras) -> dict[str, Denoiser]:
    """All experts with their LoRAs, loaded side by side; by several processes in one order."""
    with ThreadPoolExecutor(1 if jax.process_count() > 1 else None) as threads:
        adapted = threads.map(lambda name: experts[name].with_loras(loras.by_expert[name]), experts)
        return dict(zip(experts, adapted, strict=True))


@jax.jit
def _transposed(factors: Any) -> Any:
    """As files have factors -> as adapters have them, in float32, so that no file's dtype asks for another step."""
    return jax.tree.map(lambda factor: jnp.swapaxes(factor, -1, -2).astype(jnp.float32), factors)


def read_factors(
    parts: Sequence[LayerChange], loras: Sequence[ActiveLora], shape: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The factors of all LoRAs of one kernel side by side, in the layout and, where they agree, the dtype of the files.

    Returns: down [layers, rank, inputs], up [layers, outputs, rank], `Factors.scales`.
    """
    *layers, inputs, outputs = shape
    offsets, total = _columns(parts, loras)
    dtypes = {loras[part.lora].file.dtype(part.change) for part in parts}
    dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
    down = np.zeros((*layers, total, inputs), dtype)
    up = np.zeros((*layers, outputs, total), dtype)
    scales = np.zeros((len(loras), *layers, total), np.float32)
    for part in parts:
        file, offset = loras[part.lora].file, offsets[part.lora]
        columns = slice(offset, offset + file.rank(part.change))
        file.read_factors(part.change, down[part.layer][columns], up[part.layer][:, columns])
        scales[part.lora][part.layer][columns] = part.change.scale
    return down, up, scales


def parts_by_parameter(loras: Sequence[ActiveLora], config: DenoiserConfig) -> dict[str, list[LayerChange]]:
    """The changes by the stacked parameter's name ("blocks.feed_forward.up.kernel"), in the table's order."""
    places: dict[str, tuple[str, tuple[int, ...]]] = {}
    for mapping in denoiser_table(config):
        layers = range(config.num_layers) if mapping.per_layer else ()
        places |= {mapping.at(layer).name: (mapping.stacked_name, (layer,)) for layer in layers}
        if not mapping.per_layer:
            places[mapping.name] = mapping.name, ()
    found: dict[str, list[LayerChange]] = {name: [] for name, _ in places.values()}
    for index, lora in enumerate(loras):
        for parameter, change in lora.changes.items():
            name, layer = places[parameter]
            found[name].append(LayerChange(index, layer, change))
    return {name: parts for name, parts in found.items() if parts}


def adapter_bytes(loras: Iterable[ActiveLora], config: DenoiserConfig) -> int:
    """Memory of one expert's adapters."""
    loras = list(loras)
    total = 0
    for parts in parts_by_parameter(loras, config).values():
        if not any(part.change.diffs for part in parts):
            outputs, *inputs = parts[0].change.mapping.torch_shape
            layers = config.num_layers if parts[0].layer else 1
            total += 4 * layers * (outputs + math.prod(inputs) + 1) * _columns(parts, loras)[1]
    return total


def _columns(parts: Sequence[LayerChange], loras: Sequence[ActiveLora]) -> tuple[Mapping[int, int], int]:
    """The first column of each LoRA in a kernel's factors, and the number of all columns."""
    ranks: dict[int, int] = {}
    for part in parts:
        ranks[part.lora] = max(ranks.get(part.lora, 0), loras[part.lora].file.rank(part.change))
    offsets, total = {}, 0
    for index in sorted(ranks):
        offsets[index] = total
        total += ranks[index]
    return offsets, -(-total // RANK_MULTIPLE) * RANK_MULTIPLE


def linear_of(kernel: str) -> str:
    return kernel.removesuffix(".kernel")
