"""Trains the nano model in the time there is: python -m wan_jax.nano.train --output DIR --stages text=60,vae=400.

Stages: "text" (the text encoder, on captions alone), "vae", "experts" (both, on latents that are rendered and encoded
all the while). A stage ends when its seconds are over; the learning rate falls with them. The next call goes on where
the last one ended: from --state, which holds everything, or from --output, which holds the averaged weights in a few
small files.
"""

import argparse
import concurrent.futures
import functools
import json
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from jax.typing import ArrayLike

from wan_jax import xla_flags
from wan_jax.config import WanConfig, get_preset
from wan_jax.errors import InputError, unknown_name
from wan_jax.kernels.attention import attention
from wan_jax.models.parameters import with_parameters
from wan_jax.models.text_encoder import TextEncoder
from wan_jax.models.vae import VAE
from wan_jax.nano import losses
from wan_jax.nano.data import CHUNK, TEST_SEED, chunks, scenes_of, train_tokenizer
from wan_jax.nano.digits import digit_atlas
from wan_jax.nano.render import render_batch
from wan_jax.nano.scenes import Scenes, draw_scenes
from wan_jax.nano.whole_video import decode_whole, encode_moments
from wan_jax.tokenizer import Tokenizer
from wan_jax.training.checkpoints import named_leaves
from wan_jax.training.optimizer import decayed
from wan_jax.training.step import Loss, TrainState, init_state, make_step

STAGES = ("text", "vae", "experts")
SHARD_BYTES = 15 * 2**20


@dataclass(frozen=True)
class Bucket:
    """Videos of one size that the experts learn, and how often."""

    frames: int
    size: tuple[int, int]
    batch: int
    capacity: int  # latents kept
    part: float  # of the steps


@dataclass(frozen=True)
class Recipe:
    """How the nano model is trained. The defaults are for one H200."""

    compute: str = "bfloat16"
    attention: str | None = None
    workers: int = 12
    chunk: int = CHUNK
    text_batch: int = 1024
    text_rate: float = 1e-3
    text_capacity: int = 40 * CHUNK  # scenes whose captions are kept
    vae_batch: int = 32
    vae_rate: float = 6e-4
    vae_window: tuple[int, int, int] = (17, 64, 64)
    vae_whole_part: float = 0.3  # of the time at the end: whole videos
    vae_whole_batch: int = 8
    expert_rate: float = 8e-4
    fill: int = 64  # videos rendered and encoded at once
    fill_every: int = 8  # steps between that
    buckets: tuple[Bucket, ...] = (
        Bucket(33, (96, 96), 256, 96 * 1024, 0.82),
        Bucket(33, (128, 96), 192, 12 * 1024, 0.06),
        Bucket(17, (96, 128), 256, 12 * 1024, 0.06),
        Bucket(49, (96, 96), 160, 12 * 1024, 0.06),
    )
    first_fill: int = 8 * 1024  # videos in a pool before it is learnt from


SMALL = Recipe(
    compute="float32",
    workers=0,
    chunk=256,
    text_batch=64,
    text_capacity=4096,
    vae_batch=4,
    vae_window=(5, 32, 32),
    vae_whole_part=0.0,
    fill=4,
    fill_every=4,
    buckets=(Bucket(33, (96, 96), 8, 512, 1.0),),
    first_fill=32,
)


class Later:
    """A jitted function that is compiled by a thread while other work goes on."""

    def __init__(self, threads: concurrent.futures.Executor, jitted: Any, *args: Any):
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
        self._compiled = threads.submit(lambda: jitted.lower(*shapes).compile())

    @property
    def ready(self) -> bool:
        """False while it compiles, and for good where it does not."""
        return self._compiled.done() and self._compiled.exception() is None

    def __call__(self, *args: Any) -> Any:
        """Waits until it is compiled, and raises what that raised."""
        return self._compiled.result()(*args)


class Log:
    """Lines for people on standard error, the same as JSON in log.jsonl."""

    def __init__(self, folder: Path):
        self._path = folder / "log.jsonl"
        self._start = time.perf_counter()

    def __call__(self, stage: str, **figures: Any) -> None:
        figures = {name: round(x, 5) if isinstance(x, float) else x for name, x in figures.items()}
        line = {"stage": stage, "clock": round(time.perf_counter() - self._start, 1), **figures}
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print("  ".join(f"{name} {value}" for name, value in line.items()), file=sys.stderr, flush=True)


