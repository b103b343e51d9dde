"""Losses, the whole-video VAE, the driver and its files, on models of a few thousand parameters."""

import dataclasses
import functools
import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from wan_jax.checkpoint import open_checkpoint
from wan_jax.cli.generate import load_pipeline
from wan_jax.cli.options import Options
from wan_jax.config import DenoiserConfig, TextEncoderConfig, VAEConfig, WanConfig
from wan_jax.errors import InputError
from wan_jax.models.denoiser import Denoiser
from wan_jax.models.text_encoder import TextEncoder
from wan_jax.models.vae import VAE
from wan_jax.parameters import abstract_parameters, named_parameters, with_parameters
from wan_jax.presets import get_preset
from wan_jax.testing.models import random_model, random_parameters
from wan_nano import files, losses, train
from wan_nano.data import train_tokenizer
from wan_nano.export import LARGEST, components, export, nano_pipeline
from wan_nano.recipe import SMALL, Bucket, Recipe, parse_stages
from wan_nano.scenes import BACKGROUNDS, KINDS, draw_scenes
from wan_nano.stage import Run, Stage, rate_factor
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
RECIPE = dataclasses.replace(
    Recipe(**SMALL),
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
    make = losses.build(VAE, TINY.vae, "float32")
    folded = with_parameters(make, losses.fold_normalisation(named_parameters(vae), centre, std))
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


def test_the_experts_share_the_timesteps():
    low, high = losses.sigma_range(TINY, "low_noise"), losses.sigma_range(TINY, "high_noise")
    assert low[0] == 0
    assert low[1] == high[0]
    assert high[1] == 1
    shift = TINY.sampling.shift
    assert shift * low[1] / (1 + (shift - 1) * low[1]) == pytest.approx(TINY.sampling.boundary)


@pytest.fixture(scope="module")
def expert_arguments():
    generator = np.random.default_rng(0)
    frozen = {
        "latents": jnp.asarray(generator.standard_normal((6, 4, 2, 4, 4)), jnp.float32),
        "texts": jnp.asarray(generator.standard_normal((6, 3, 64, 16)), jnp.float32),
        "empty": jnp.asarray(generator.standard_normal((64, 16)), jnp.float32),
        "range": jnp.asarray(losses.sigma_range(TINY, "low_noise")),
    }
    return losses.init_expert(TINY, 0), frozen


@functools.partial(jax.jit, static_argnames="unroll")  # once for all rates of dropout
def expert_gradients(dropout, parameters, frozen, unroll=False):
    loss = losses.expert_loss(TINY, "float32", dropout=dropout, unroll=unroll)
    keys = jax.random.split(jax.random.key(0), 6)
    return jax.value_and_grad(loss, has_aux=True)(parameters, frozen, {"index": jnp.arange(6)}, keys)


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
        name: float(
            expert_gradients(0.0, parameters, {**frozen, "range": jnp.asarray(losses.sigma_range(TINY, name))})[0][0]
        )
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


def test_rate():
    assert rate_factor(0, 0.0) == pytest.approx(1 / 200)
    assert rate_factor(500, 0.3) == 1
    assert rate_factor(500, 0.75) == pytest.approx(0.51)
    assert rate_factor(500, 1.0) == pytest.approx(0.01)


def make_run(folder, **options):
    return Run(TINY, RECIPE, folder, folder / "state", None, files.Log(folder), **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """All stages, of a few steps each."""
    run = make_run(tmp_path_factory.mktemp("run"), more=100.0)
    # Whatever compiling takes, there is time for steps: one is made in any case.
    for stage in (train.train_text, train.train_vae, train.train_experts, train.train_decoder):
        stage(run, 1.0)
    return run


def log_rows(run, stage):
    return [json.loads(line) for line in (run.output / f"log-{stage}.jsonl").read_text().splitlines()]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*.npz")}


def test_all_stages_run(run):
    for stage in ("text", "vae", "high_noise", "low_noise", "decoder"):
        (row,) = (row for row in log_rows(run, stage) if row.get("done"))
        assert row["step"] >= 1
    assert {"en", "zh", "ja"} <= set(log_rows(run, "text")[-1])
    for stage in ("vae", "decoder"):
        assert "psnr_mean" in log_rows(run, stage)[-1]
    names = ("text_encoder", "readout", "vae", "decoder", "high_noise", "low_noise")
    assert set(contents(run.output)) == {f"{name}-0.npz" for name in names}


def test_a_later_call_goes_on_with_one_expert(run):
    """Its files alone are written, and it goes on where it was."""
    before = contents(run.output)
    (done,) = (row for row in log_rows(run, "low_noise") if row.get("done"))
    train.train_experts(run, 1.0, ("low_noise",))
    row = next(row for row in log_rows(run, "low_noise") if "continues_after_step" in row)
    assert row["continues_after_step"] == done["step"]
    assert row["seconds"] >= 1
    after = contents(run.output)
    assert {name for name in after if after[name] != before[name]} == {"low_noise-0.npz"}


def test_the_decoder_alone(run):
    """What encodes is the same to the bit; what decodes is what was exported for the decoder."""
    vae, decoder = (files.read_shards(run.output, name) for name in ("vae", "decoder"))
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
    changed = with_parameters(losses.build(VAE, TINY.vae, "float32"), encoder | jax.tree.map(jnp.zeros_like, decoder))
    encode = jax.jit(lambda vae, frames: encode_moments(vae, frames))
    for before, after in zip(encode(vae, frames), encode(changed, frames), strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_decoders_loss_falls(vae, tmp_path, optimizer):
    run = make_run(tmp_path)
    frozen, trained = losses.split(jax.tree.map(jnp.copy, named_parameters(vae)), *losses.DECODER)
    stage = Stage(run, "decoder", trained, 1e-2, optimizer, 100.0, lambda averaged: {}, ema_decay=0.9)
    step = stage.make_step(losses.decoder_loss(TINY, "float32", 0.1))
    videos = run.draw(0, draw_scenes(0, 2), RECIPE.buckets[0])[None]
    values = []

    def one_step(state, number):
        state, figures = step(state, frozen, {"videos": videos})
        values.append(float(figures["loss"]))
        return state, figures

    for _ in range(40):  # in the warm-up
        stage.take(one_step)
    assert values[-1] < 0.8 * values[0]


def test_resume_without_a_state(run, tmp_path):
    """From the small files alone every stage goes on from the averaged weights, gently at first."""
    before = {path.name: path for path in run.output.glob("[!.]*-*.npz")}
    other = make_run(tmp_path, more=100.0)
    files.copy_missing(run.output, other.output)
    train.train_text(other, 0.0)
    train.train_decoder(other, 0.0)
    train.train_experts(other, 0.0)
    for name in ("text_encoder", "readout", "decoder", *TINY.experts):
        assert log_rows(other, name if name not in ("text_encoder", "readout") else "text")
        old, new = (files.read_shards(folder, name) for folder in (run.output, other.output))
        for key in old:  # one step at 1/200 of a rate of 1e-3
            np.testing.assert_allclose(new[key], old[key], atol=2e-5, err_msg=key)
    assert before["high_noise-0.npz"].read_bytes() != (tmp_path / "high_noise-0.npz").read_bytes()

    train.train_vae(other, 0.0)
    # It begins with what the decoder's stage made, whose files are for the latents of before.
    assert not files.find_shards(other.output, "decoder")
    assert not (other.state / "decoder.npz").exists()
    old = files.read_shards(run.output, "vae") | files.read_shards(run.output, "decoder")
    new = files.read_shards(other.output, "vae")
    for key in old:
        if not key.startswith(("quant_conv.", "post_quant_conv.")):  # normalised anew
            np.testing.assert_allclose(new[key], old[key], atol=2e-5, err_msg=key)


def test_nothing_goes_on_after_the_experts(run, tmp_path):
    """Other sizes are prepared by a thread, which may be compiling when the time is over: an exit then would abort."""
    files.copy_missing(run.output, tmp_path)
    buckets = (*RECIPE.buckets, Bucket(3, (32, 16), 2, 8, 1.0))
    other = dataclasses.replace(make_run(tmp_path), recipe=dataclasses.replace(RECIPE, buckets=buckets))
    before = set(threading.enumerate())
    train.train_experts(other, 0.0, ("high_noise",))
    assert set(threading.enumerate()) <= before


def test_weights_of_another_model(run, tmp_path):
    files.copy_missing(run.output, tmp_path)
    other = make_run(tmp_path, more=100.0)
    with pytest.raises(InputError, match=r"vae is of another model \(decoder"):
        other.earlier({"encoder.conv_in.bias": jnp.zeros(4)}, "vae")


def test_a_state_of_another_optimizer(run):
    with pytest.raises(InputError, match=r"low_noise\.npz is of another model or optimizer"):
        Stage(run, "low_noise", losses.init_expert(TINY, 0), 1e-3, "adamw", 1.0, lambda averaged: {}, ema_decay=0.9)


def test_where_the_schedule_begins(tmp_path):
    stage = Stage(
        make_run(tmp_path, more=50.0, fraction_start=0.5),
        *("part", {"kernel": jnp.ones((2, 2))}, 1e-3, "adamw", 50.0, lambda averaged: {}),
        ema_decay=0.9,
    )
    assert stage.fraction == pytest.approx(0.5, abs=0.05)


def test_processes_share_a_folder(tmp_path, monkeypatch):
    """Whoever comes second keeps what the first has written."""
    (first := tmp_path / "first").mkdir()
    files.write_shards(first, "vae", {"x": np.zeros(3)})
    files.write_shards(first, "text_encoder", {"x": np.zeros(3)})
    files.write_shards(tmp_path, "vae", {"x": np.ones(3)})
    files.copy_missing(first, tmp_path)
    assert files.read_shards(tmp_path, "vae")["x"].tolist() == [1, 1, 1]
    assert files.read_shards(tmp_path, "text_encoder")["x"].tolist() == [0, 0, 0]

    def while_another_does(folder, vocab_size):
        for place in (folder, tmp_path / "tokenizer"):
            place.mkdir(parents=True)
            (place / "tokenizer.json").write_text("{}")

    monkeypatch.setattr("wan_nano.stage.train_tokenizer", while_another_does)
    run = make_run(tmp_path)
    assert (run.tokenizer / "tokenizer.json").read_text() == "{}"
    # The state is newer than an earlier output, which has a tokenizer.
    (first / "tokenizer").mkdir()
    (first / "tokenizer" / "tokenizer.json").write_text("of the first")
    files.write_shards(run.state, "high_noise", {"x": np.ones(3)})
    for name in ("high_noise", "low_noise"):
        files.write_shards(first, name, {"x": np.zeros(3)})
    later = Run(TINY, RECIPE, tmp_path / "later", run.state, None, run.log, resume=first)
    assert [later.weights(name)["x"].tolist() for name in ("high_noise", "low_noise")] == [[1, 1, 1], [0, 0, 0]]
    assert (later.tokenizer / "tokenizer.json").read_text() == "of the first"
    assert not list(tmp_path.glob(".tokenizer*"))


def test_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SHARD_BYTES", 1000)
    arrays = {f"x{n}": np.full(100, n, np.float32) for n in range(5)}
    files.write_shards(tmp_path, "part", arrays)
    assert len(list(tmp_path.glob("part-*.npz"))) == 3
    back = files.read_shards(tmp_path, "part")
    assert all((back[name] == arrays[name]).all() for name in arrays)
    with pytest.raises(InputError, match="train that stage first"):
        files.read_shards(tmp_path, "other")


@pytest.mark.parametrize(("text", "message"), [("vea=3", "did you mean 'vae'"), ("vae=x", "NAME=SECONDS")])
def test_bad_stages(text, message):
    with pytest.raises(InputError, match=message):
        parse_stages(text)
    assert parse_stages("text=60,vae=4.5") == {"text": 60, "vae": 4.5}


def test_export(tmp_path, monkeypatch, capsys):
    """Untrained weights of the real size: the tree opens as the preset, at its size on disk, and runs."""
    config = get_preset("nano")
    run = tmp_path / "run"
    run.mkdir()
    train_tokenizer(run / files.TOKENIZER, config.text_encoder.vocab_size)

    def weights(kind, model_config, seed=0):
        tree = abstract_parameters(losses.build(kind, model_config, "float32"))
        return random_parameters(tree, seed, jnp.float32)

    files.write_shards(run, "text_encoder", weights(TextEncoder, config.text_encoder))
    files.write_shards(run, "vae", weights(VAE, config.vae))
    experts = {name: weights(Denoiser, config.denoiser, n) for n, name in enumerate(config.experts)}
    for name, arrays in experts.items():
        files.write_shards(run, name, arrays)
    assert all(path.stat().st_size < 16 * 2**20 for path in run.rglob("*"))
    assert len(list(run.glob("*.npz"))) <= 6
    (run / "log-text.jsonl").write_text(
        "".join(
            json.dumps({"stage": "text", "clock": clock, name: step}) + "\n"
            for clock, name, step in (
                *((10, "step", 10), (40, "step", 40)),
                *((5, "step", 5), (25, "step", 25)),  # without a state
                *((5, "continues_after_step", 20), (10, "step", 23)),
            )
        )
    )
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
    assert "| text | 55 | 68 |" in card  # what all calls did together
    assert "| motion | 90 [60, 98] | 90 [60, 98] |" in card
    assert "Most often wrong: 3 (1 of 2)." in card
    assert json.loads((tmp_path / "weights" / "evaluation.json").read_text()).keys() == {"scores"}
    assert nano_pipeline(run).config == config
    # What the package holds is what runs where nothing is named.
    monkeypatch.setattr("wan_jax.assets.NANO_WEIGHTS", tmp_path / "weights")
    assert load_pipeline(Options(quiet=True)).config.name == "nano"
    assert "this is the nano model" in open_checkpoint(None).notes[0]
