"""Losses, the whole-video VAE, the driver and its files, on models of a few thousand parameters."""

import dataclasses
import functools
import itertools
import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from wan_jax.checkpoint import open_checkpoint
from wan_jax.config import DenoiserConfig, TextEncoderConfig, VAEConfig, WanConfig
from wan_jax.errors import InputError
from wan_jax.models.build import abstract_model
from wan_jax.models.vae import VAE
from wan_jax.parameters import named_parameters
from wan_jax.presets import get_preset
from wan_jax.testing.models import random_model, random_parameters
from wan_jax.training.denoiser_loss import sigma_range
from wan_jax.training.trainer import DrawnBatches
from wan_nano import files, losses, train
from wan_nano.data import train_tokenizer
from wan_nano.export import LARGEST, components, export
from wan_nano.recipe import SMALL, Bucket, NanoOptions
from wan_nano.run import NanoRun
from wan_nano.scenes import BACKGROUNDS, KINDS, draw_scenes
from wan_nano.whole_video import decode_whole, encode_moments

TINY = WanConfig(
    name="tiny",
    denoiser=DenoiserConfig(
        num_layers=1,
        dim=16,
        num_heads=2,
        ffn_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        text_length=64,
        freq_dim=8,
    ),
    text_encoder=TextEncoderConfig(vocab_size=1024, dim=16, num_layers=1, num_heads=2, head_dim=8, ffn_dim=16),
    vae=VAEConfig(
        z_dim=4,
        base_dim=4,
        dim_mult=(1,),
        temporal_downsample=(),
        num_res_blocks=1,
        latents_mean=(0.0,) * 4,
        latents_std=(1.0,) * 4,
    ),
    sampling=dataclasses.replace(get_preset("nano").sampling, size=(16, 16), frames=5),
)
OPTIONS = dataclasses.replace(
    NanoOptions(**SMALL),
    chunk=16,
    text_batch=8,
    vae_batch=2,
    vae_window=(3, 16, 16),
    fill=2,
    first_fill=4,
    buckets=(Bucket(5, (16, 16), 4, 8, 1.0),),
)


