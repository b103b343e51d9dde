"""Losses, the whole-video VAE, the driver and its files, on models of a few thousand parameters."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from wan_jax.checkpoint import open_checkpoint
from wan_jax.config import DenoiserConfig, TextEncoderConfig, VAEConfig, WanConfig, get_preset
from wan_jax.demo import random_model, run_demo
from wan_jax.errors import InputError
from wan_jax.generate import load_pipeline, open_model
from wan_jax.models.denoiser import Denoiser
from wan_jax.models.parameters import abstract_parameters, named_parameters, random_parameters, with_parameters
from wan_jax.models.text_encoder import TextEncoder
from wan_jax.models.vae import VAE
from wan_jax.nano import losses, train
from wan_jax.nano.export import LARGEST, export, nano_pipeline
from wan_jax.nano.scenes import BACKGROUNDS, KINDS, draw_scenes
from wan_jax.nano.whole_video import decode_whole, encode_moments
from wan_jax.options import Options
from wan_jax.progress import Bars

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
    train.SMALL,
    chunk=16,
    text_batch=8,
    vae_batch=2,
    vae_window=(3, 16, 16),
    fill=2,
    first_fill=4,
    buckets=(train.Bucket(5, (16, 16), 4, 8, 1.0),),
)


@pytest.fixture(scope="module", autouse=True)
def short_text():
    """The tokenizer's text: all of it is for test_world.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wan_jax.nano.data.TOKENIZER_SCENES", 200)
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
    parameters = {
        f"{expert}.{name}": array
        for n, expert in enumerate(TINY.experts)
        for name, array in losses.init_expert(TINY, n).items()
    }
    generator = np.random.default_rng(0)
    frozen = {
        "latents": jnp.asarray(generator.standard_normal((6, 4, 2, 4, 4)), jnp.float32),
        "texts": jnp.asarray(generator.standard_normal((6, 3, 64, 16)), jnp.float32),
        "empty": jnp.asarray(generator.standard_normal((64, 16)), jnp.float32),
    }
    return parameters, frozen


@jax.jit  # once for all rates of dropout
def experts_gradients(dropout, parameters, frozen):
    loss = losses.experts_loss(TINY, "float32", dropout=dropout)
    keys = jax.random.split(jax.random.key(0), 6)
    return jax.value_and_grad(loss, has_aux=True)(parameters, frozen, {"index": jnp.arange(6)}, keys)


def test_experts_loss(expert_arguments):
    (value, figures), gradients = experts_gradients(0.5, *expert_arguments)
    assert value == pytest.approx(figures["high_noise"] + figures["low_noise"])
    # A fresh expert says 0, so the loss is the mean square of noise - latents: 2 for unit normals of 768 numbers.
    assert figures["low_noise"] == pytest.approx(2.0, abs=0.5)
    for expert in TINY.experts:
        assert float(jnp.abs(gradients[f"{expert}.head.linear.kernel"]).max()) > 0


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_caption_dropout(expert_arguments, dropout):
    parameters, frozen = expert_arguments
    kernel = "low_noise.head.linear.kernel"
    parameters = {**parameters, kernel: jnp.ones_like(parameters[kernel])}

    def value(**changes):
        return experts_gradients(dropout, parameters, {**frozen, **changes})[0][0]

    assert (value() == value(texts=frozen["texts"][::-1])) == (dropout == 1.0)
    assert (value() == value(empty=-frozen["empty"])) == (dropout == 0.0)


def test_rate():
    assert train.rate_factor(0, 0.0) == pytest.approx(1 / 200)
    assert train.rate_factor(500, 0.3) == 1
    assert train.rate_factor(500, 0.75) == pytest.approx(0.51)
    assert train.rate_factor(500, 1.0) == pytest.approx(0.01)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """All stages, of a few steps each."""
    folder = tmp_path_factory.mktemp("run")
    run = train.Run(TINY, RECIPE, folder, folder / "state", None, train.Log(folder))
    run.more = 100.0
    # Whatever compiling takes, there is time for steps: the clock begins with the first.
    for stage in (train.train_text, train.train_vae, train.train_experts):
        stage(run, 1.0)
    return run


