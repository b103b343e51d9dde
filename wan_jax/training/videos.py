"""A folder of videos with captions, and clips of them in the sizes that a run trains on."""

import csv
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wan_jax.config import WanConfig
from wan_jax.errors import InputError
from wan_jax.media.image import cover

METADATA = ("metadata.jsonl", "metadata.csv")
FILE_KEYS = ("file_name", "video")  # whichever the metadata has
CAPTION_KEYS = ("caption", "text", "prompt")


@dataclass(frozen=True)
class Example:
    """One line of the metadata."""

    file: Path
    caption: str


@dataclass(frozen=True)
class Bucket:
    """A size of clips; batches hold clips of one bucket."""

    width: int
    height: int
    frames: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.frames}"


def parse_buckets(text: str, config: WanConfig) -> tuple[Bucket, ...]:
    """ "832x480x33,480x832x33": width, height, frames of each.

    Raises InputError for what is none, or not of a size that the model can do.
    """
    buckets = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)x(\d+)x(\d+)\s*", part)
        if not match:
            raise InputError(f"bucket {part.strip()!r}: write WIDTHxHEIGHTxFRAMES, for example 832x480x33")
        bucket = Bucket(*map(int, match.groups()))
        multiple_height, multiple_width = config.size_multiple
        stride = config.vae.temporal_stride
        if bucket.width % multiple_width or bucket.height % multiple_height or not bucket.width * bucket.height:
            raise InputError(f"bucket {bucket}: must be multiples of {multiple_width} wide and {multiple_height} high")
        if bucket.frames % stride != 1 % stride:
            raise InputError(f"bucket {bucket}: frames must be {stride}n + 1")
        buckets.append(bucket)
    return tuple(buckets)


def read_metadata(folder: Path, metadata: Path | None = None) -> list[Example]:
    """The examples that a .jsonl or .csv file lists: file names, relative to the folder, and captions.

    Args:
      folder: of the videos.
      metadata: the file; None: metadata.jsonl or metadata.csv in the folder.

    Raises InputError for a file that is missing, or a line without the two.
    """
    if metadata is None:
        present = [folder / name for name in METADATA if (folder / name).is_file()]
        if len(present) != 1:
            found = "both of" if present else "neither"
            raise InputError(f"{folder}: has {found} {METADATA[0]} and {METADATA[1]}; it needs one, with captions")
        (metadata,) = present
    if not metadata.is_file():
        raise InputError(f"metadata {metadata} does not exist")
    text = metadata.read_text(encoding="utf-8-sig")
    rows: list[tuple[int, object]] = []
    if metadata.suffix == ".csv":
        rows = list(enumerate(csv.DictReader(text.splitlines()), start=2))
    else:
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                try:
                    rows.append((number, json.loads(line)))
                except json.JSONDecodeError as error:
                    raise InputError(f"{metadata}, line {number}: not JSON ({error.msg}); correct it") from None
    return [_example(folder, f"{metadata}, line {number}", row) for number, row in rows]


def _example(folder: Path, place: str, row: object) -> Example:
    values = []
    for keys in (FILE_KEYS, CAPTION_KEYS):
        present = [key for key in keys if isinstance(row, dict) and isinstance(row.get(key), str)]
        if not present:
            raise InputError(f"{place}: has no text under {' or '.join(keys)}; it needs a file name and a caption")
        values.append(row[present[0]])  # type: ignore[index]
    return Example(folder / values[0], values[1])


def read_clip(path: str | os.PathLike, fps: float, longest: int) -> np.ndarray:
    """The first frames of a video at `fps`, at most `longest`: uint8 [F, H, W, 3].

    Of a video of another rate, the frame that shows at each time. Raises InputError for a file that is no video, or a
    damaged one.
    """
    import av

    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file")
    frames: list[np.ndarray] = []
    try:
        with av.open(os.fspath(path)) as container:
            rate = container.streams.video[0].average_rate
            ratio = fps / float(rate) if rate else 1.0
            for index, frame in enumerate(container.decode(video=0)):
                # How many of the wanted frames show before the next one of the video.
                due = min(math.ceil((index + 1) * ratio - 1e-6), longest) - len(frames)
                if due > 0:
                    frames += [frame.to_ndarray(format="rgb24")] * due
                if len(frames) == longest:
                    break
    except (av.FFmpegError, IndexError) as error:
        raise InputError(f"{path}: cannot be decoded ({' '.join(str(error).split())})") from None
    if not frames:
        raise InputError(f"{path}: has no frames")
    return np.stack(frames)


def choose_bucket(frames: np.ndarray, buckets: Sequence[Bucket]) -> Bucket:
    """The bucket whose shape is nearest to a clip's, of those that it is long enough for.

    Of equal shapes the longest is taken, then the largest. Raises InputError where the clip is too short for all.
    """
    count, height, width, _ = frames.shape
    possible = [bucket for bucket in buckets if bucket.frames <= count]
    if not possible:
        shortest = min(bucket.frames for bucket in buckets)
        raise InputError(f"has {count} frames; the shortest bucket needs {shortest}")

    def preference(bucket: Bucket) -> tuple[float, int, int]:
        distance = abs(math.log(width / height * bucket.height / bucket.width))
        return round(distance, 6), -bucket.frames, -bucket.width * bucket.height

    return min(possible, key=preference)


def fit_to_bucket(frames: np.ndarray, bucket: Bucket) -> np.ndarray:
    """The clip in the bucket's size: scaled until it covers it, the centre kept, and the first frames."""
    return np.stack([cover(frame, (bucket.width, bucket.height)) for frame in frames[: bucket.frames]])