@pytest.fixture(scope="module", autouse=True)
def short_text():
    """The tokenizer's text: all of it is for test_world.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wan_nano.data.TOKENIZER_SCENES", 200)
        yield


@pytest.fixture(scope="module")
def vae():
    return random_model(VAE, TINY.vae, "float32")


def test_whole_videos_and_streaming_agree():
    vae = random_model(VAE, dataclasses.replace(TINY.vae, dim_mult=(1, 2), temporal_downsample=(True,)), "float32")
    frames = np.random.default_rng(0).uniform(-1, 1, (1, 5, 8, 16, 3)).astype(np.float32)

    @jax.jit
    def both(vae, frames):
        mean, _ = encode_moments(vae, frames)
        latents = vae.encode(frames)
        return (rearrange(mean, "b t h w z -> b z t h w"), decode_whole(vae, mean)), (latents, vae.decode(latents))

    # The same sums in another order: float32 with a few hundred terms.
    for whole, streamed in zip(*both(vae, frames), strict=True):
        np.testing.assert_allclose(whole, streamed, atol=1e-4)


def test_folded_normalisation(vae):
    frames = np.random.default_rng(1).uniform(-1, 1, (2, 5, 16, 16, 3)).astype(np.float32)
    encode, decode = jax.jit(lambda vae, frames: encode_moments(vae, frames)[0]), jax.jit(decode_whole)
    mean = encode(vae, frames)
    centre, std = np.asarray(mean).mean((0, 1, 2, 3)), np.asarray(mean).std((0, 1, 2, 3))
    folded = losses.model_of(TINY.vae, losses.fold_normalisation(named_parameters(vae), centre, std), "float32")
    normalised = encode(folded, frames)
    np.testing.assert_allclose(normalised, (mean - centre) / std, atol=1e-4)
    np.testing.assert_allclose(decode(folded, normalised), decode(vae, mean), atol=1e-4)


def test_attribute_labels():
    scenes = draw_scenes(0, 100)
    named = np.arange(100) % 2 == 0
    labels = losses.attribute_labels(scenes, named)
    assert labels.shape == (100, len(losses.ATTRIBUTES))
    columns = dict(zip(losses.ATTRIBUTES, labels.T, strict=True))
    np.testing.assert_array_equal(columns["kind_1"], scenes.kind[:, 0])
    assert (columns["kind_2"][scenes.count == 1] == len(KINDS)).all()
    assert (columns["background"][~named] == len(BACKGROUNDS)).all()
    assert all((labels[:, n] < count).all() for n, count in enumerate(losses.ATTRIBUTES.values()))


@pytest.fixture(scope="module")
def expert_arguments():
    generator = np.random.default_rng(0)
    arguments = {
        "latents": jnp.asarray(generator.standard_normal((6, 4, 2, 4, 4)), jnp.float32),
        "texts": jnp.asarray(generator.standard_normal((6, 3, 64, 16)), jnp.float32),
        "empty": jnp.asarray(generator.standard_normal((64, 16)), jnp.float32),
        "range": jnp.asarray(sigma_range(TINY, "low_noise")),
    }
    return losses.init_expert(TINY, 0), arguments


@functools.partial(jax.jit, static_argnames="unroll")  # once for all rates of dropout
def expert_gradients(dropout, parameters, arguments, unroll=False):
    loss = losses.expert_loss(TINY, "float32", dropout=dropout, unroll=unroll)
    keys = jax.random.split(jax.random.key(0), 6)
    return jax.value_and_grad(loss, has_aux=True)(parameters, arguments, arguments, keys)


def test_expert_loss(expert_arguments):
    (value, _), gradients = expert_gradients(0.5, *expert_arguments)
    # A fresh expert says 0, so the loss is the mean square of noise - latents: 2 for unit normals of 768 numbers.
    assert value == pytest.approx(2.0, abs=0.5)
    assert float(jnp.abs(gradients["head.linear.kernel"]).max()) > 0


def test_layers_written_out_learn_the_same(expert_arguments):
    """Without a loop over the layers, in another order of sums: 1e-5 of the gradients in float32."""
    parameters, frozen = expert_arguments
    # Of fresh experts all gradients but the head's are zero.
    noisy = {
        name: x + 0.02 * jax.random.normal(jax.random.key(n), x.shape) for n, (name, x) in enumerate(parameters.items())
    }
    (value, _), gradients = expert_gradients(0.5, noisy, frozen)
    (unrolled, _), others = expert_gradients(0.5, noisy, frozen, unroll=True)
    assert unrolled == pytest.approx(float(value), rel=1e-6)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(others[name], gradient, rtol=0, atol=1e-5 * float(jnp.abs(gradient).max()) + 1e-9)
        assert name.endswith("bias") or float(jnp.abs(gradient).max()) > 0


def test_the_range_is_the_experts(expert_arguments):
    """The range is an argument of the loss, and the loss follows it."""
    parameters, frozen = expert_arguments
    parameters = {**parameters, "head.linear.kernel": jnp.ones_like(parameters["head.linear.kernel"])}
    values = {
        name: float(expert_gradients(0.0, parameters, {**frozen, "range": jnp.asarray(sigma_range(TINY, name))})[0][0])
        for name in TINY.experts
    }
    assert values["high_noise"] != pytest.approx(values["low_noise"], rel=1e-3)


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_caption_dropout(expert_arguments, dropout):
    parameters, frozen = expert_arguments
    kernel = "head.linear.kernel"
    parameters = {**parameters, kernel: jnp.ones_like(parameters[kernel])}

    def value(**changes):
        return expert_gradients(dropout, parameters, {**frozen, **changes})[0][0]

    assert (value() == value(texts=frozen["texts"][::-1])) == (dropout == 1.0)
    assert (value() == value(empty=-frozen["empty"])) == (dropout == 0.0)


def make_run(folder, **options):
    return NanoRun(dataclasses.replace(OPTIONS, output=str(folder), **options), TINY, later_seconds=100.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """All stages, of a few steps each."""
    run = make_run(tmp_path_factory.mktemp("run"))
    # Whatever compiling takes, there is time for steps: one is made in any case.
    for stage in (train.train_text, train.train_vae, train.train_experts, train.train_decoder):
        stage(run, 1.0)
    return run


def recorded(run):
    """The last line of each stage."""
    lines = (run.output / "stages.jsonl").read_text().splitlines()
    return {row["stage"]: row for row in map(json.loads, lines)}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*.npz")}


def test_all_stages_run(run):
    rows = recorded(run)
    assert set(rows) == {"text", "vae", "high_noise", "low_noise", "decoder"}
    assert all(row["steps"] >= 1 and row["seconds"] > 0 for row in rows.values())
    assert {"en", "zh", "ja"} <= rows["text"].keys()
    assert "psnr_mean" in rows["vae"].keys() & rows["decoder"].keys()
    names = ("text_encoder", "readout", "vae", "decoder", "high_noise", "low_noise")
    assert set(contents(run.output)) == {f"{name}.npz" for name in names}


def test_a_later_call_goes_on_with_one_expert(run):
    """Its files alone are written, and it goes on where it was."""
    before, steps = contents(run.output), recorded(run)["low_noise"]["step"]
    train.train_experts(make_run(run.output, experts="low_noise"), 1.0)
    row = recorded(run)["low_noise"]
    assert row["step"] == steps + row["steps"]
    after = contents(run.output)
    assert {name for name in after if after[name] != before[name]} == {"low_noise.npz"}


def test_the_decoder_alone(run):
    """What encodes is the same to the bit; what decodes is what was exported for the decoder."""
    vae, decoder = (files.load_weights(run.output, name) for name in ("vae", "decoder"))
    exported = components(run.output, TINY)["vae"]
    assert exported.keys() == vae.keys()
    for name, array in exported.items():
        part = decoder if name.startswith(losses.DECODER) else vae
        np.testing.assert_array_equal(array, part[name].astype(jnp.bfloat16))
    assert any((decoder[name] != vae[name]).any() for name in decoder)
    assert set(decoder) == set(losses.split(vae, "encoder.", "quant_conv.")[0])


def test_latents_do_not_depend_on_the_decoder(vae):
    frames = np.random.default_rng(2).uniform(-1, 1, (1, 5, 16, 16, 3)).astype(np.float32)
    encoder, decoder = losses.split(named_parameters(vae), *losses.DECODER)
    changed = losses.model_of(TINY.vae, encoder | jax.tree.map(jnp.zeros_like, decoder), "float32")
    encode = jax.jit(lambda vae, frames: encode_moments(vae, frames))
    for before, after in zip(encode(vae, frames), encode(changed, frames), strict=True):
        np.testing.assert_array_equal(before, after)


def falling(stage, loss, parameters, batch, folder, frozen=None, steps=40):
    """Whether a stage's loss falls on one batch within its warm-up."""
    trainer = make_run(folder).trainer(
        *(stage, loss, parameters, DrawnBatches(lambda start: itertools.repeat(batch)), lambda averaged: {}),
        frozen=frozen,
        seconds=1e3,
        rate=2e-2,
        optimizer="muon" if stage == "decoder" else "adamw",
    )
    for _ in itertools.islice(trainer.steps(), steps):
        pass
    keys = jax.random.split(jax.random.key(0), len(jax.tree.leaves(batch)[0]))
    before, after = (float(jax.jit(loss)(p, frozen, batch, keys)[0]) for p in (parameters, trainer.state.parameters))
    return after < 0.9 * before


