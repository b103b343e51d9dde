"""What follows a video: generated from its last frame at the model's size and rate, shown at the video's own."""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TypeVar

import numpy as np

from wan_jax.config import WanConfig
from wan_jax.diffusion.params import SamplingParams
from wan_jax.errors import InputError
from wan_jax.generation.sampler import Result
from wan_jax.media.frames import resampled
from wan_jax.media.image import Picture, output_size, stretch
from wan_jax.media.video import Video

Request = TypeVar("Request", bound=SamplingParams)


def extension(video: Video, request: Request, config: WanConfig) -> Request:
    """Returns the request of what follows a video: it starts from the last frame.

    A size that the model can do, and that is not above its preset's, stays the video's; for another the model's rule
    for pictures decides, unless the request has one. The last frame is stretched to it, which `following` takes back.
    """
    if not isinstance(video, Video):
        raise InputError(f"video {video!r:.60}: give a Video, such as read_video returns")
    width, height = video.size
    multiple_height, multiple_width = config.size_multiple
    fits = width * height <= math.prod(config.sampling.size) and not width % multiple_width + height % multiple_height
    size = request.size or (video.size if fits else output_size(config, video.size))
    picture = Picture(stretch(video.frames[-1], size), "the last frame before")
    return replace(request, image=picture, size=size, fps=video.fps)


def following(video: Video, chunks: Iterable[np.ndarray], fps: float) -> Iterator[np.ndarray]:
    """Yields what was generated after a video, without the frame that both share, at the video's rate and size.

    Args:
        video: what came before.
        chunks: uint8 [n, H, W, 3], the first frame being the video's last.
        fps: the model's rate.
    """
    frames = (frame for chunk in chunks for frame in chunk)
    timed = (((index + 1) / fps, frame) for index, frame in enumerate(frames))
    for frame in itertools.islice(resampled(timed, video.fps), 1, None):
        yield stretch(frame, video.size)[None]


def extended(video: Video, result: Result, fps: float) -> Video:
    """Both parts as one; see `following`."""
    frames = np.concatenate([video.frames, *following(video, result.frames(), fps)])
    metadata = result.metadata | {"extends": {"frames": len(video.frames), **video.metadata}}
    return Video(frames, result.latents, video.fps, metadata, dict(result.seconds))
