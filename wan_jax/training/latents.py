"""Latents and texts of a folder of videos: encoded once, kept on disk, loaded in batches."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import ml_dtypes
import numpy as np
from flax import nnx

from wan_jax.errors import InputError
from wan_jax.media.frames import read_frames
from wan_jax.parameters import named_parameters
from wan_jax.pipeline import WanPipeline
from wan_jax.runtime.files import written_whole
from wan_jax.training.videos import Bucket, Example, choose_bucket, fit_to_bucket

FORMAT = 2  # of the cache; another number encodes everything again
FINGERPRINT_VALUES = 1024
EPOCHS = 10**9  # for ever: without a number grain counts up to the largest one, which a batch of 1 exceeds


@dataclass(frozen=True)
class Record:
    """An encoded example: where its arrays are."""

    latents: Path  # float32 [C, F', h, w], the mean that the VAE gives, normalised
    text: Path  # bfloat16 bits [tokens, text_dim], without the padding


def encode_examples(
    examples: Sequence[Example],
    buckets: Sequence[Bucket],
    pipeline: WanPipeline,
    cache: Path,
    fps: float,
    note: Callable[[str], None],
) -> dict[Bucket, list[Record]]:
    """Encodes what the cache does not have yet; returns the records by bucket.

    A record's key is made of the video's content, the rate and buckets, and the weights of the model that encodes it (a
    caption's: and the tokenizer). A video that cannot be used is named by `note` and left out, and how many there were.

    Raises InputError where none can be used.
    """
    cache.mkdir(parents=True, exist_ok=True)
    vae = fingerprint(pipeline.vae)
    text_encoder = fingerprint(pipeline.text_encoder) + pipeline.tokenizer.fingerprint
    records: dict[Bucket, list[Record]] = {}
    skipped = 0
    for example in examples:
        try:
            bucket, latents = _encode_video(example.file, buckets, pipeline, cache, fps, vae)
        except InputError as error:
            skipped += 1
            note(f"skipped {error}" if str(example.file) in str(error) else f"skipped {example.file}: {error}")
            continue
        text = _encode_text(example.caption, pipeline, cache, text_encoder)
        records.setdefault(bucket, []).append(Record(latents, text))
    if not records:
        raise InputError(f"none of the {len(examples)} videos can be used; see the notes above")
    if skipped:
        note(f"{skipped} of {len(examples)} videos were skipped")
    return records


def _encode_video(
    file: Path, buckets: Sequence[Bucket], pipeline: WanPipeline, cache: Path, fps: float, vae: str
) -> tuple[Bucket, Path]:
    content = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""
    key = _key(FORMAT, content, vae, fps, list(map(str, buckets)))
    # The name ends in the bucket, so that one that is there need not be decoded.
    for bucket in buckets:
        path = cache / f"{key}-{bucket}.npy"
        if content and path.exists():
            return bucket, path
    frames = read_frames(file, fps, max(bucket.frames for bucket in buckets))
    bucket = choose_bucket(frames, buckets)
    path = cache / f"{key}-{bucket}.npy"
    _save(path, pipeline.encode(fit_to_bucket(frames, bucket)))
    return bucket, path


def _encode_text(caption: str, pipeline: WanPipeline, cache: Path, text_encoder: str) -> Path:
    path = cache / f"{_key(FORMAT, caption, text_encoder, pipeline.config.denoiser.text_length)}.npy"
    if not path.exists():
        text = np.asarray(pipeline.encode_prompts([caption]))[0].astype(ml_dtypes.bfloat16)
        tokens = np.flatnonzero(np.any(text != 0, axis=1))  # rows of padding are zeros
        length = tokens[-1] + 1 if len(tokens) else 0
        _save(path, text[:length].view(np.uint16))  # NumPy's files know no bfloat16
    return path


def fingerprint(model: nnx.Module) -> str:
    """A hash of a model: names, shapes and dtypes of its parameters, and the beginning of each."""
    digest = hashlib.sha256()
    for name, array in sorted(named_parameters(model).items()):
        beginning = array[(0,) * (array.ndim - 1)][:FINGERPRINT_VALUES] if array.ndim else array
        digest.update(f"{name} {array.shape} {array.dtype}".encode() + np.asarray(beginning).tobytes())
    return digest.hexdigest()


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _save(path: Path, array: np.ndarray) -> None:
    with written_whole(path) as temporary, temporary.open("wb") as file:
        np.save(file, array)


class RecordSource:
    """The records of one bucket, for grain: `source[i]` loads one."""

    def __init__(self, records: Sequence[Record], text_length: int):
        self._records = records
        self._text_length = text_length

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        record = self._records[index]
        text = np.load(record.text).view(ml_dtypes.bfloat16)
        padding = np.zeros((self._text_length - len(text), text.shape[1]), text.dtype)
        return {"latents": np.load(record.latents), "text": np.concatenate([text, padding])}


class LatentBatches:
    """Batches {"latents": [B, C, F', h, w], "text": [B, text_length, text_dim], "row": [B]}, each of one bucket.

    They come for ever. Every example of a bucket comes once before any comes again; buckets take turns in proportion
    to their examples. The order is a function of the seed. Files are read ahead by threads. See `trainer.Batches`.
    `note` is told where a run goes on with other data.
    """

    def __init__(
        self,
        records: Mapping[Bucket, Sequence[Record]],
        batch_size: int,
        text_length: int,
        seed: int,
        note: Callable[[str], None],
    ):
        self._note = note
        names = sorted(
            f"{bucket} {each.latents.name} {each.text.name}" for bucket in records for each in records[bucket]
        )
        self._data = {"examples": len(names), "digest": _key(names)}
        self._rows = np.arange(batch_size, dtype=np.int32)
        in_order = [records[bucket] for bucket in sorted(records, key=str)]
        datasets = [
            grain.MapDataset.source(RecordSource(bucket, text_length))
            .shuffle(seed=seed)
            .repeat(EPOCHS)
            .batch(batch_size)
            for bucket in in_order
        ]
        weights = [float(len(bucket)) for bucket in in_order]
        mixed = datasets[0] if len(datasets) == 1 else grain.MapDataset.mix(datasets, weights)
        options = grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)
        self._iterator: Any = iter(mixed.to_iter_dataset(read_options=options))

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return {**next(self._iterator), "row": self._rows}

    def get_state(self) -> Any:
        return {"data": self._data, "iterator": self._iterator.get_state()}

    def set_state(self, state: Any) -> None:
        before = state.get("data", self._data)
        if before != self._data:
            now, count = self._data["examples"], before["examples"]
            self._note(f"the data are not those that this run has trained on: {now} examples, {count} before")
        self._iterator.set_state(state.get("iterator", state))