@pytest.mark.parametrize("stage", ["text", "vae", "decoder", "high_noise"])
def test_the_loss_of_every_stage_falls(stage, vae, expert_arguments, tmp_path):
    run = make_run(tmp_path)
    parameters, frozen = jax.tree.map(jnp.copy, named_parameters(vae)), None
    batch = next(train.video_batches(run, 0))
    if stage == "text":
        parameters = losses.init_text_encoder(TINY, 0) | losses.init_readout(TINY.text_encoder.dim)
        batch = next(train.caption_batches(run.chunks(0), run.options, 0))
        loss = losses.text_loss(TINY, "float32")
    elif stage == "vae":
        loss = losses.vae_loss(TINY, "float32")
    elif stage == "decoder":
        frozen, parameters = losses.split(parameters, *losses.DECODER)
        loss = losses.decoder_loss(TINY, "float32", 0.1)
    else:
        parameters, arguments = jax.tree.map(jnp.copy, expert_arguments)
        batch = {"latents": jnp.full((6, 4, 2, 4, 4), 0.5), "texts": arguments["texts"]}
        frozen = {name: arguments[name] for name in ("empty", "range")}
        loss = losses.expert_loss(TINY, "float32")
    assert falling(stage, loss, jax.tree.map(np.asarray, parameters), batch, tmp_path, frozen)


def test_resume_without_a_state(run, tmp_path):
    """From the weights alone every stage goes on, gently at first."""
    other = make_run(tmp_path, resume=str(run.output))
    for stage in (train.train_text, train.train_decoder, train.train_experts):
        stage(other, 0.0)
    for name in ("text_encoder", "readout", "decoder", *TINY.experts):
        old, new = (files.load_weights(folder, name) for folder in (run.output, other.output))
        for key in old:  # one step at 1/200 of a rate of 1e-3
            np.testing.assert_allclose(new[key], old[key], atol=2e-5, err_msg=key)
    assert contents(run.output)["high_noise.npz"] != contents(other.output)["high_noise.npz"]

    train.train_vae(other, 0.0)
    # It begins with what the decoder's stage made, whose files are for the latents of before.
    assert "decoder.npz" not in contents(other.output)
    assert not (other.state / "decoder").exists()
    old = files.load_weights(run.output, "vae") | files.load_weights(run.output, "decoder")
    new = files.load_weights(other.output, "vae")
    for key in old:
        if not key.startswith(("quant_conv.", "post_quant_conv.")):  # normalised again
            np.testing.assert_allclose(new[key], old[key], atol=2e-5, err_msg=key)