@dataclass
class Run:
    """What all stages share."""

    config: WanConfig
    recipe: Recipe
    output: Path  # small files: averaged weights
    state: Path  # everything
    digits: Path | None
    log: Log
    more: float = 0.0  # seconds of the last stage that later calls will add
    seed: int = 0
    atlas: jax.Array = field(init=False)

    def __post_init__(self):
        for folder in (self.output, self.state):
            folder.mkdir(parents=True, exist_ok=True)
        self.atlas = jnp.asarray(digit_atlas(self.digits))
        self.tokenizer = self.state / "tokenizer"
        if not self.tokenizer.exists():
            train_tokenizer(self.tokenizer, self.config.text_encoder.vocab_size)

    def draw(
        self,
        seed: int,
        scenes: Scenes,
        bucket: Bucket,
        window: tuple[int, int, int] | None = None,
        atlas: jax.Array | None = None,
    ) -> jax.Array:
        """Videos of scenes: [N, F, H, W, 3], or windows of them."""
        atlas = self.atlas if atlas is None else atlas
        return render_batch(seed, scenes.as_dict(), atlas, frames=bucket.frames, size=bucket.size, window=window)

    @property
    def text_length(self) -> int:
        return self.config.denoiser.text_length

    def chunks(self, start: int) -> Generator[dict[str, np.ndarray], None, None]:
        return chunks(start, self.tokenizer, self.text_length, self.recipe.workers, self.recipe.chunk)

    def weights(self, name: str) -> dict[str, jax.Array]:
        """Averaged weights of an earlier stage, from the output or the state; they are in the output then."""
        folder = self.output if list(self.output.glob(f"{name}-*.npz")) else self.state
        arrays = read_shards(folder, name)
        write_shards(self.output, name, arrays)
        return {name: jnp.asarray(array) for name, array in arrays.items()}


