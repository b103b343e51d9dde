"""Trains the nano model by stages: wan-jax train --config configs/train_nano.py.

Stages: "text" (the text encoder, on captions alone), "vae", "experts" (both, on latents that are rendered and encoded
all the while; the option `experts` names one of them alone), "decoder" (the VAE's decoder on from there, for the same
latents). A stage ends when its seconds are over; the learning rate falls with them. The next call goes on where the
last one ended: exactly from the option `state`, or from the averaged weights in `output` or `resume`. Processes that
train different things may share `output` and `state`.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from wan_jax.runtime import xla_flags
from wan_jax.text.tokenizer import Tokenizer
from wan_jax.training.denoiser_loss import sigma_range
from wan_jax.training.trainer import DrawnBatches, Trainer
from wan_nano import losses
from wan_nano.captions import LANGUAGES, write_captions
from wan_nano.data import TEST_SEED, scenes_of
from wan_nano.digits import digit_atlas
from wan_nano.recipe import NanoOptions, parse_stages
from wan_nano.replay import ReplayBuffer, SharedIterator, draw_batches, preparing
from wan_nano.run import NanoRun, Parameters
from wan_nano.scenes import draw_scenes
from wan_nano.whole_video import decode_whole, encode_moments


def train(options: NanoOptions) -> list[Path]:
    """Trains the stages as told, one after the other; returns the folder of the output."""
    xla_flags.configure()
    run = NanoRun(options)
    functions: dict[str, Callable[[NanoRun, float], None]] = {
        "text": train_text,
        "vae": train_vae,
        "experts": train_experts,
        "decoder": train_decoder,
    }
    stages = parse_stages(options.stages)
    for stage, seconds in stages.items():
        run.later_seconds = options.more if stage == list(stages)[-1] else 0.0
        functions[stage](run, seconds)
    return [run.output]


TRAINER = (NanoOptions, train)  # an entry point of "wan_jax.trainers"


def train_text(run: NanoRun, seconds: float) -> None:
    """Trains the text encoder, from captions in three languages to what they say."""
    options, config = run.options, run.config
    initial = losses.init_text_encoder(config, run.options.seed) | losses.init_readout(config.text_encoder.dim)

    def export(parameters: Parameters) -> dict[str, Parameters]:
        encoder, readout = losses.split(parameters, "readout.")
        return {"text_encoder": encoder, "readout": readout}

    with contextlib.closing(run.chunks(0)) as source:
        trainer = run.trainer(
            "text",
            losses.text_loss(config, options.compute),
            run.initial(initial, "text_encoder", "readout"),
            DrawnBatches(functools.partial(caption_batches, source, options)),
            export,
            seconds=seconds,
            rate=options.text_rate,
            optimizer=options.text_optimizer,
        )
        run.train({"text": trainer}, lambda trainer: text_accuracy(run, trainer.averaged))


def caption_batches(
    source: Iterator[dict[str, np.ndarray]], options: NanoOptions, start: int
) -> Iterator[dict[str, np.ndarray]]:
    """Draws captions and what they say from the last chunks of a source, which is asked for a new one now and then."""
    generator = np.random.default_rng(start)
    kept: list[dict[str, np.ndarray]] = []
    for step in itertools.count(start):
        capacity = options.text_capacity // options.chunk
        if len(kept) < capacity or step % 50 == 0:
            kept.append(labelled_captions(next(source)))
            del kept[:-capacity]
        parts = [kept[n] for n in generator.integers(0, len(kept), 4)]
        index = [generator.integers(0, len(part["tokens"]), options.text_batch // 4) for part in parts]
        yield {name: np.concatenate([part[name][i] for part, i in zip(parts, index, strict=True)]) for name in parts[0]}


def labelled_captions(chunk: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The captions of a chunk in all languages, [N, ...], with what they say."""
    scenes, languages = scenes_of(chunk), chunk["tokens"].shape[1]
    labels = [losses.attribute_labels(scenes, chunk["names_background"][:, n]) for n in range(languages)]
    arrays = {"tokens": chunk["tokens"], "mask": chunk["mask"], "labels": np.stack(labels, axis=1)}
    return {name: rearrange(array, "b n ... -> (b n) ...") for name, array in arrays.items()}


def text_accuracy(run: NanoRun, parameters: Parameters, number: int = 512) -> dict[str, float]:
    """How many held-out captions (combinations and phrasings) are read without any mistake, by language."""
    scenes = draw_scenes(TEST_SEED, number, want_held_out=True)
    captions = write_captions(scenes, TEST_SEED, held_out_frames=True)
    tokenizer = Tokenizer.from_pretrained(run.tokenizer)
    loss = jax.jit(losses.text_loss(run.config, "float32"))
    accuracy = {}
    for n, language in enumerate(LANGUAGES):
        tokens, mask = tokenizer([row[n].text for row in captions], run.config.denoiser.text_length)
        named = np.array([row[n].names_background for row in captions])
        batch = {"tokens": tokens, "mask": mask, "labels": losses.attribute_labels(scenes, named)}
        accuracy[language] = float(loss(parameters, None, batch, None)[1]["all_right"])
    return accuracy