def test_other_sizes_are_prepared_meanwhile(run, tmp_path):
    """By a thread that ends before the stage does: a process that exits while a thread compiles aborts."""
    buckets = (*OPTIONS.buckets, Bucket(3, (32, 16), 2, 8, 1.0))
    other = make_run(tmp_path, resume=str(run.output), experts="high_noise", buckets=buckets)
    train.train_experts(other, 0.0)
    assert "prepare buffers" not in {thread.name for thread in threading.enumerate()}


def test_weights_of_another_model(run):
    with pytest.raises(InputError, match=r"vae is of another model \(decoder"):
        run.initial({"encoder.conv_in.bias": jnp.zeros(4)}, "vae")


def test_a_state_of_another_optimizer(run):
    with pytest.raises(InputError, match="another model or optimizer"):
        train.train_experts(make_run(run.output, expert_optimizer="adamw"), 1.0)


def test_processes_share_a_folder(tmp_path, monkeypatch):
    """Whoever comes second keeps what the first has written."""
    (first := tmp_path / "first").mkdir()
    files.save_weights(first, "vae", {"x": np.zeros(3)})
    files.save_weights(first, "text_encoder", {"x": np.zeros(3)})
    (second := tmp_path / "second").mkdir()
    files.save_weights(second, "vae", {"x": np.ones(3)})
    files.copy_missing(first, second)
    assert files.load_weights(second, "vae")["x"].tolist() == [1, 1, 1]
    assert files.load_weights(second, "text_encoder")["x"].tolist() == [0, 0, 0]
    with pytest.raises(InputError, match="train that stage first"):
        files.load_weights(second, "high_noise")

    def write(folder):
        for place in (folder, second / "tokenizer"):  # another process is faster
            place.mkdir()
            (place / "tokenizer.json").write_text("{}")

    files.write_folder(second / "tokenizer", write)
    assert [path.name for path in second.glob("*token*")] == ["tokenizer"]
    # An earlier output has a tokenizer already.
    assert (make_run(tmp_path / "later", resume=str(second)).tokenizer / "tokenizer.json").read_text() == "{}"


def test_export(tmp_path):
    """Untrained weights of the real size: the tree opens as the preset, at its size on disk, and runs."""
    config = get_preset("nano")
    run = tmp_path / "run"
    run.mkdir()
    train_tokenizer(run / files.TOKENIZER, config.text_encoder.vocab_size)

    def weights(model_config, seed=0):
        return random_parameters(abstract_model(model_config), seed, jnp.float32)

    files.save_weights(run, "text_encoder", weights(config.text_encoder))
    files.save_weights(run, "vae", weights(config.vae))
    experts = {name: weights(config.denoiser, n) for n, name in enumerate(config.experts)}
    for name, arrays in experts.items():
        files.save_weights(run, name, arrays)
    calls = [{"stage": "text", "seconds": 30.0, "steps": steps, "step": steps, "loss": 0.5} for steps in (10, 58)]
    (run / "stages.jsonl").write_text("".join(json.dumps(call) + "\n" for call in calls))
    row = {"right": 9, "total": 10, "low": 0.6, "high": 0.98}
    wanted = {"kind": "3", "motion": "bounce"}
    videos = [{"wanted": [wanted], "found": [{**wanted, "kind": kind}]} for kind in ("3", "8")]
    evaluation = {"scores": {"en": {"motion": row}, "all": {"motion": row}}, "videos": videos}
    (run / "evaluation.json").write_text(json.dumps({"evaluations": [evaluation]}))
    summary = export(run, tmp_path / "weights")
    assert summary.nbytes < LARGEST
    checkpoint = open_checkpoint(tmp_path / "weights")
    assert checkpoint.config == config
    assert not checkpoint.notes
    loaded = checkpoint.load("high_noise", "float32")
    exact = experts["high_noise"]["patch_embedding.kernel"]
    np.testing.assert_array_equal(loaded["patch_embedding.kernel"], exact.astype(jnp.bfloat16).astype(jnp.float32))
    card = (tmp_path / "weights" / "README.md").read_text()
    assert "96x96 with 33 frames" in card
    assert "{" not in card
    assert "| text | 60 | 68 | loss 0.5 |" in card  # what all calls did together
    assert "| motion | 90 [60, 98] | 90 [60, 98] |" in card
    assert "Most often wrong: 3 (1 of 2)." in card
    assert json.loads((tmp_path / "weights" / "evaluation.json").read_text()).keys() == {"scores"}
