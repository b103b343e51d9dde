"""What a request's pictures give to the denoise loop; the last few are remembered."""

import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wan_jax.config import WanConfig
from wan_jax.diffusion.conditioning import TEXT_ONLY, Conditioning, FirstFrame, known_frames
from wan_jax.diffusion.params import SamplingParams
from wan_jax.errors import check_finite
from wan_jax.media.codec import Codec
from wan_jax.media.image import Picture, clip_input, frames_to_encode, is_stretched
from wan_jax.models.image_encoder import ImageEncoder, encode_image
from wan_jax.parallel.placement import Placement
from wan_jax.runtime.events import Run
from wan_jax.runtime.offload import Memory

CACHED_PICTURES = 8

Encoded = tuple[Conditioning, jax.Array | None]  # for the loop, and for attention beside the text: [1, tokens, dim]


class PictureEncoder:
    """Encodes pictures with the VAE, and with the image encoder for models that attend to it."""

    def __init__(
        self,
        config: WanConfig,
        codec: Codec,
        model: ImageEncoder | None,
        memory: Memory,
        placement: Placement,
    ):
        self.model = model
        self._config, self._codec = config, codec
        self._memory, self._placement = memory, placement
        self._remembered: dict[tuple[Any, ...], Encoded] = {}
        self._lock = threading.RLock()  # a listener may use the pipeline

    def encode(self, request: SamplingParams, run: Run) -> Encoded:
        """The conditioning of one resolved request."""
        if self._config.conditioning == "text":
            return TEXT_ONLY, None
        pictures = [picture for picture in (request.image, request.last_image) if picture is not None]
        key = (*[picture.digest for picture in pictures], request.size, request.frames)
        with self._lock:
            if key not in self._remembered:
                if len(self._remembered) >= CACHED_PICTURES:
                    self._remembered.pop(next(iter(self._remembered)))
                self._remembered[key] = self._condition(request, run), self._attend(pictures, run)
            return self._remembered[key]

    def _condition(self, request: SamplingParams, run: Run) -> Conditioning:
        config = self._config
        if request.image is None:
            channels, _, height, width = request.latents_shape(config)
            return FirstFrame.unknown(channels, height, width)
        if is_stretched(config, request.image, request.size):
            run.note("the image is stretched to another shape; without a size the video takes the image's")
        frames = frames_to_encode(config, request.image, request.last_image, request.size, request.frames)
        latents = jnp.asarray(self._codec.encode(frames, run))[None]
        if config.conditioning == "first_frame":
            return FirstFrame(latents, jnp.ones(1, bool))
        known = [0] if request.last_image is None else [0, request.frames - 1]
        return known_frames(latents, known, config.vae.temporal_stride)

    def _attend(self, pictures: list[Picture], run: Run) -> jax.Array | None:
        if self.model is None:
            return None
        side = self.model.config.image_size
        pixels = self._placement.put(np.stack([clip_input(picture.pixels, side) for picture in pictures]))
        with self._memory.on_device(self.model) as model, run.stage("image"):
            features = jax.block_until_ready(run.call(encode_image, model, pixels))
        check_finite(jnp.isfinite(features).all(), "the image encoder's features")
        return features.reshape(1, -1, features.shape[-1])  # of two pictures, one after the other
