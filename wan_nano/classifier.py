"""The judge of shapes and digits: a small convolutional network on crops of what segmentation found."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from wan_jax.errors import InputError

CROP = 32
WIDTHS = (1, 16, 32, 64)  # channels before and after each convolution, which halves the size
WEIGHTS = Path(__file__).with_suffix(".npz")


class Classifier:
    """Crops [N, CROP, CROP] of coverage -> log probabilities [N, kinds]."""

    def __init__(self, parameters: Mapping[str, np.ndarray]):
        self.parameters = {name: jnp.asarray(array, jnp.float32) for name, array in parameters.items()}

    @classmethod
    def load(cls, path: Path = WEIGHTS) -> "Classifier":
        """Raises InputError where the weights are missing."""
        if not path.is_file():
            raise InputError(f"{path}: missing; make it with python -m wan_nano.train_classifier")
        with np.load(path) as file:
            return cls({name: file[name] for name in file.files})

    def save(self, path: Path = WEIGHTS) -> None:
        arrays: dict[str, Any] = {name: np.asarray(array, np.float16) for name, array in self.parameters.items()}
        np.savez_compressed(path, **arrays)

    def __call__(self, crops: np.ndarray) -> np.ndarray:
        padded = np.zeros((-len(crops) % 16 + len(crops), CROP, CROP), np.float32)  # few shapes, few compilations
        padded[: len(crops)] = crops
        return np.asarray(log_probabilities(self.parameters, padded))[: len(crops)]


@jax.jit
def log_probabilities(parameters: Mapping[str, jax.Array], crops: jax.Array) -> jax.Array:
    x = crops[..., None]
    for index in range(len(WIDTHS) - 1):
        x = lax.conv_general_dilated(
            x, parameters[f"conv_{index}.kernel"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x + parameters[f"conv_{index}.bias"])
    return jax.nn.log_softmax(x.reshape(len(x), -1) @ parameters["head.kernel"] + parameters["head.bias"])
