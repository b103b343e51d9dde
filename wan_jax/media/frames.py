"""Frames of video files: RGB, upright, in the shape they are shown in, each at its own time."""

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from wan_jax.errors import InputError
from wan_jax.fields import path_of, rate

if TYPE_CHECKING:
    import av

Frame = TypeVar("Frame")

# Codes of ITU-T H.273, and swscale's flags for exact conversion: without them colours lose a level or two.
BT709, UNSPECIFIED, BT601, LIMITED_RANGE = 1, 2, 6, 1
EXACT = 4 | 1 << 13 | 1 << 14 | 1 << 18  # bicubic, full chroma out and in, accurate rounding


def matrix_of(width: int, height: int) -> int:
    """The matrix that players take for a video of this size without tags: BT.709 above the size of a DVD."""
    return BT709 if width >= 1280 or height > 576 else BT601


class Clip:
    """A video file that is open; use it in a `with` block.

    Its sound, covers and other streams are left out. Raises InputError for what is no video, or is damaged.
    """

    def __init__(self, path: str | os.PathLike):
        import av

        self.path = path_of("video", path)
        self._size: tuple[int, int] | None = None
        if not self.path.is_file():
            raise InputError(f"video {self.path} does not exist")
        with _naming(self.path):
            self.container: Any = av.open(str(self.path), metadata_errors="replace")
            stream: Any = self.container.streams.best("video")
            if stream is None:
                self.container.close()
                raise ValueError("it has no pictures")
            stream.thread_type, self.stream = "AUTO", stream

    def __enter__(self) -> "Clip":
        return self

    def __exit__(self, *error: object) -> None:
        self.container.close()

    @property
    def metadata(self) -> dict[str, str]:
        """Keys are lower case: containers differ in that."""
        return {name.lower(): value for name, value in self.container.metadata.items()}

    def frames(self) -> Iterator[tuple[Fraction, "av.VideoFrame"]]:
        """Yields each frame and when it ends, in seconds from the first one's beginning.

        A frame without a time of its own, or with one before its predecessor's, follows at the stream's average rate.
        """
        period = 1 / Fraction(self.stream.average_rate or self.stream.guessed_rate or 16)
        first: Fraction | None = None
        begin, before, shown = Fraction(0), period, None
        with _naming(self.path):
            for frame in self.container.decode(self.stream):
                time = None if frame.pts is None else frame.pts * frame.time_base
                if shown is not None:
                    end = begin + period if time is None or first is None else time - first
                    end = end if end > begin else begin + period
                    yield end, shown
                    before, begin = end - begin, end
                elif time is not None:
                    first = time
                shown = frame
            if shown is None:
                raise ValueError("it has no frames")
            # Durations in files are unreliable: a last frame that ends at once shows as long as those of a steady clip.
            duration = (shown.duration or 0) * self.stream.time_base
            yield begin + (duration if 2 * duration > before else min(before, Fraction(1, 10))), shown

    def pixels(self, frame: "av.VideoFrame") -> np.ndarray:
        """A frame as it is shown, uint8 [H, W, 3]: colours by its tags, square pixels, turned as the file says."""
        self._size = self._size or (frame.width, frame.height)  # a stream may change it midway
        (width, height), shape = self._size, self.stream.sample_aspect_ratio
        if shape and Fraction(1, 4) <= shape <= 4:
            width = max(round(width * shape), 1)
        untagged = frame.colorspace == UNSPECIFIED and not frame.format.is_rgb
        colorspace = matrix_of(frame.width, frame.height) if untagged else None
        with _naming(self.path):
            pixels = frame.to_ndarray(
                format="rgb24", width=width, height=height, src_colorspace=colorspace, interpolation=EXACT
            )
        matrix: Any = frame.side_data.get("DISPLAYMATRIX")
        return pixels if matrix is None else turned(pixels, np.frombuffer(matrix, np.int32))


@contextlib.contextmanager
def _naming(path: os.PathLike) -> Iterator[None]:
    """Turns what PyAV raises into an InputError that names the file."""
    import av

    try:
        yield
    except (av.FFmpegError, ValueError, MemoryError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"video {path} cannot be read as a video ({reason}); give, for example, an MP4 file") from None


def turned(pixels: np.ndarray, matrix: Sequence[int] | np.ndarray) -> np.ndarray:
    """Pixels [H, W, 3] turned and mirrored by a display matrix (ISO 14496-12), to the nearest quarter turn."""
    right, down_of_right, _, right_of_down, down = (int(each) for each in matrix[:5])
    if abs(down_of_right) > abs(right):
        pixels, right, down = pixels.swapaxes(0, 1), right_of_down, down_of_right
    return pixels[:: -1 if down < 0 else 1, :: -1 if right < 0 else 1]


def resampled(frames: Iterable[tuple[Fraction | float, Frame]], fps: float | Fraction) -> Iterator[Frame]:
    """Yields the frame that shows at each k / fps seconds.

    Args:
        frames: when each ends, in seconds, and the frame; the first begins at 0.
        fps: the rate of what is yielded. Times in files are rounded: a frame that begins within a tenth of a frame
            counts.
    """
    count = 0
    for end, frame in frames:
        while (count + 0.1) / fps < end:
            yield frame
            count += 1


def read_frames(path: str | os.PathLike, fps: float, longest: int | None = None) -> np.ndarray:
    """Reads the frames of a video file as they show at `fps`, at most `longest`: uint8 [F, H, W, 3]; see `Clip`."""
    fps = rate("fps", fps)
    with Clip(path) as clip:
        shown = itertools.islice(resampled(clip.frames(), fps), longest)
        # A frame that shows several times is converted once.
        return np.stack([pixels for frame, same in itertools.groupby(shown) for pixels in _repeated(clip, frame, same)])


def _repeated(clip: Clip, frame: "av.VideoFrame", same: Iterable[Any]) -> list[np.ndarray]:
    return [clip.pixels(frame)] * sum(1 for _ in same)


def measured_rate(ends: Sequence[Fraction], stream: Any) -> tuple[Fraction, bool]:
    """The frames per second of frames that end at these times, and whether they come at that rate throughout.

    Containers round times: the stream's own average is taken where it explains them, then the nearest whole number.
    """
    count, average = len(ends) - 1, Fraction(stream.average_rate or 16)
    if not count:
        return average, True
    mean = count / ends[-2]
    for fps, ticks in ((average, 0.5), (Fraction(max(round(mean), 1)), 1)):
        slack = min(ticks * stream.time_base, 0.5 / fps) + 1e-9
        if all(abs(end - index / fps) <= slack for index, end in enumerate(ends[:-1], start=1)):
            return fps, True
    return mean, False
