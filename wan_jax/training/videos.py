"""A folder of videos with captions, and clips of them in the sizes that a run trains on."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wan_jax.config import WanConfig
from wan_jax.errors import InputError
from wan_jax.media.image import cover
from wan_jax.runtime.rows import read_rows

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
    examples = [
        _example(folder, place, row) for place, row in read_rows(metadata, '{"file_name": ..., "caption": ...}')
    ]
    if not examples:
        raise InputError(f"metadata {metadata} is empty; write a file name and a caption a line")
    return examples


def _example(folder: Path, place: str, row: dict[str, Any]) -> Example:
    values = []
    for keys in (FILE_KEYS, CAPTION_KEYS):
        present = [row[key] for key in keys if isinstance(row.get(key), str)]
        if not present:
            raise InputError(f"{place}: has no text under {' or '.join(keys)}; it needs a file name and a caption")
        values.append(present[0])
    if not values[0].strip() or "\0" in values[0]:
        raise InputError(f"{place}: names no file; write one under {' or '.join(FILE_KEYS)}")
    return Example(folder / values[0], values[1])


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
