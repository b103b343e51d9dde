"""Trains the nano model in the time there is: python -m wan_nano.train --output DIR --stages text=60,vae=400.

Stages: "text" (the text encoder, on captions alone), "vae", "experts" (both, on latents that are rendered and encoded
all the while; --experts names one of them alone), "decoder" (the VAE's decoder on from there, for the same latents).
A stage ends when its seconds are over; the learning rate falls with them. The next call goes on where the last one
ended: from --state, which holds everything, or from --output or --resume, which hold the tokenizer and the averaged
weights in a few small files. Processes that train different things may share --output and --state.
"""

import argparse
import concurrent.futures
import functools
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from wan_jax.config import WanConfig
from wan_jax.errors import InputError
from wan_jax.kernels.attention import attention
from wan_jax.models.text_encoder import TextEncoder
from wan_jax.models.vae import VAE
from wan_jax.parameters import with_parameters
from wan_jax.presets import get_preset
from wan_jax.runtime import xla_flags
from wan_jax.text.tokenizer import Tokenizer
from wan_jax.training.step import Loss, TrainState
from wan_nano import losses
from wan_nano.captions import LANGUAGES, write_captions
from wan_nano.data import TEST_SEED, scenes_of
from wan_nano.digits import digit_atlas
from wan_nano.files import Log
from wan_nano.pools import Later, Pool, Shared
from wan_nano.recipe import SMALL, Bucket, NanoOptions, load_nano_recipe, parse_stages
from wan_nano.scenes import draw_scenes
from wan_nano.stage import Parameters, Run, Stage
from wan_nano.whole_video import decode_whole, encode_moments


def train_text(run: Run, seconds: float) -> None:
    """The text encoder, from captions in three languages to what they say."""
    recipe, config = run.recipe, run.config
    initial = losses.init_text_encoder(config, run.seed) | losses.init_readout(config.text_encoder.dim)
    parameters = run.earlier(initial, "text_encoder", "readout")

    def export(parameters: Parameters) -> dict[str, Parameters]:
        encoder, readout = losses.split(parameters, "readout.")
        return {"text_encoder": encoder, "readout": readout}

    stage = Stage(run, "text", parameters, recipe.text_rate, recipe.text_optimizer, seconds, export, ema_decay=0.999)
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


def text_accuracy(run: Run, parameters: Parameters, number: int = 512) -> dict[str, float]:
    """How many held-out captions (combinations and phrasings) are read without any mistake, by language."""
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
    """The VAE, on videos or windows of them."""
    recipe, config = run.recipe, run.config
    initial = run.earlier(losses.init_vae(config, run.seed), "vae", "decoder")
    threads = concurrent.futures.ThreadPoolExecutor(1)
    test_videos = run.draw(0, draw_scenes(TEST_SEED, recipe.fill), recipe.buckets[0])

    def export(parameters: Parameters) -> dict[str, Parameters]:
        mean, std = moments(parameters, test_videos)
        return {"vae": losses.fold_normalisation(parameters, np.asarray(mean), np.asarray(std))}

    stage = Stage(run, "vae", initial, recipe.vae_rate, recipe.vae_optimizer, seconds, export, ema_decay=0.999)
    run.forget("decoder")  # it is for the latents of before
    compute_moments = jax.jit(functools.partial(latent_moments, run), compiler_options=xla_flags.ONCE_OPTIONS)
    moments = Later(threads, compute_moments, stage.state.parameters, test_videos)
    averaged = learn_videos(run, stage, losses.vae_loss(config, recipe.compute), None)
    run.log("vae", **psnr(run, averaged))