def log_rows(run):
    return [json.loads(line) for line in (run.output / "log.jsonl").read_text().splitlines()]


def test_all_stages_run(run):
    rows = log_rows(run)
    done = {row["stage"]: row["step"] for row in rows if row.get("done")}
    assert set(done) == {"text", "vae", "experts"}
    assert min(done.values()) >= 1
    assert {"en", "zh", "ja"} <= set(next(row for row in rows if "en" in row))
    assert any("psnr_mean" in row for row in rows)
    names = {path.name for path in run.output.glob("*.npz")}
    assert names == {"text_encoder-0.npz", "vae-0.npz", "experts-0.npz"}


def test_a_later_call_goes_on(run):
    step = max(row["step"] for row in log_rows(run) if row["stage"] == "experts" and "step" in row)
    run.more = 0.0
    train.train_experts(run, 1.0)
    row = next(row for row in log_rows(run) if "continues_after_step" in row)
    assert row["continues_after_step"] == step
    assert row["seconds"] >= 1


def test_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SHARD_BYTES", 1000)
    arrays = {f"x{n}": np.full(100, n, np.float32) for n in range(5)}
    train.write_shards(tmp_path, "part", arrays)
    assert len(list(tmp_path.glob("part-*.npz"))) == 3
    back = train.read_shards(tmp_path, "part")
    assert all((back[name] == arrays[name]).all() for name in arrays)
    with pytest.raises(InputError, match="train that stage first"):
        train.read_shards(tmp_path, "other")


@pytest.mark.parametrize(("text", "message"), [("vea=3", "did you mean 'vae'"), ("vae=x", "NAME=SECONDS")])
def test_bad_stages(text, message):
    with pytest.raises(InputError, match=message):
        train.parse_stages(text)
    assert train.parse_stages("text=60,vae=4.5") == {"text": 60, "vae": 4.5}


def test_export(tmp_path, monkeypatch, capsys):
    """Untrained weights of the real size: the tree opens as the preset, at its size on disk, and runs."""
    config = get_preset("nano")
    run = tmp_path / "run"
    run.mkdir()

    def weights(kind, model_config, seed=0):
        tree = abstract_parameters(losses.build(kind, model_config, "float32"))
        return random_parameters(tree, seed, jnp.float32)

    train.write_shards(run, "text_encoder", weights(TextEncoder, config.text_encoder))
    train.write_shards(run, "vae", weights(VAE, config.vae))
    experts = {
        f"{name}.{key}": x
        for n, name in enumerate(config.experts)
        for key, x in weights(Denoiser, config.denoiser, n).items()
    }
    train.write_shards(run, "experts", experts)
    assert all(path.stat().st_size < 16 * 2**20 for path in run.iterdir())
    assert len(list(run.iterdir())) <= 6
    summary = export(run, tmp_path / "weights")
    assert summary.nbytes < LARGEST
    checkpoint = open_checkpoint(tmp_path / "weights")
    assert checkpoint.config == config
    assert not checkpoint.notes
    loaded = checkpoint.load("high_noise", "float32")
    exact = experts["high_noise.patch_embedding.kernel"]
    np.testing.assert_array_equal(loaded["patch_embedding.kernel"], exact.astype(jnp.bfloat16).astype(jnp.float32))
    card = (tmp_path / "weights" / "README.md").read_text()
    assert "96x96 with 33 frames" in card
    assert "{" not in card
    assert nano_pipeline(run).config == config
    # What the package holds is what runs where nothing is named.
    monkeypatch.setattr("wan_jax.nano.WEIGHTS", tmp_path / "weights")
    assert load_pipeline(Options(quiet=True)).config.name == "nano"
    open_model(None, Bars(True))
    assert "this is the nano model" in capsys.readouterr().err
    asked = []
    monkeypatch.setattr("wan_jax.demo.generate", asked.append)
    run_demo(tmp_path / "demo")
    assert open_checkpoint(asked[0].checkpoint).config == config
    assert asked[0].size == "96x96"
