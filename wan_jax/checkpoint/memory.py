"""Models in memory as a checkpoint, so that they are written by the same code that converts files."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jax.typing import ArrayLike

from wan_jax.checkpoint.checkpoint import Checkpoint
from wan_jax.checkpoint.components import bind_component
from wan_jax.checkpoint.layouts import component_config, model_rows, num_layers
from wan_jax.checkpoint.tensors import TensorInfo, TensorStore, cast
from wan_jax.config import WanConfig

PLACE = "memory"


class MemoryStore(TensorStore):
    """Arrays by name, each layer's under a name of its own."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self.place = PLACE
        self._arrays = arrays
        self.tensors = {name: TensorInfo(array.shape, array.dtype, PLACE) for name, array in arrays.items()}

    def read(self, name: str, dtype: np.dtype | None = None) -> np.ndarray:
        return cast(self._arrays[name], dtype)


def memory_checkpoint(
    config: WanConfig, components: Mapping[str, Mapping[str, ArrayLike]], tokenizer_folder: Path | None
) -> Checkpoint:
    """Wraps models that are in memory.

    `components` maps "text_encoder", "vae" and the experts' names to their parameters, keyed and stacked as in the
    abstract tree. Raises InputError for names or shapes that `config` does not have.
    """
    parts = {}
    for name, parameters in components.items():
        model = component_config(config, name)
        arrays: dict[str, np.ndarray] = {}
        for row in model_rows(model):
            parameter = np.asarray(parameters[row.stacked_name])
            if row.per_layer:
                arrays |= {row.at(layer).ours: parameter[layer] for layer in range(num_layers(model))}
            else:
                arrays[row.ours] = parameter
        parts[name] = bind_component(name, model, "ours", MemoryStore(arrays))
    return Checkpoint(Path(PLACE), "orbax", config, parts, tokenizer_folder, ())