def train_vae(run: NanoRun, seconds: float) -> None:
    """Trains the VAE, on videos or windows of them."""
    options, config = run.options, run.config
    test_videos = run.draw(0, draw_scenes(TEST_SEED, options.fill), options.buckets[0])

    @functools.partial(jax.jit, compiler_options=xla_flags.ONCE_OPTIONS)
    def moments(parameters: Any, videos: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean, _ = encode_moments(losses.model_of(config.vae, parameters, options.compute), videos)
        return mean.mean(axis=(0, 1, 2, 3)), mean.std(axis=(0, 1, 2, 3))

    def export(parameters: Parameters) -> dict[str, Parameters]:
        mean, std = moments(parameters, test_videos)
        return {"vae": losses.fold_normalisation(parameters, np.asarray(mean), np.asarray(std))}

    trainer = run.trainer(
        "vae",
        losses.vae_loss(config, options.compute),
        run.initial(losses.init_vae(config, options.seed), "vae", "decoder"),
        DrawnBatches(functools.partial(video_batches, run)),
        export,
        seconds=seconds,
        rate=options.vae_rate,
        optimizer=options.vae_optimizer,
    )
    run.forget("decoder")  # it is for the latents of before
    run.train({"vae": trainer}, lambda trainer: psnr(run, trainer.averaged))


def train_decoder(run: NanoRun, seconds: float) -> None:
    """Trains the decoder of the trained VAE alone: latents stay as they are, and so do experts that learn them."""
    options = run.options
    encoder, decoder = losses.split(run.weights("vae"), *losses.DECODER)
    trainer = run.trainer(
        "decoder",
        losses.decoder_loss(run.config, options.compute, options.decoder_noise),
        run.initial(decoder, "decoder"),
        DrawnBatches(functools.partial(video_batches, run)),
        lambda parameters: {"decoder": parameters},
        frozen=encoder,
        seconds=seconds,
        rate=options.decoder_rate,
        optimizer=options.decoder_optimizer,
    )
    run.train({"decoder": trainer}, lambda trainer: psnr(run, {**encoder, **trainer.averaged}))


def video_batches(run: NanoRun, start: int) -> Iterator[dict[str, jax.Array]]:
    """Draws videos, or windows of them."""
    options = run.options
    scenes = draw_scenes(options.seed + start, 200_000 if options.workers else 2_000)
    generator = np.random.default_rng(start)
    while True:
        drawn = scenes[generator.integers(0, len(scenes), options.vae_batch)]
        videos = run.draw(int(generator.integers(2**31)), drawn, options.buckets[0], options.vae_window)
        yield {"videos": videos}


def psnr(run: NanoRun, parameters: Parameters, number: int = 32) -> dict[str, float]:
    """Of reconstructions of held-out scenes, with handwriting that was never trained on, dB."""
    bucket, fill = run.options.buckets[0], run.options.fill
    count, number = min(8, fill), min(number, 2 * fill)
    atlas = jnp.asarray(digit_atlas(run.options.digits, test=True))

    @functools.partial(jax.jit, compiler_options=xla_flags.ONCE_OPTIONS)
    def squared_error(parameters: Any, videos: jax.Array) -> jax.Array:
        vae = losses.model_of(run.config.vae, parameters, run.options.compute)
        decoded = jnp.clip(decode_whole(vae, encode_moments(vae, videos)[0]), -1, 1)
        return jnp.square(decoded - videos).mean(axis=(1, 2, 3, 4))

    scenes = draw_scenes(TEST_SEED, number, want_held_out=True)
    errors = np.concatenate(
        [
            squared_error(parameters, run.draw(start, scenes[start : start + count], bucket, atlas=atlas))
            for start in range(0, number, count)
        ]
    )
    each = 10 * np.log10(4 / errors)
    return {
        "psnr_over_all": float(10 * np.log10(4 / errors.mean())),
        "psnr_mean": float(each.mean()),
        "psnr_worst": float(each.min()),
    }


def train_experts(run: NanoRun, seconds: float) -> None:
    """Trains the experts, on latents of the trained VAE and texts of the trained text encoder."""
    options, config = run.options, run.config
    experts = config.experts if options.experts == "all" else (options.experts,)
    encoders = {"vae": run.weights("vae"), "text_encoder": run.weights("text_encoder")}
    tokens, mask = Tokenizer.from_pretrained(run.tokenizer)(
        [config.sampling.negative_prompt], config.denoiser.text_length
    )
    encoder = losses.model_of(config.text_encoder, encoders["text_encoder"], options.compute)
    empty = encoder(jnp.asarray(tokens), jnp.asarray(mask))[0].astype(jnp.bfloat16)
    # One program for all experts: what differs between them is an argument.
    loss = losses.expert_loss(config, options.compute, attention=options.attention, unroll=options.unroll)
    buffers: list[ReplayBuffer] = []
    trainers: dict[str, Trainer] = {}
    for name in experts:
        number = config.experts.index(name)
        add_every = None if trainers else options.fill_every  # experts share the buffers; one adds to them
        trainers[name] = run.trainer(
            name,
            loss,
            run.initial(losses.init_expert(config, options.seed + number), name),
            DrawnBatches(functools.partial(draw_batches, buffers, number, add_every)),
            lambda parameters, name=name: {name: parameters},  # type: ignore[misc]
            frozen={"empty": empty, "range": jnp.asarray(sigma_range(config, name), jnp.float32)},
            same_step=next(iter(trainers.values()), None),
            seconds=seconds,
            rate=options.expert_rate,
            optimizer=options.expert_optimizer,
            ema_decay=0.9995,
        )
    first = trainers[experts[0]]
    with contextlib.closing(run.chunks(10_000 + first.step)) as source:  # other scenes than in earlier calls
        shared = SharedIterator(source)
        buffers += [ReplayBuffer(run, bucket, encoders, shared, first.step) for bucket in options.buckets]
        buffers[0].fill(options.first_fill)
        with preparing(buffers[1:], options.first_fill, first):
            run.train(trainers)
