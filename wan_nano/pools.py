"""Latents and texts for the experts, made on the device while they are learnt from."""

import concurrent.futures
import threading
from collections.abc import Generator, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wan_jax.training.step import TrainState
from wan_nano import losses
from wan_nano.data import scenes_of
from wan_nano.recipe import Bucket
from wan_nano.stage import Run


class Later:
    """A jitted function that is compiled by a thread while other work goes on."""

    def __init__(self, threads: concurrent.futures.Executor, jitted: Any, *args: Any):
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
        self._compiled = threads.submit(lambda: jitted.lower(*shapes).compile())

    def __call__(self, *args: Any) -> Any:
        """Waits until it is compiled, and raises what that raised."""
        return self._compiled.result()(*args)


class Pool:
    """Latents and texts of one bucket, on the device; some are made anew all the while.

    Args:
      run: what the stages share.
      bucket: which videos.
      parameters: of "vae" and "text_encoder".
      source: of chunks of scenes with their captions.
      step: a jitted training step that reads the pool as its frozen arrays.
      seed: of what is drawn.
    """

    def __init__(self, run: Run, bucket: Bucket, parameters: Any, source: Iterator[Any], step: Any, seed: int):
        config, fill = run.config, run.recipe.fill
        self._run, self.bucket, self._parameters, self._source = run, bucket, parameters, source
        width, height = bucket.size
        stride = config.vae.spatial_stride
        length = (bucket.frames - 1) // config.vae.temporal_stride + 1
        place = jax.devices()[0]
        self._arrays = {
            "latents": jnp.zeros(
                (bucket.capacity, config.vae.z_dim, length, height // stride, width // stride), jnp.bfloat16
            ),
            "texts": jnp.zeros((bucket.capacity, 3, run.text_length, config.text_encoder.dim), jnp.bfloat16),
        }
        self._arrays = jax.device_put(self._arrays, place)
        self._made = 0
        self._rest: dict[str, np.ndarray] | None = None
        self._offset = 0
        self._fill = jax.jit(losses.make_fill(config, run.recipe.compute), donate_argnums=(0,))
        self._step = step
        self._size = fill
        self._generator = np.random.default_rng((seed, bucket.frames, *bucket.size))
        self.ready = False

    def prepare(self, state: TrainState, frozen: Any) -> None:
        """Compiles both functions, beside what else goes on, and fills the pool for the first time."""
        batch = {"index": np.zeros((1, self.bucket.batch), np.int32)}
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (state, {**frozen, **self._arrays}))
        self._step = self._step.lower(*shapes, batch).compile()
        while self._made < min(self._run.recipe.first_fill, self.bucket.capacity):
            self.refill()
        jax.block_until_ready(self._arrays)
        self.ready = True

    def refill(self) -> None:
        if self._rest is None or self._offset + self._size > len(self._rest["count"]):
            self._rest, self._offset = next(self._source), 0
        some = {name: array[self._offset : self._offset + self._size] for name, array in self._rest.items()}
        self._offset += self._size
        videos = self._run.draw(int(self._generator.integers(2**31)), scenes_of(some), self.bucket)
        start = self._made % (self.bucket.capacity // self._size * self._size)
        batch = {name: some[name] for name in ("tokens", "mask")}
        self._arrays = self._fill(self._arrays, start, self._parameters, batch, videos)
        self._made += self._size

    def step(self, state: TrainState, frozen: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        filled = min(self._made, self.bucket.capacity // self._size * self._size)
        index = self._generator.integers(0, filled, (1, self.bucket.batch), dtype=np.int32)
        return self._step(state, {**frozen, **self._arrays}, {"index": index})


class Shared:
    """A generator that several threads may ask."""

    def __init__(self, generator: Generator[Any, None, None]):
        self._generator, self._lock = generator, threading.Lock()

    def __iter__(self) -> "Shared":
        return self

    def __next__(self) -> Any:
        with self._lock:
            return next(self._generator)

    def close(self) -> None:
        with self._lock:
            self._generator.close()