def train_decoder(run: Run, seconds: float) -> None:
    """The decoder of the trained VAE alone: latents stay as they are, and so do experts that learn them."""
    recipe = run.recipe
    encoder, decoder = losses.split(run.weights("vae"), *losses.DECODER)
    stage = Stage(
        run,
        "decoder",
        run.earlier(decoder, "decoder"),
        recipe.decoder_rate,
        recipe.decoder_optimizer,
        seconds,
        functools.partial(_named, "decoder"),
        ema_decay=0.999,
    )
    loss = losses.decoder_loss(run.config, recipe.compute, recipe.decoder_noise)
    averaged = learn_videos(run, stage, loss, encoder)
    run.log("decoder", **psnr(run, {**encoder, **averaged}))


def learn_videos(run: Run, stage: Stage, loss: Loss, frozen: Any) -> Parameters:
    """The loop of a stage whose batches are videos or windows of them. Returns the average."""
    recipe = run.recipe
    scenes = draw_scenes(run.seed + stage.step, 200_000 if recipe.workers else 2_000)
    generator = np.random.default_rng(stage.step)

    step = stage.make_step(loss)

    def one_step(state: TrainState, number: int) -> tuple[TrainState, dict[str, jax.Array]]:
        some = scenes[generator.integers(0, len(scenes), recipe.vae_batch)]
        videos = run.draw(int(generator.integers(2**31)), some, recipe.buckets[0], recipe.vae_window)
        return step(state, frozen, {"videos": videos[None]})

    return stage.loop(one_step).ema