def optimizer(rate: float) -> optax.GradientTransformation:
    """AdamW with a learning rate that the loop sets, because it depends on the clock."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.inject_hyperparams(optax.adamw, static_args=("mask", "b1", "b2", "eps", "weight_decay"))(
            learning_rate=rate, b1=0.9, b2=0.98, eps=1e-8, weight_decay=0.01, mask=decayed
        ),
    )


def rate_factor(step: int, fraction: float, warmup: int = 200) -> float:
    """Of the full learning rate: up in a line over the first steps, level, and down to zero in the last half."""
    return min((step + 1) / warmup, 1.0) * min(1.0, 2 * (1 - fraction) + 0.01)


class Stage:
    """The loop of one stage: steps until its time is over, figures, and its state on disk.

    Args:
      run: what the stages share.
      name: of the stage and of its files.
      parameters: to start from, unless there is a state.
      rate: the full learning rate.
      seconds: for this call, compiling included.
      export: makes of the averaged parameters what goes into the output, by file name.
    """

    def __init__(
        self,
        run: Run,
        name: str,
        parameters: dict[str, jax.Array],
        rate: float,
        seconds: float,
        export: Callable[[dict[str, jax.Array]], dict[str, dict[str, jax.Array]]],
        ema_decay: float,
    ):
        self._run, self._name, self._rate, self._export = run, name, rate, export
        self._optimizer = optimizer(rate)
        self._ema_decay = ema_decay
        self._start = time.perf_counter()
        self._seconds = seconds
        self._earlier = 0.0
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        parameters = {key: jax.device_put(value, place) for key, value in parameters.items()}
        self.state = init_state(parameters, self._optimizer, seed=run.seed, ema=True, replicated=place)
        path = run.state / f"{name}.npz"
        if path.exists():
            with np.load(path) as file:
                self._earlier = float(file["seconds"])
                leaves = [jnp.asarray(file[leaf]) for leaf in named_leaves(self.state)]
            self.state = jax.tree.unflatten(jax.tree.structure(self.state), leaves)
            run.log(name, continues_after_step=self.step, seconds=self._earlier)

    @property
    def step(self) -> int:
        return int(self.state.step)

    @property
    def fraction(self) -> float:
        """How much of all the time of this stage is over."""
        spent = time.perf_counter() - self._start
        left = max(self._seconds - spent, 0.0) + self._run.more
        done = self._earlier + spent
        return done / (done + left) if done + left > 0 else 1.0

    def make_step(self, loss: Loss) -> Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, jax.Array]]]:
        return jax.jit(make_step(loss, self._optimizer, self._ema_decay), donate_argnums=(0,))

    def loop(self, one_step: Callable[[TrainState, int], tuple[TrainState, dict[str, jax.Array]]]) -> TrainState:
        """Calls one_step(state, step) until the time is over, at least once; returns the last state, which is saved."""
        first = number = self.step
        figures: dict[str, jax.Array] = {}
        logged, saved, rate_steps = time.perf_counter(), time.perf_counter(), number
        deadline = self._start + self._seconds
        while (now := time.perf_counter()) < deadline or number == first:
            fraction = self.fraction
            factor = rate_factor(number, fraction)
            self.state, figures = one_step(with_learning_rate(self.state, self._rate * factor), number)
            number += 1
            # The device is at most a few steps behind, so that the time is kept.
            if number % 4 == 0:
                jax.block_until_ready(figures["loss"])
            if now - logged > 10:
                values = {name: float(value) for name, value in figures.items()}
                speed = (number - rate_steps) / (time.perf_counter() - logged)
                self._run.log(self._name, step=number, fraction=fraction, steps_per_second=speed, **values)
                if not np.isfinite(values["loss"]):
                    raise RuntimeError(f"stage {self._name}: the loss is not finite at step {number}")
                logged, rate_steps = time.perf_counter(), number
            if now - saved > 100:
                self.save()
                saved = time.perf_counter()
        self._run.log(self._name, step=number, done=True, **{name: float(value) for name, value in figures.items()})
        self.save()
        return self.state

    def save(self) -> None:
        seconds = self._earlier + time.perf_counter() - self._start
        arrays: dict[str, Any] = {name: np.asarray(leaf) for name, leaf in named_leaves(self.state).items()}
        temporary = self._run.state / f".{self._name}.npz"
        np.savez(temporary, seconds=np.float64(seconds), **arrays)
        temporary.replace(self._run.state / f"{self._name}.npz")
        for name, parameters in self._export(self.state.ema).items():
            for folder in (self._run.output, self._run.state):
                write_shards(folder, name, parameters)


def with_learning_rate(state: TrainState, rate: float) -> TrainState:
    clip, adamw = state.optimizer
    hyperparameters = {**adamw.hyperparams, "learning_rate": jnp.asarray(rate, jnp.float32)}
    return replace(state, optimizer=(clip, adamw._replace(hyperparams=hyperparameters)))


def write_shards(folder: Path, name: str, parameters: Mapping[str, ArrayLike]) -> None:
    """Float32 arrays in name-0.npz, name-1.npz, ... of at most 15 MiB each."""
    shards: list[dict[str, Any]] = [{}]
    size = 0
    for key, value in sorted(parameters.items()):
        array = np.asarray(value, np.float32)
        if shards[-1] and size + array.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][key] = array
        size += array.nbytes
    for index, shard in enumerate(shards):
        temporary = folder / f".{name}-{index}.npz"
        np.savez(temporary, **shard)
        temporary.replace(folder / f"{name}-{index}.npz")


def read_shards(folder: Path, name: str) -> dict[str, np.ndarray]:
    """Raises InputError where there are none."""
    paths = sorted(folder.glob(f"{name}-*.npz"))
    if not paths:
        raise InputError(f"{folder} has no {name}-0.npz; train that stage first")
    arrays: dict[str, np.ndarray] = {}
    for path in paths:
        with np.load(path) as file:
            arrays |= {key: file[key] for key in file.files}
    return arrays


def train_text(run: Run, seconds: float) -> None:
    """The text encoder, from captions in three languages to what they say."""
    recipe, config = run.recipe, run.config
    parameters = losses.init_text_encoder(config, run.seed) | losses.init_readout(config.text_encoder.dim)

    def export(parameters: dict[str, jax.Array]) -> dict[str, dict[str, jax.Array]]:
        return {"text_encoder": {key: x for key, x in parameters.items() if not key.startswith("readout.")}}

    stage = Stage(run, "text", parameters, recipe.text_rate, seconds, export, ema_decay=0.999)
    step = stage.make_step(losses.text_loss(config, recipe.compute))
    source = run.chunks(0)
    memory: list[dict[str, np.ndarray]] = []
    generator = np.random.default_rng(stage.step)

    def rows(chunk: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        scenes, languages = scenes_of(chunk), chunk["tokens"].shape[1]
        labels = [losses.attribute_labels(scenes, chunk["names_background"][:, n]) for n in range(languages)]
        return {
            "tokens": rearrange(chunk["tokens"], "b n t -> (b n) t"),
            "mask": rearrange(chunk["mask"], "b n t -> (b n) t"),
            "labels": rearrange(np.stack(labels, axis=1), "b n a -> (b n) a"),
        }

    def one_step(state: TrainState, number: int) -> tuple[TrainState, dict[str, jax.Array]]:
        capacity = recipe.text_capacity // recipe.chunk
        if len(memory) < capacity or number % 50 == 0:
            memory.append(rows(next(source)))
            del memory[:-capacity]
        parts = [memory[n] for n in generator.integers(0, len(memory), 4)]
        index = [generator.integers(0, len(part["tokens"]), recipe.text_batch // 4) for part in parts]
        batch = {
            name: np.concatenate([part[name][i] for part, i in zip(parts, index, strict=True)])[None]
            for name in parts[0]
        }
        return step(state, None, batch)

    averaged = stage.loop(one_step).ema
    source.close()
    run.log("text", **text_accuracy(run, averaged))


def text_accuracy(run: Run, parameters: dict[str, jax.Array], number: int = 512) -> dict[str, float]:
    """How many held-out captions (combinations and phrasings) are read without any mistake, by language."""
    from wan_jax.nano.captions import LANGUAGES, write_captions

    scenes = draw_scenes(TEST_SEED, number, want_held_out=True)
    captions = write_captions(scenes, TEST_SEED, held_out_frames=True)
    tokenizer = Tokenizer.from_pretrained(run.tokenizer)
    loss = jax.jit(losses.text_loss(run.config, "float32"))
    accuracy = {}
    for n, language in enumerate(LANGUAGES):
        tokens, mask = tokenizer([row[n].text for row in captions], run.text_length)
        named = np.array([row[n].names_background for row in captions])
        batch = {"tokens": tokens, "mask": mask, "labels": losses.attribute_labels(scenes, named)}
        accuracy[language] = float(loss(parameters, None, batch, None)[1]["all_right"])
    return accuracy


def train_vae(run: Run, seconds: float) -> None:
    """The VAE, on windows of videos and at the end on whole ones."""
    recipe, config = run.recipe, run.config
    initial = losses.init_vae(config, run.seed)
    threads = concurrent.futures.ThreadPoolExecutor(1)
    base = recipe.buckets[0]
    test_videos = run.draw(0, draw_scenes(TEST_SEED, recipe.fill), base)

    def export(parameters: dict[str, jax.Array]) -> dict[str, dict[str, jax.Array]]:
        mean, std = moments(parameters, test_videos)
        return {"vae": losses.fold_normalisation(parameters, np.asarray(mean), np.asarray(std))}

    stage = Stage(run, "vae", initial, recipe.vae_rate, seconds, export, ema_decay=0.999)
    scenes = draw_scenes(run.seed + stage.step, 200_000 if recipe.workers else 2_000)
    generator = np.random.default_rng(stage.step)

    def draw(number: int, window: tuple[int, int, int] | None) -> dict[str, jax.Array]:
        some = scenes[generator.integers(0, len(scenes), number)]
        return {"videos": run.draw(int(generator.integers(2**31)), some, base, window)[None]}

    step = stage.make_step(losses.vae_loss(config, recipe.compute))
    moments = Later(threads, jax.jit(functools.partial(latent_moments, run)), stage.state.parameters, test_videos)
    on_whole = None
    if recipe.vae_whole_part > 0:
        on_whole = Later(threads, step, stage.state, None, draw(recipe.vae_whole_batch, None))

    def one_step(state: TrainState, number: int) -> tuple[TrainState, dict[str, jax.Array]]:
        if on_whole is not None and on_whole.ready and stage.fraction > 1 - recipe.vae_whole_part:
            return on_whole(state, None, draw(recipe.vae_whole_batch, None))
        return step(state, None, draw(recipe.vae_batch, recipe.vae_window))

    averaged = stage.loop(one_step).ema
    run.log("vae", **psnr(run, averaged))


def latent_moments(run: Run, parameters: Any, videos: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of every latent channel over some videos."""
    vae = with_parameters(losses.build(VAE, run.config.vae, run.recipe.compute), parameters)
    mean, _ = encode_moments(vae, videos)
    return mean.mean(axis=(0, 1, 2, 3)), mean.std(axis=(0, 1, 2, 3))


