"""Finished videos and the files they become."""

import contextlib
import itertools
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from PIL import Image, PngImagePlugin

from wan_jax.errors import InputError

# The official code writes libx264 at imageio's "quality 8", which is this constant rate factor.
OFFICIAL_CRF = 10
ENDINGS = (".mp4", ".gif", ".png")


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

    def save(self, path: str | os.PathLike) -> list[pathlib.Path]:
        """Writes the video in the format that the file ending names: .mp4 (H.264), .gif, or .png (numbered frames).

        Every file is written under a temporary name and renamed when complete. Returns the files written; raises
        InputError for an unknown ending or a folder that does not exist.
        """
        path = check_output(path)
        description = json.dumps(self.metadata, ensure_ascii=False)
        if path.suffix.lower() == ".mp4":
            with temporary_name(path) as temporary:
                _write_mp4(temporary, self.frames, self.fps, description)
            return [path]
        if path.suffix.lower() == ".gif":
            with temporary_name(path) as temporary:
                _write_gif(temporary, self.frames, self.fps, description)
            return [path]
        return _write_pngs(path, self.frames, description)


def check_output(path: str | os.PathLike) -> pathlib.Path:
    """Checks, before any work is done, that `path` can be written; raises InputError if not."""
    path = pathlib.Path(path)
    if path.suffix.lower() not in ENDINGS:
        raise InputError(f"output {path}: unknown ending {path.suffix!r}; use one of {', '.join(ENDINGS)}")
    check_folder(path)
    return path


def check_folder(path: pathlib.Path) -> None:
    """Raises InputError unless the folder that `path` would be written to exists."""
    if not path.parent.is_dir():
        raise InputError(f"output folder {path.parent} does not exist; make it first")


@contextlib.contextmanager
def temporary_name(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a name beside `path` with the same ending; on success it becomes `path`, otherwise it is removed."""
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = pathlib.Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes files private
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_array(path: str | os.PathLike, array: np.ndarray) -> pathlib.Path:
    """Writes one .npy file, complete or not at all."""
    path = pathlib.Path(path)
    with temporary_name(path) as temporary, temporary.open("wb") as file:  # an open file keeps NumPy from renaming it
        np.save(file, array)
    return path


def read_video(path: str | os.PathLike) -> Video:
    """Reads a video file back; the inverse of `Video.save` for .mp4 and .gif up to compression."""
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        description = container.metadata.get("comment", "")
        fps = round(stream.average_rate) if stream.average_rate else 16
    try:
        metadata = json.loads(description)
    except json.JSONDecodeError:
        metadata = {}
    return Video(frames=frames, fps=fps, metadata=metadata)


def _write_mp4(path: pathlib.Path, frames: np.ndarray, fps: int, description: str) -> None:
    import av

    _, height, width, _ = frames.shape
    with av.open(str(path), "w", format="mp4") as container:
        container.metadata["comment"] = description
        stream = container.add_stream("libx264", rate=fps, options={"crf": str(OFFICIAL_CRF)})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture.pts, picture.time_base = index, Fraction(1, fps)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def _write_gif(path: pathlib.Path, frames: np.ndarray, fps: int, description: str) -> None:
    # GIF counts in hundredths of a second: round the times, not the durations, so that the length stays right.
    times = [round(100 * index / fps) for index in range(len(frames) + 1)]
    durations = [10 * (end - start) for start, end in itertools.pairwise(times)]
    first, *rest = (Image.fromarray(frame) for frame in frames)
    comment = description.encode()
    first.save(path, format="GIF", save_all=True, append_images=rest, duration=durations, loop=0, comment=comment)


def _write_pngs(path: pathlib.Path, frames: np.ndarray, description: str) -> list[pathlib.Path]:
    """out.png becomes out-0000.png, out-0001.png, ...; none of them appears unless all could be written."""
    text = PngImagePlugin.PngInfo()
    text.add_itxt("Description", description)
    targets = [path.with_name(f"{path.stem}-{index:04d}{path.suffix}") for index in range(len(frames))]
    with tempfile.TemporaryDirectory(prefix=f".{path.stem}-", dir=path.parent) as folder:
        written = [pathlib.Path(folder) / target.name for target in targets]
        for temporary, frame in zip(written, frames, strict=True):
            Image.fromarray(frame).save(temporary, format="PNG", pnginfo=text)
        for temporary, target in zip(written, targets, strict=True):
            temporary.replace(target)
    return targets


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