def latent_moments(run: Run, parameters: Any, videos: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of every latent channel over some videos."""
    vae = with_parameters(losses.build(VAE, run.config.vae, run.recipe.compute), parameters)
    mean, _ = encode_moments(vae, videos)
    return mean.mean(axis=(0, 1, 2, 3)), mean.std(axis=(0, 1, 2, 3))


def psnr(run: Run, parameters: Parameters, number: int = 32) -> dict[str, float]:
    """Of reconstructions of held-out scenes, with handwriting that was never trained on."""
    lot = min(8, run.recipe.fill)
    number = min(number, 2 * run.recipe.fill)
    atlas = jnp.asarray(digit_atlas(run.digits, test=True))

    @functools.partial(jax.jit, compiler_options=xla_flags.ONCE_OPTIONS)
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


def train_experts(run: Run, seconds: float, experts: Sequence[str] | None = None) -> None:
    """Experts (None: all), on latents of the trained VAE and texts of the trained text encoder."""
    recipe, config = run.recipe, run.config
    experts = config.experts if experts is None else experts
    trained = {"vae": run.weights("vae"), "text_encoder": run.weights("text_encoder")}
    stages = {
        name: Stage(
            run,
            name,
            run.earlier(losses.init_expert(config, run.seed + config.experts.index(name)), name),
            recipe.expert_rate,
            recipe.expert_optimizer,
            seconds,
            functools.partial(_named, name),
            ema_decay=0.9995,
        )
        for name in experts
    }
    first = stages[experts[0]]
    implementation = recipe.attention
    if implementation is None and jax.default_backend() == "gpu":
        implementation = fastest_attention(config, recipe.compute, recipe.buckets[0])
    run.log(experts[0], attention=implementation)
    # One program for all experts: what differs between them is an argument.
    step = first.make_step(losses.expert_loss(config, recipe.compute, attention=implementation, unroll=recipe.unroll))
    tokens, mask = Tokenizer.from_pretrained(run.tokenizer)([config.sampling.negative_prompt], run.text_length)
    encoder = with_parameters(losses.build(TextEncoder, config.text_encoder, recipe.compute), trained["text_encoder"])
    empty = encoder(jnp.asarray(tokens), jnp.asarray(mask))[0].astype(jnp.bfloat16)
    frozen = {
        name: {"empty": empty, "range": jnp.asarray(losses.sigma_range(config, name), jnp.float32)} for name in experts
    }

    source = Shared(run.chunks(10_000 + first.step))  # other scenes than in earlier calls
    pools = [Pool(run, bucket, trained, source, step, first.step) for bucket in recipe.buckets]
    pools[0].prepare(first.state, frozen[experts[0]])
    run.log(experts[0], prepared=str(pools[0].bucket))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), first.state)

    over = threading.Event()

    def prepare_others() -> None:
        for pool in pools[1:]:
            if over.is_set():
                return
            pool.prepare(shapes, frozen[experts[0]])
            run.log(experts[0], prepared=str(pool.bucket))

    others = threading.Thread(target=prepare_others, daemon=True)
    others.start()
    generator = np.random.default_rng(first.step)
    parts = np.array([bucket.part for bucket in recipe.buckets])

    def one_step(pool: Pool, own: Any, state: TrainState, number: int) -> tuple[TrainState, dict[str, jax.Array]]:
        return pool.step(state, own)

    try:
        while first.goes_on:
            pool = pools[generator.choice(len(pools), p=parts / parts.sum())]
            if not pool.ready:
                pool = pools[0]
            if first.step % recipe.fill_every == 0:
                pool.refill()
            for name, stage in stages.items():
                stage.take(functools.partial(one_step, pool, frozen[name]))
        for stage in stages.values():
            stage.finish()
    finally:
        over.set()
        others.join()  # a process that exits while a thread compiles aborts
        source.close()


def _named(name: str, averaged: Parameters) -> dict[str, Parameters]:
    return {name: averaged}


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


def train(options: NanoOptions) -> list[Path]:
    """Trains the stages as told, one after the other; returns the folder of the output."""
    xla_flags.configure()
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    run = Run(
        get_preset("nano"),
        options,
        output,
        output / "state" if options.state is None else Path(options.state),
        None if options.digits is None else Path(options.digits),
        Log(output),
        None if options.resume is None else Path(options.resume),
        fraction_start=options.fraction_start,
        seed=options.seed,
    )
    # Kept beside the state: the next call compiles nothing anew.
    jax.config.update("jax_compilation_cache_dir", str((run.state / "compiled").resolve()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    experts = None if options.experts == "all" else (options.experts,)
    functions: dict[str, Callable[[Run, float], None]] = {
        "text": train_text,
        "vae": train_vae,
        "experts": functools.partial(train_experts, experts=experts),
        "decoder": train_decoder,
    }
    stages = parse_stages(options.stages)
    for name, seconds in stages.items():
        run.more = options.more if name == list(stages)[-1] else 0.0
        functions[name](run, seconds)
    return [output]


TRAINER = (NanoOptions, train)


def parse_options(arguments: Sequence[str] | None) -> NanoOptions:
    """The options of a command line; those that it does not name are the recipe's."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--output", help="small files: averaged weights, logs")
    parser.add_argument("--state", help="everything, to go on exactly (default OUTPUT/state)")
    parser.add_argument("--resume", help="an earlier output: files that this one lacks", metavar="DIR")
    parser.add_argument("--stages", help="NAME=SECONDS,...")
    parser.add_argument("--experts", help="which of them the stage experts trains: all, high_noise or low_noise")
    parser.add_argument("--more", type=float, help="seconds that later calls will add to the last stage")
    parser.add_argument("--fraction-start", type=float, help="how much of a stage's schedule is over when it begins")
    parser.add_argument("--digits", help="an .npz of digits instead of scikit-learn's")
    parser.add_argument("--small", action="store_true", help="small batches, for a CPU")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--config", help="a recipe; also --config.NAME=VALUE, with or without one", metavar="FILE")
    values, rest = parser.parse_known_args(arguments)
    given = vars(values)
    options = NanoOptions(**SMALL) if given.pop("small", False) else NanoOptions()
    recipe = ["--config", given.pop("config")] if "config" in given else []
    try:
        if recipe or rest:
            options = load_nano_recipe([*recipe, *rest], options)
        return replace(options, **given)
    except InputError as error:
        parser.error(str(error))


def main(arguments: Sequence[str] | None = None) -> None:
    train(parse_options(arguments))


if __name__ == "__main__":
    main()