def psnr(run: Run, parameters: dict[str, jax.Array], number: int = 32) -> dict[str, float]:
    """Of reconstructions of held-out scenes, with handwriting that was never trained on."""
    lot = min(8, run.recipe.fill)
    number = min(number, 2 * run.recipe.fill)
    atlas = jnp.asarray(digit_atlas(run.digits, test=True))

    @jax.jit
    def squared_error(parameters: Any, videos: jax.Array) -> jax.Array:
        vae = with_parameters(losses.build(VAE, run.config.vae, run.recipe.compute), parameters)
        decoded = jnp.clip(decode_whole(vae, encode_moments(vae, videos)[0]), -1, 1)
        return jnp.square(decoded - videos).mean(axis=(1, 2, 3, 4))

    scenes = draw_scenes(TEST_SEED, number, want_held_out=True)
    errors = np.concatenate(
        [
            squared_error(parameters, run.draw(start, scenes[start : start + lot], run.recipe.buckets[0], atlas=atlas))
            for start in range(0, number, lot)
        ]
    )
    return {
        "psnr_over_all": float(10 * np.log10(4 / errors.mean())),
        "psnr_mean": float((10 * np.log10(4 / errors)).mean()),
        "psnr_worst": float((10 * np.log10(4 / errors)).min()),
    }


