"""Finished videos and the files they become."""

import itertools
import json
import os
import pathlib
import queue
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from wan_jax.config import VAEConfig
from wan_jax.errors import InputError
from wan_jax.runtime.files import written_whole

# The official code writes libx264 at imageio's "quality 8", which is this constant rate factor.
OFFICIAL_CRF = 10


@dataclass
class Video:
    """One generated video.

    Attributes:
        frames: uint8 [F, H, W, 3], RGB.
        latents: float32 [C, F', h, w], normalised, as the denoiser left them; None for a video that was read.
        fps: frames per second.
        metadata: prompt, seed and settings; written into every file.
        seconds: wall time per stage of the run that made it.
    """

    frames: np.ndarray
    latents: np.ndarray | None = None
    fps: int = 16
    metadata: dict = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        _, height, width, _ = self.frames.shape
        return width, height

    def save(self, path: str | os.PathLike) -> list[pathlib.Path]:
        """Writes the video in the format that the file ending names: .mp4 (H.264), .gif, or .png (numbered frames).

        Every file is written under a temporary name and renamed when complete. Returns the files written; raises
        InputError for an unknown ending or a folder that does not exist.
        """
        with VideoWriter(path, self.fps, self.metadata) as writer:
            writer.write(self.frames)
        return writer.files


class VideoWriter:
    """Writes a video's file while its frames are still being made; formats and names are those of `Video.save`.

        with VideoWriter("out.mp4", fps=16, metadata={"prompt": "a red circle"}) as writer:
            for chunk in chunks:
                writer.write(chunk)

    Frames are encoded by a thread of its own. The file appears, complete, when the block ends, or not at all if the
    block raises. What goes wrong in the thread is raised by `write` or at the end of the block.

    Attributes:
        files: what was written, known when the block has ended.
    """

    def __init__(self, path: str | os.PathLike, fps: int = 16, metadata: dict[str, Any] | None = None):
        """Raises InputError for an unknown ending or a folder that does not exist."""
        self.path = check_output(path)
        self.fps = fps
        self.description = json.dumps(metadata or {}, ensure_ascii=False)
        self.files: list[pathlib.Path] = []
        self._chunks: queue.SimpleQueue[np.ndarray | None] = queue.SimpleQueue()  # None: that was the last
        self._abandoned = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._encode, name=f"encode {self.path.name}", daemon=True)

    def __enter__(self) -> "VideoWriter":
        self._thread.start()
        return self

    def write(self, frames: np.ndarray) -> None:
        """Takes the next frames, uint8 [n, H, W, 3]; returns at once. They must not change afterwards."""
        if self._failure is not None:
            raise self._failure
        self._chunks.put(frames)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is not None:
            self._abandoned.set()
        self._chunks.put(None)
        try:
            self._thread.join()
        except BaseException:  # Ctrl-C
            self._abandoned.set()
            self._thread.join()
            raise
        if kind is None and self._failure is not None:
            raise self._failure

    def _encode(self) -> None:
        try:
            self.files = WRITERS[self.path.suffix.lower()](self.path, self._frames(), self.fps, self.description)
        except BaseException as failure:  # whatever it is, it belongs to the thread that writes
            self._failure = failure

    def _frames(self) -> Iterator[np.ndarray]:
        """The frames as they come; raises Abandoned where there will be no more."""
        count = 0
        while (chunk := self._chunks.get()) is not None:
            for frame in chunk:
                if self._abandoned.is_set():
                    raise Abandoned
                yield np.ascontiguousarray(frame)
                count += 1
        if self._abandoned.is_set():
            raise Abandoned
        if not count:
            raise InputError(f"video {self.path} has no frames; write at least one")


class Abandoned(Exception):
    """Nobody wants the file any more."""


def check_frames(frames: np.ndarray, config: VAEConfig) -> np.ndarray:
    """The same frames, [F, H, W, 3] uint8 or float32; raises InputError for what the VAE cannot encode."""
    import jax.numpy as jnp  # knows bfloat16

    stride, multiple = config.temporal_stride, config.spatial_stride
    if frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise InputError(f"cannot encode frames of shape {frames.shape}; give [frames, height, width, 3]")
    if (len(frames) - 1) % stride:
        raise InputError(f"cannot encode {len(frames)} frames; give {stride}n + 1")
    if frames.shape[1] % multiple or frames.shape[2] % multiple:
        raise InputError(
            f"cannot encode frames of {frames.shape[2]}x{frames.shape[1]} pixels; give multiples of {multiple}"
        )
    if frames.dtype == np.uint8:
        return frames
    if not jnp.issubdtype(frames.dtype, jnp.floating):
        raise InputError(f"cannot encode frames of {frames.dtype}; give uint8, or floats in [-1, 1]")
    frames = frames.astype(np.float32, copy=False)
    # Bicubic interpolation overshoots, but never by as much as a wrong scale.
    largest = np.max([max(-frame.min(), frame.max()) for frame in frames])
    if not largest <= 2:
        raise InputError(f"frames to encode reach {largest:g}; give uint8, or floats in [-1, 1]")
    return frames


