"""Finished videos and the files they become."""

import base64
import functools
import html
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
from wan_jax.fields import integer, path_of, rate
from wan_jax.media.frames import BT709, EXACT, LIMITED_RANGE, Clip, matrix_of, measured_rate, resampled
from wan_jax.runtime.files import check_writable, hidden, naming_file, written_whole

# The official code writes libx264 at imageio's "quality 8", which is this constant rate factor.
OFFICIAL_CRF = 10
NOTEBOOK_CRF = 23  # x264's own default: a page has the video inside


@dataclass(repr=False)
class Video:
    """One generated video. Raises InputError for frames or a rate that no video has.

    Attributes:
        frames: uint8 [F, H, W, 3], RGB.
        latents: float32 [C, F', h, w], normalised, as the denoiser left them; None for a video that was read.
        fps: frames per second; whole, or a fraction such as 12.5.
        metadata: prompt, seed and settings; written into every file.
        seconds: wall time per stage of the run that made it.
    """

    frames: np.ndarray
    latents: np.ndarray | None = None
    fps: float = 16
    metadata: dict = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.frames, self.fps = check_pixels(self.frames), rate("fps", self.fps)
        self.metadata = {} if self.metadata is None else self.metadata
        if not isinstance(self.metadata, dict):
            raise InputError(f"metadata {self.metadata!r:.60}: must be a dict")

    def __repr__(self) -> str:
        width, height = self.size
        prompt = f": {text!r:.60}" if (text := self.metadata.get("prompt")) else ""
        return f"<Video of {len(self.frames)} frames, {width}x{height}, {self.fps:g} fps{prompt}>"

    def _repr_html_(self) -> str:
        """The video itself, in a notebook."""
        _, height, width, _ = self.frames.shape
        with tempfile.TemporaryDirectory() as folder:
            even = Video(self.frames[:, : max(height // 2 * 2, 2), : max(width // 2 * 2, 2)], fps=self.fps)
            (file,) = even.save(pathlib.Path(folder) / "video.mp4", crf=NOTEBOOK_CRF)
            data = base64.b64encode(file.read_bytes()).decode()
        return (
            f'<video controls loop muted title="{html.escape(repr(self))}" src="data:video/mp4;base64,{data}"></video>'
        )

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        _, height, width, _ = self.frames.shape
        return width, height

    def save(self, path: str | os.PathLike, *, crf: int | None = None) -> list[pathlib.Path]:
        """Writes the video in the format that the file ending names.

        That is .mp4 or .mov (H.264), .webm (VP9), .gif, or .png (numbered frames). Every file is written under a
        temporary name and renamed when complete.

        Args:
            path: the file.
            crf: quality of .mp4, .mov and .webm, from 0 (best) to 51 (63 for .webm); None is the official code's 10.

        Returns:
            The files written.

        Raises:
            InputError: an unknown ending, a folder that does not exist, or frames that the format cannot hold.
        """
        with VideoWriter(path, self.fps, self.metadata, crf) as writer:
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

    def __init__(
        self,
        path: str | os.PathLike,
        fps: float = 16,
        metadata: dict[str, Any] | None = None,
        crf: int | None = None,
    ):
        """See `Video.save`."""
        self.path = check_output(path, crf=crf, fps=fps)
        self.fps = rate("fps", fps)
        self._options = {} if crf is None else {"crf": crf}
        self.description = describe(metadata or {})
        self.files: list[pathlib.Path] = []
        self._shape: tuple[int, ...] = ()
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
        frames = check_pixels(frames)
        if not self._shape:
            self._shape = frames.shape[1:]
            check_output(self.path, size=(self._shape[1], self._shape[0]))
        if frames.shape[1:] != self._shape:
            raise InputError(f"frames of shape {frames.shape[1:]} after others of {self._shape}; give all one size")
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
            write = functools.partial(WRITERS[self.path.suffix.lower()], **self._options)
            self.files = write(self.path, self._frames(), self.fps, self.description)
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


def check_pixels(frames: Any) -> np.ndarray:
    """The frames of a video, uint8 [F, H, W, 3]; raises InputError for anything else."""
    array = np.asarray(frames)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3 or 0 in array.shape[1:]:
        what = f"{array.dtype} of shape {array.shape}" if array.ndim else f"{frames!r:.60}"
        raise InputError(f"frames are {what}; give uint8 [frames, height, width, 3]")
    return array


def check_output(
    path: str | os.PathLike, *, size: tuple[int, int] | None = None, fps: float | None = None, crf: int | None = None
) -> pathlib.Path:
    """Checks, before any work is done, that a video can be written to `path`; raises InputError if not."""
    path = path_of("output", path)
    ending = path.suffix.lower()
    check_writable(output_files(path, 1)[0], endings=tuple(WRITERS))
    best, worst = 0, 63 if ending == ".webm" else 51
    if crf is not None and (ending not in CONTAINERS or not best <= integer("crf", crf) <= worst):
        raise InputError(f"crf {crf}: is from 0 to 51 for .mp4 and .mov, to 63 for .webm, and for no other file")
    largest = {".png": 2**31 - 1, ".gif": 65_535}.get(ending, 16_384)
    if size is not None and max(size) > largest:
        raise InputError(f"output {path}: {ending} holds at most {largest} pixels a side, not {size[0]}x{size[1]}")
    if size is not None and ending in CONTAINERS and (size[0] % 2 or size[1] % 2):
        raise InputError(f"output {path}: {ending} needs even sizes, not {size[0]}x{size[1]}; use .gif or .png")
    if fps is not None and ending == ".gif" and rate("fps", fps) > 50:
        raise InputError(f"fps {fps}: .gif shows at most 50 frames per second; use .mp4")
    return path


def read_video(path: str | os.PathLike) -> Video:
    """Reads a video file back; the inverse of `Video.save` up to compression. Sound is left out.

    Frames are upright, and each stands at its time: where the file's rate varies, they are those that show at its
    average rate. Raises InputError where there is no such file, or no video in it.
    """
    with Clip(path) as clip:
        frames = [(end, clip.pixels(frame)) for end, frame in clip.frames()]
        fps, is_constant = measured_rate([end for end, _ in frames], clip.stream)
        metadata = parse_metadata(clip.metadata.get("comment", ""))
    pixels = [each for _, each in frames] if is_constant else list(resampled(frames, fps))
    return Video(np.stack(pixels), fps=rate("fps", fps.limit_denominator(1001)), metadata=metadata)


def describe(metadata: dict[str, Any]) -> str:
    """Metadata as files hold them; raises InputError for what JSON does not know."""
    try:
        text = json.dumps(metadata, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"metadata cannot be written into a file: {error}") from None
    # Bytes that are no UTF-8, as a command line may have them, become escapes of JSON.
    return text.encode(errors="backslashreplace").decode()


def parse_metadata(description: str) -> dict[str, Any]:
    """What a file says of its making; nothing where that is not written by us."""
    try:
        metadata = json.loads(description)
    except (ValueError, RecursionError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def output_files(path: str | os.PathLike, frames: int) -> list[pathlib.Path]:
    """The files that `Video.save` writes for a video of so many frames."""
    path = pathlib.Path(path)
    if path.suffix.lower() != ".png":
        return [path]
    return [path.with_name(f"{path.stem}-{index:04d}{path.suffix}") for index in range(frames)]


def is_complete(path: str | os.PathLike, frames: int) -> bool:
    """Whether a video of so many frames is at `path`."""
    return all(file.is_file() and file.stat().st_size for file in output_files(path, frames))


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """What was written of a video's making into its file, or its latents'; nothing where that does not say."""
    path = path_of("video", path)
    try:
        if path.suffix.lower() == ".png":
            with Image.open(path if path.is_file() else output_files(path, 1)[0]) as image:
                return parse_metadata(image.info["Description"])
        if path.suffix.lower() == ".npy":  # latents
            with path.open("rb") as file:
                np.lib.format.read_array(file, allow_pickle=False)
                return parse_metadata(file.read().decode())
        with Clip(path) as clip:
            return parse_metadata(clip.metadata["comment"])
    except (OSError, KeyError, ValueError, EOFError):
        return {}


# Of the files that PyAV writes: container, codec, and the codec's options.
CONTAINERS = {
    ".mp4": ("mp4", "libx264", {}),
    ".mov": ("mov", "libx264", {}),
    ".webm": ("webm", "libvpx-vp9", {"b": "0", "deadline": "good", "cpu-used": "4", "row-mt": "1"}),
}


def _write_stream(
    path: pathlib.Path, frames: Iterator[np.ndarray], fps: float, description: str, crf: int = OFFICIAL_CRF
) -> list[pathlib.Path]:
    import av

    first = next(frames)
    height, width, _ = first.shape
    container_format, codec, options = CONTAINERS[path.suffix.lower()]
    exact_rate, matrix = Fraction(fps).limit_denominator(1001), matrix_of(width, height)
    with written_whole(path) as temporary, av.open(str(temporary), "w", format=container_format) as container:
        container.metadata["comment"] = description
        stream: Any = container.add_stream(codec, rate=exact_rate, options={"crf": str(crf), **options})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        # The pixels are sRGB, whose primaries are BT.709's; the transfer is the one that players show unchanged.
        stream.codec_context.color_primaries = stream.codec_context.color_trc = BT709
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, LIMITED_RANGE
        # Threads by frames, as ffmpeg does. PyAV cuts each frame in slices, which is slower and compresses less.
        stream.thread_type = "AUTO"
        for index, frame in enumerate(itertools.chain([first], frames)):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
                format="yuv420p", dst_colorspace=matrix, dst_color_range=LIMITED_RANGE, interpolation=EXACT
            )
            picture.pts, picture.time_base = index, 1 / exact_rate
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return [path]


def _write_gif(path: pathlib.Path, frames: Iterator[np.ndarray], fps: float, description: str) -> list[pathlib.Path]:
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


def _write_pngs(path: pathlib.Path, frames: Iterator[np.ndarray], fps: float, description: str) -> list[pathlib.Path]:
    """out.png becomes out-0000.png, out-0001.png, ...; none of them appears unless all could be written."""
    del fps
    text = PngImagePlugin.PngInfo()
    text.add_itxt("Description", description)
    with naming_file(path), hidden(path, is_folder=True) as folder:
        for count, frame in enumerate(frames, start=1):
            Image.fromarray(frame).save(folder / f"{count}.png", format="PNG", pnginfo=text)
        targets = output_files(path, count)
        for index, target in enumerate(targets, start=1):
            (folder / f"{index}.png").replace(target)
    return targets


# What writes a file, by its ending: (path, frames, frames per second, description) -> the files written.
WRITERS: dict[str, Callable[..., list[pathlib.Path]]] = {
    **dict.fromkeys(CONTAINERS, _write_stream),
    ".gif": _write_gif,
    ".png": _write_pngs,
}