class Pool:
    """Latents and texts of one bucket, on the device; some are made anew all the while."""

    def __init__(self, run: Run, bucket: Bucket, parameters: Any, source: Iterator[Any], stage: Stage, loss: Loss):
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
        self._step = stage.make_step(loss)
        self._size = fill
        self._generator = np.random.default_rng((stage.step, bucket.frames, *bucket.size))
        self.ready = False

    def prepare(self, state: TrainState, frozen: Any) -> None:
        """Compiles both functions, beside what else goes on, and fills the pool for the first time."""
        batch = {"index": np.zeros((1, self.bucket.batch), np.int32)}
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (state, {**frozen, **self._arrays}))
        self._step = self._step.lower(*shapes, batch).compile()  # type: ignore[attr-defined]
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


def train_experts(run: Run, seconds: float) -> None:
    """Both experts, on latents of the trained VAE and texts of the trained text encoder."""
    recipe, config = run.recipe, run.config
    trained = {"vae": run.weights("vae"), "text_encoder": run.weights("text_encoder")}
    if list(run.output.glob("experts-*.npz")) and not (run.state / "experts.npz").exists():
        parameters = run.weights("experts")
        run.log("experts", continues_from="the averaged weights in the output")
    else:
        parameters = {
            f"{expert}.{name}": array
            for index, expert in enumerate(config.experts)
            for name, array in losses.init_expert(config, run.seed + index).items()
        }
    stage = Stage(
        run, "experts", parameters, recipe.expert_rate, seconds, lambda ema: {"experts": ema}, ema_decay=0.9995
    )
    implementation = recipe.attention
    if implementation is None and jax.default_backend() == "gpu":
        implementation = fastest_attention(config, recipe.compute, recipe.buckets[0])
    run.log("experts", attention=implementation)
    loss = losses.experts_loss(config, recipe.compute, attention=implementation)
    tokens, mask = Tokenizer.from_pretrained(run.tokenizer)([config.sampling.negative_prompt], run.text_length)
    encoder = with_parameters(losses.build(TextEncoder, config.text_encoder, recipe.compute), trained["text_encoder"])
    frozen = {"empty": encoder(jnp.asarray(tokens), jnp.asarray(mask))[0].astype(jnp.bfloat16)}

    first_chunk = 10_000 + stage.step  # other scenes than in earlier calls
    source = Shared(run.chunks(first_chunk))
    pools = [Pool(run, bucket, trained, source, stage, loss) for bucket in recipe.buckets]
    pools[0].prepare(stage.state, frozen)
    run.log("experts", prepared=str(pools[0].bucket))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), stage.state)

    def prepare_others() -> None:
        for pool in pools[1:]:
            pool.prepare(shapes, frozen)
            run.log("experts", prepared=str(pool.bucket))

    threading.Thread(target=prepare_others, daemon=True).start()
    generator = np.random.default_rng(stage.step)
    parts = np.array([bucket.part for bucket in recipe.buckets])

    def one_step(state: TrainState, number: int) -> tuple[TrainState, dict[str, jax.Array]]:
        pool = pools[generator.choice(len(pools), p=parts / parts.sum())]
        if not pool.ready:
            pool = pools[0]
        if number % recipe.fill_every == 0:
            pool.refill()
        return pool.step(state, frozen)

    stage.loop(one_step)
    source.close()


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


