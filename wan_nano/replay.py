"""Replay buffers: latents and texts for the experts, made on the device while they are learnt from."""

import contextlib
import functools
import itertools
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wan_jax.training.trainer import Trainer
from wan_nano.data import scenes_of
from wan_nano.losses import make_encode
from wan_nano.recipe import Bucket
from wan_nano.run import NanoRun


class ReplayBuffer:
    """Latents and texts of one bucket's videos, on the device; new ones replace the oldest.

    Args:
      run: what the stages share.
      bucket: which videos.
      encoders: parameters of "vae" and "text_encoder".
      source: of chunks of scenes with their captions; other threads may read it, too.
      seed: of the videos that are drawn.
    """

    def __init__(self, run: NanoRun, bucket: Bucket, encoders: Any, source: "SharedIterator", seed: int):
        config, self._size = run.config, run.options.fill
        self._run, self.bucket, self._encoders, self._source = run, bucket, encoders, source
        (width, height), stride = bucket.size, config.vae.spatial_stride
        length = (bucket.frames - 1) // config.vae.temporal_stride + 1
        self._capacity = bucket.capacity // self._size * self._size
        latents = (self._capacity, config.vae.z_dim, length, height // stride, width // stride)
        texts = (self._capacity, 3, config.denoiser.text_length, config.text_encoder.dim)
        self._arrays = {"latents": jnp.zeros(latents, jnp.bfloat16), "texts": jnp.zeros(texts, jnp.bfloat16)}
        self._encode = jax.jit(make_encode(config, run.options.compute))
        self._generator = np.random.default_rng((seed, bucket.frames, *bucket.size))
        self._examples = self._read_source()
        self._added = 0
        self.ready = False

    def fill(self, number: int) -> None:
        """Makes the first examples."""
        while self._added < min(number, self._capacity):
            self.add()
        jax.block_until_ready(self._arrays)

    def add(self) -> None:
        """Renders and encodes the next videos."""
        examples = next(self._examples)
        videos = self._run.draw(int(self._generator.integers(2**31)), scenes_of(examples), self.bucket)
        captions = {name: examples[name] for name in ("tokens", "mask")}
        new = self._encode(self._encoders, captions, videos)
        self._arrays = _write(self._arrays, new, self._added % self._capacity)
        self._added += self._size

    def sample(self, generator: np.random.Generator) -> dict[str, jax.Array]:
        """Draws a batch: latents [b, C, F, h, w] and texts [b, languages, T, dim]."""
        filled = min(self._added, self._capacity)
        return _gather(self._arrays, generator.integers(0, filled, self.bucket.batch, dtype=np.int32))

    def _read_source(self) -> Iterator[dict[str, np.ndarray]]:
        while True:
            chunk = next(self._source)
            for start in range(0, len(chunk["count"]) - self._size + 1, self._size):
                yield {name: array[start : start + self._size] for name, array in chunk.items()}


@functools.partial(jax.jit, donate_argnums=0)
def _write(arrays: Any, new: Any, start: Any) -> Any:
    def write(array: jax.Array, part: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(array, part.astype(array.dtype), start, axis=0)

    return jax.tree.map(write, arrays, new)


@jax.jit
def _gather(arrays: Any, index: Any) -> Any:
    return jax.tree.map(lambda array: array[index], arrays)


class SharedIterator:
    """An iterator that several threads may ask."""

    def __init__(self, iterator: Iterator[Any]):
        self._iterator, self._lock = iterator, threading.Lock()

    def __next__(self) -> Any:
        with self._lock:
            return next(self._iterator)


def draw_batches(
    buffers: Sequence[ReplayBuffer], seed: int, add_every: int | None, start: int
) -> Iterator[dict[str, jax.Array]]:
    """Draws batches of buffers that are ready, each as often as its bucket says.

    Args:
      buffers: the first is filled; others are drawn from when they are ready.
      seed: of the draws, with `start`.
      add_every: steps between additions to the buffer that is drawn from; None: someone else adds.
      start: number of the first step.
    """
    generator = np.random.default_rng((seed, start))
    parts = np.array([buffer.bucket.part for buffer in buffers])
    for step in itertools.count(start):
        buffer = buffers[generator.choice(len(buffers), p=parts / parts.sum())]
        buffer = buffer if buffer.ready else buffers[0]
        if add_every is not None and step % add_every == 0:
            buffer.add()
        yield buffer.sample(generator)


@contextlib.contextmanager
def preparing(buffers: Sequence[ReplayBuffer], number: int, trainer: Trainer) -> Iterator[None]:
    """Fills buffers and compiles the trainer's step for them in a thread while the block runs."""
    over = threading.Event()

    def prepare() -> None:
        for buffer in buffers:
            if over.is_set():
                return
            buffer.fill(number)
            trainer.compile(buffer.sample(np.random.default_rng(0)))
            buffer.ready = True

    thread = threading.Thread(target=prepare, name="prepare buffers", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()  # a process that exits while a thread compiles aborts
