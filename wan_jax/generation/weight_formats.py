"""The denoisers in the format that a request asks for (`SamplingParams.weights`)."""

import threading

from wan_jax.diffusion.params import WEIGHTS
from wan_jax.models.denoiser import Denoiser
from wan_jax.models.nn.weights import quantize_layers
from wan_jax.parallel.placement import Placement


class WeightFormats:
    """Makes 8-bit copies when they are first asked for, and remembers those of one format.

    They wait where the stored weights wait, which stay. LoRAs stay around them as they are.
    """

    def __init__(self, placement: Placement):
        self._placement = placement
        self._copies: dict[str, dict[str, Denoiser]] = {}
        self._lock = threading.Lock()

    def clear(self) -> None:
        """Forgets the copies, because the denoisers are others now."""
        with self._lock:
            self._copies = {}

    def get(self, stored: dict[str, Denoiser], weights: str) -> dict[str, Denoiser]:
        """The denoisers by expert name, with their stacked kernels in a format of `params.WEIGHTS`."""
        if (dtype := WEIGHTS[weights]) is None:
            return stored
        with self._lock:
            if weights not in self._copies:
                self._copies = {}  # frees the other format first
                places = self._placement.by_expert(list(stored))
                self._copies[weights] = {
                    name: quantize_layers(denoiser, dtype, places[name].parameter_sharding)
                    for name, denoiser in stored.items()
                }
            return self._copies[weights]