def check_output(path: str | os.PathLike) -> pathlib.Path:
    """Checks, before any work is done, that `path` can be written; raises InputError if not."""
    path = pathlib.Path(path)
    if path.suffix.lower() not in WRITERS:
        raise InputError(f"output {path}: unknown ending {path.suffix!r}; use one of {', '.join(WRITERS)}")
    check_folder(path)
    return path


def check_folder(path: pathlib.Path) -> None:
    """Raises InputError unless the folder that `path` would be written to exists."""
    if not path.parent.is_dir():
        raise InputError(f"output folder {path.parent} does not exist; make it first")


def read_video(path: str | os.PathLike) -> Video:
    """Reads a video file back; the inverse of `Video.save` for .mp4 and .gif up to compression. Sound is left out.

    Raises InputError where there is no such file, or no video in it.
    """
    import av

    if not os.path.isfile(path):
        raise InputError(f"video {path} does not exist")
    try:
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            rate = container.streams.video[0].average_rate
            description = container.metadata.get("comment", "")
    except (av.FFmpegError, IndexError):
        frames = []
    if not frames:
        raise InputError(f"{path} cannot be read as a video; give, for example, an MP4 file")
    try:
        metadata = json.loads(description)
    except json.JSONDecodeError:
        metadata = {}
    return Video(frames=np.stack(frames), fps=round(float(rate)) if rate else 16, metadata=metadata)


def is_complete(path: str | os.PathLike, frames: int) -> bool:
    """Whether `Video.save` has written a video of so many frames to `path`."""
    path = pathlib.Path(path)
    if path.suffix.lower() == ".png":  # the last appears last
        path = _numbered_frame(path, frames - 1)
    return path.is_file()


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """What `Video.save` has written of a video's making; nothing where the file does not say."""
    import av

    path = pathlib.Path(path)
    try:
        if path.suffix.lower() == ".png":
            with Image.open(_numbered_frame(path, 0)) as image:
                description = image.info["Description"]
        else:
            with av.open(str(path)) as container:
                description = container.metadata["comment"]
        metadata = json.loads(description)
    except (OSError, KeyError, ValueError, av.FFmpegError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def _numbered_frame(path: pathlib.Path, index: int) -> pathlib.Path:
    return path.with_name(f"{path.stem}-{index:04d}{path.suffix}")


def _write_mp4(path: pathlib.Path, frames: Iterator[np.ndarray], fps: int, description: str) -> list[pathlib.Path]:
    import av

    first = next(frames)
    with written_whole(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        container.metadata["comment"] = description
        stream = container.add_stream("libx264", rate=fps, options={"crf": str(OFFICIAL_CRF)})
        stream.height, stream.width, _ = first.shape
        stream.pix_fmt = "yuv420p"
        # Threads by frames, as ffmpeg does. PyAV cuts each frame in slices, which is slower and compresses less.
        stream.thread_type = "AUTO"
        for index, frame in enumerate(itertools.chain([first], frames)):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = index, Fraction(1, fps)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return [path]


def _write_gif(path: pathlib.Path, frames: Iterator[np.ndarray], fps: int, description: str) -> list[pathlib.Path]:
    first, *rest = (Image.fromarray(frame) for frame in frames)
    # GIF counts in hundredths of a second: round the times, not the durations, so that the length stays right.
    times = [round(100 * index / fps) for index in range(len(rest) + 2)]
    durations = [10 * (end - start) for start, end in itertools.pairwise(times)]
    comment = description.encode()
    with written_whole(path) as temporary:
        first.save(
            temporary, format="GIF", save_all=True, append_images=rest, duration=durations, loop=0, comment=comment
        )
    return [path]


def _write_pngs(path: pathlib.Path, frames: Iterator[np.ndarray], fps: int, description: str) -> list[pathlib.Path]:
    """out.png becomes out-0000.png, out-0001.png, ...; none of them appears unless all could be written."""
    del fps
    text = PngImagePlugin.PngInfo()
    text.add_itxt("Description", description)
    with tempfile.TemporaryDirectory(prefix=f".{path.stem}-", dir=path.parent) as folder:
        written = []
        for index, frame in enumerate(frames):
            written.append(pathlib.Path(folder) / _numbered_frame(path, index).name)
            Image.fromarray(frame).save(written[-1], format="PNG", pnginfo=text)
        targets = [path.with_name(temporary.name) for temporary in written]
        for temporary, target in zip(written, targets, strict=True):
            temporary.replace(target)
    return targets


# What writes a file, by its ending: (path, frames, frames per second, description) -> the files written.
WRITERS: dict[str, Callable[[pathlib.Path, Iterator[np.ndarray], int, str], list[pathlib.Path]]] = {
    ".mp4": _write_mp4,
    ".gif": _write_gif,
    ".png": _write_pngs,
}
