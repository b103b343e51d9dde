"""Models in memory as a checkpoint, so that they are written by the same code that converts files."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jax.typing import ArrayLike

from wan_jax.checkpoint.api import Checkpoint
from wan_jax.checkpoint.components import bind_component
from wan_jax.checkpoint.formats.tensors import TensorInfo, TensorStore, cast
from wan_jax.checkpoint.tables import num_layers, parameter_table
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
        model = config.model(name)
        arrays: dict[str, np.ndarray] = {}
        for mapping in parameter_table(model):
            parameter = np.asarray(parameters[mapping.stacked_name])
            if mapping.per_layer:
                arrays |= {mapping.at(layer).name: parameter[layer] for layer in range(num_layers(model))}
            else:
                arrays[mapping.name] = parameter
        parts[name] = bind_component(name, model, "wan_jax", MemoryStore(arrays))
    return Checkpoint(Path(PLACE), PLACE, config, parts, tokenizer_folder, ())