def fastest_attention(config: WanConfig, dtype: str, bucket: Bucket) -> str | None:
    """Which implementation trains fastest at a bucket's shapes, of those that run and agree with the reference."""
    stride, patch = config.vae.spatial_stride, config.denoiser.patch_size
    length = (bucket.frames - 1) // config.vae.temporal_stride + 1
    tokens = length * (bucket.size[0] // stride // patch[2]) * (bucket.size[1] // stride // patch[1])
    shape = (bucket.batch, tokens, config.denoiser.num_heads, config.denoiser.head_dim)
    heads = [jax.random.normal(jax.random.key(n), shape).astype(dtype) for n in range(3)]
    results, seconds = {}, {}
    for name in ("reference", "cudnn", "pallas_gpu"):

        def gradients(query, key, value, name=name):
            return jax.grad(lambda *some: attention(*some, implementation=name).astype(jnp.float32).var(), (0, 1, 2))(
                query, key, value
            )

        try:
            run = jax.jit(gradients)
            results[name] = [np.asarray(x, np.float32) for x in run(*heads)]
            start = time.perf_counter()
            for _ in range(5):
                last = run(*heads)
            jax.block_until_ready(last)
            seconds[name] = time.perf_counter() - start
        except Exception as error:  # whatever a backend raises, another one will do
            print(f"attention {name}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)

    def agrees(name: str) -> bool:
        pairs = zip(results[name], results["reference"], strict=True)
        return all(np.linalg.norm(x - y) <= 0.05 * np.linalg.norm(y) for x, y in pairs)

    return min((name for name in results if agrees(name)), key=seconds.__getitem__, default=None)


def parse_stages(text: str) -> dict[str, float]:
    """ "text=60,vae=400" -> seconds by stage; raises InputError."""
    stages = {}
    for part in text.split(","):
        name, _, seconds = part.partition("=")
        if name not in STAGES:
            raise unknown_name("stage", name, STAGES)
        try:
            stages[name] = float(seconds)
        except ValueError:
            raise InputError(f"stage {part!r}: write NAME=SECONDS, for example vae=400") from None
    return stages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="small files: averaged weights, log.jsonl")
    parser.add_argument("--state", type=Path, help="everything, to go on exactly (default OUTPUT/state)")
    parser.add_argument("--resume", type=Path, help="an earlier output: its files are copied first", metavar="DIR")
    parser.add_argument("--stages", default="text=60,vae=400,experts=800", help="NAME=SECONDS,...")
    parser.add_argument("--more", type=float, default=0.0, help="seconds that later calls will add to the last stage")
    parser.add_argument("--digits", type=Path, help="an .npz of digits instead of scikit-learn's")
    parser.add_argument("--small", action="store_true", help="small batches, for a CPU")
    parser.add_argument("--seed", type=int, default=0)
    values = parser.parse_args()
    stages = parse_stages(values.stages)
    xla_flags.configure()
    values.output.mkdir(parents=True, exist_ok=True)
    if values.resume is not None and values.resume.resolve() != values.output.resolve():
        for path in values.resume.glob("*.npz"):
            (values.output / path.name).write_bytes(path.read_bytes())
    run = Run(
        get_preset("nano"),
        SMALL if values.small else Recipe(),
        values.output,
        values.state or values.output / "state",
        values.digits,
        Log(values.output),
        seed=values.seed,
    )
    # Kept beside the state: the next call compiles nothing anew.
    jax.config.update("jax_compilation_cache_dir", str((run.state / "compiled").resolve()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    functions = {"text": train_text, "vae": train_vae, "experts": train_experts}
    for name, seconds in stages.items():
        run.more = values.more if name == list(stages)[-1] else 0.0
        functions[name](run, seconds)


if __name__ == "__main__":
    main()
