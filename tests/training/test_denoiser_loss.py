"""Flow matching on each expert's own noise levels; adapters; rematerialisation."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from flax import nnx

from wan_jax.config import DenoiserConfig, SamplingConfig, WanConfig
from wan_jax.diffusion.schedule import shift_sigmas
from wan_jax.errors import InputError
from wan_jax.models.denoiser import Denoiser
from wan_jax.parameters import abstract_parameters
from wan_jax.testing.models import random_parameters
from wan_jax.training.adapters import adapter_tree, initial_adapters
from wan_jax.training.config import LoraConfig, OptimizerConfig
from wan_jax.training.denoiser_loss import (
    DenoiserLoss,
    NoiseConfig,
    draw_sigmas,
    high_noise_share,
    sigma_range,
    training_flops,
    truncated_normal,
)
from wan_jax.training.optimizer import make_optimizer
from wan_jax.training.step import init_state, make_step, split_batch

CONFIG = WanConfig(
    denoiser=DenoiserConfig(num_layers=2, dim=24, num_heads=2, ffn_dim=20, text_dim=10, text_length=5, freq_dim=16),
    sampling=SamplingConfig(shift=5.0, boundary=0.875),
)
ONE_EXPERT = dataclasses.replace(CONFIG, sampling=SamplingConfig(shift=3.0, boundary=None))
TREE = abstract_parameters(lambda: Denoiser(CONFIG.denoiser, dtype=jnp.float32, rngs=nnx.Rngs(0)))
DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def make_batch(size: int, seed: int = 0):
    draw = np.random.default_rng(seed).standard_normal
    return {"latents": draw((size, 16, 2, 4, 2), np.float32), "text": draw((size, 5, 10), np.float32)}


def keys(count: int):
    return jax.random.split(jax.random.key(7), count)


def frozen():
    return {"empty_text": jnp.full((5, 10), 0.5)}


@pytest.mark.parametrize("noise", [NoiseConfig(), NoiseConfig("logit-normal", 0.3, 1.2)], ids=lambda n: n.distribution)
@pytest.mark.parametrize("expert", ["high_noise", "low_noise"])
def test_experts_train_on_their_own_noise_levels(expert, noise):
    """And within them as the whole distribution falls, by 19 quantiles of 200,000 draws of it."""
    shift, (low, high) = 5.0, sigma_range(CONFIG, expert)
    ours = np.asarray(draw_sigmas(keys(20_000), noise, shift, (low, high)))
    assert ours.min() >= low
    assert ours.max() <= high
    generator = np.random.default_rng(0)
    if noise.distribution == "uniform":
        base = generator.uniform(size=200_000)
    else:
        base = 1 / (1 + np.exp(-(0.3 + 1.2 * generator.normal(size=200_000))))
    everything = shift_sigmas(base, shift)
    within = everything[(everything >= low) & (everything < high)]
    quantiles = np.linspace(0.05, 0.95, 19)
    # Four standard deviations of the share of 20,000 draws below a quantile.
    shares = np.mean(ours[:, None] < np.quantile(within, quantiles), axis=0)
    np.testing.assert_allclose(shares, quantiles, atol=4 * 0.5 / 20_000**0.5)
    share = high_noise_share(CONFIG, noise)
    assert share == pytest.approx(np.mean(everything >= 0.875), abs=0.005)


def test_one_expert_trains_on_all_levels():
    sigmas = np.asarray(draw_sigmas(keys(5_000), NoiseConfig(), 3.0, sigma_range(ONE_EXPERT, "denoiser")))
    assert sigmas.min() < 0.01
    assert sigmas.max() > 0.999


class Recorder:
    """Stands in for a denoiser: keeps what it is given."""

    def encode_context(self, text):
        self.text = text
        return

    def __call__(self, latents, timesteps, context):
        self.latents, self.timesteps = latents, timesteps
        return jnp.zeros_like(latents)


@pytest.mark.parametrize("expert", ["high_noise", "low_noise"])
def test_what_the_denoiser_sees(expert):
    """x = (1 - sigma) x0 + sigma noise at timestep 1000 sigma; predicting zero costs the mean of (noise - x0)^2."""
    loss = DenoiserLoss(CONFIG, ("high_noise", "low_noise"), NoiseConfig(caption_dropout=0.5), jnp.float32)
    recorder, batch = Recorder(), make_batch(64)
    errors = loss.errors(recorder, expert, batch, jnp.full((5, 10), 0.5), keys(64))
    assert ((recorder.timesteps >= 875) == (expert == "high_noise")).all()
    sigmas = recorder.timesteps[:, None, None, None, None] / 1000
    noise = (recorder.latents - (1 - sigmas) * batch["latents"]) / sigmas
    if expert == "high_noise":  # where sigma is not small, the noise can be found again, in float32
        np.testing.assert_allclose(errors, jnp.mean((noise - batch["latents"]) ** 2, (1, 2, 3, 4)), rtol=1e-4)
        assert abs(float(noise.mean())) < 0.05  # 4096 values
        assert abs(float(noise.std()) - 1) < 0.05
    dropped = np.asarray([np.all(text == 0.5) for text in recorder.text])
    kept = np.asarray([np.array_equal(text, own) for text, own in zip(recorder.text, batch["text"], strict=True)])
    assert (dropped ^ kept).all()
    assert 16 < dropped.sum() < 48  # of 64, at one half: four standard deviations


@pytest.mark.parametrize(("dropout", "share"), [(0.0, 0.0), (1.0, 1.0)])
def test_caption_dropout(dropout, share):
    loss = DenoiserLoss(CONFIG, ("low_noise",), NoiseConfig(caption_dropout=dropout), jnp.float32)
    recorder = Recorder()
    loss.errors(recorder, "low_noise", make_batch(16), jnp.full((5, 10), 0.5), keys(16))
    assert np.mean([np.all(text == 0.5) for text in recorder.text]) == share


def test_each_expert_gets_gradients_of_its_own_examples():
    loss = DenoiserLoss(CONFIG, ("high_noise", "low_noise"), NoiseConfig(high_noise_share=0.25), jnp.float32)
    assert loss.counts(8) == {"high_noise": (2, 0.25), "low_noise": (6, 0.75)}
    assert loss.counts(2) == {"high_noise": (1, 0.5), "low_noise": (1, 0.5)}
    assert loss.counts(1) == {"high_noise": (1, 0.25), "low_noise": (1, 0.75)}
    assert DenoiserLoss(CONFIG, ("low_noise",), NoiseConfig(), jnp.float32).counts(3) == {"low_noise": (3, 1.0)}
    parameters = {expert: random_parameters(TREE, seed, jnp.float32) for seed, expert in enumerate(loss.experts)}
    batch, ks = make_batch(4), keys(4)
    (value, metrics), slopes = jax.jit(jax.value_and_grad(loss, has_aux=True))(parameters, frozen(), batch, ks)
    np.testing.assert_allclose(value, 0.25 * metrics["loss_high_noise"] + 0.75 * metrics["loss_low_noise"], rtol=1e-6)
    alone = dataclasses.replace(loss, experts=("low_noise",))
    low = {name: array[1:] for name, array in batch.items()}
    expected = jax.jit(jax.grad(alone, has_aux=True))(parameters, frozen(), low, ks[1:])[0]["low_noise"]
    for name, slope in slopes["low_noise"].items():  # float32 sums in another order
        np.testing.assert_allclose(slope, 0.75 * expected[name], rtol=1e-3, atol=1e-6, err_msg=name)
    assert all(np.any(slope) for slope in slopes["high_noise"].values())


def test_accumulation_changes_nothing():
    """Each expert gets the same examples with the same noise, whatever the microbatches are; of 8, 5 are high here."""
    config = dataclasses.replace(CONFIG, sampling=SamplingConfig(shift=12.0, boundary=0.875))
    loss = DenoiserLoss(config, ("high_noise", "low_noise"), NoiseConfig(), jnp.float32, batch_size=8)
    assert loss.counts(8)["high_noise"][0] == 5
    parameters = {expert: random_parameters(TREE, seed, jnp.float32) for seed, expert in enumerate(loss.experts)}
    examples = {**make_batch(8), "row": np.arange(8, dtype=np.int32)}
    gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))

    def means(parts):
        cut, ks = split_batch((examples, keys(8)), parts)
        results = [
            gradients(parameters, frozen(), *jax.tree.map(lambda x, part=part: x[part], (cut, ks)))
            for part in range(parts)
        ]
        return jax.tree.map(lambda *xs: sum(xs) / parts, *results)

    whole = jax.tree_util.tree_leaves_with_path(means(1))
    for parts in (2, 4):
        found = dict(jax.tree_util.tree_leaves_with_path(means(parts)))
        for name, expected in whole:  # float32 sums in another order
            np.testing.assert_allclose(found[name], expected, rtol=2e-3, atol=2e-6, err_msg=str(name))


@pytest.mark.parametrize(
    ("lower", "upper"),
    [(7, math.inf), (-math.inf, -7), (-20, -19.9), (12, 12.5), (40, math.inf), (-1, 9), (-math.inf, math.inf), (0, 1)],
)
def test_narrow_tails_are_resolved(lower, upper):
    """By scipy's quantiles, computed in float64."""
    shares = np.linspace(0.001, 0.999, 101)
    ours = np.asarray(truncated_normal(jnp.float32(shares), lower, upper), np.float64)
    # Of the upper tail by symmetry: the distribution function is resolved near 0 only.
    if flipped := lower + upper > 0:
        lower, upper, shares = -upper, -lower, 1 - shares
    ends = scipy.special.log_ndtr([lower, upper])
    logs = ends[1] + np.log(shares + (1 - shares) * np.exp(ends[0] - ends[1]))
    expected = scipy.special.ndtri_exp(logs)
    np.testing.assert_allclose(ours, -expected if flipped else expected, atol=2e-4)
    assert len(np.unique(ours)) == 101


def test_logit_normal_far_from_an_expert_has_many_levels():
    for mean, expert in ((-8.0, "high_noise"), (8.0, "low_noise"), (-20.0, "high_noise")):
        noise = NoiseConfig("logit-normal", logit_mean=mean)
        sigmas = np.asarray(draw_sigmas(keys(1000), noise, 5.0, sigma_range(CONFIG, expert)))
        assert len(np.unique(sigmas)) > 900
        assert np.isfinite(sigmas).all()


def test_rematerialisation_changes_nothing():
    """With "attention"; that "layer" gives the right gradients is a test of parity."""
    parameters = {"denoiser": random_parameters(TREE, 0, jnp.float32)}

    def gradients(remat):
        loss = DenoiserLoss(ONE_EXPERT, ("denoiser",), NoiseConfig(), jnp.float32, remat=remat)
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(parameters, frozen(), make_batch(2), keys(2))

    (value, _), slopes = gradients("attention")
    (expected_value, _), expected = gradients(None)
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    for name, slope in slopes[
        "denoiser"
    ].items():  # the same products; XLA may fuse them, and so round them, differently
        np.testing.assert_allclose(slope, expected["denoiser"][name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_lora_trains_and_its_base_stays():
    lora = LoraConfig(rank=3, alpha=6.0, targets="blocks.self_attention.*, blocks.feed_forward.up")
    base = random_parameters(TREE, 0, jnp.bfloat16)
    before = {name: np.asarray(array) for name, array in base.items()}
    loss = DenoiserLoss(CONFIG, ("low_noise",), NoiseConfig(), jnp.bfloat16, remat="attention", lora_scale=lora.scale)
    tree = adapter_tree(TREE, lora)
    assert tree["blocks.self_attention.query.down"].shape == (2, 24, 3)
    assert tree["blocks.feed_forward.up.up"].axes == ("layers", None, "mlp")
    assert len(tree) == 2 * 5
    adapters = {name: jnp.asarray(array) for name, array in initial_adapters(tree, 0).items()}
    optimizer = make_optimizer(OptimizerConfig())
    state = init_state({"low_noise": adapters}, optimizer, seed=0, ema=True, replicated=DEVICE)
    step = jax.jit(make_step(loss, optimizer, 0.9), donate_argnums=0)
    everything = frozen() | {"experts": {"low_noise": base}}
    losses = []
    for _ in range(8):
        state, metrics = step(state, everything, split_batch(make_batch(4), 1), 1e-2)
        losses.append(float(metrics["loss"]))
    for name, array in base.items():
        np.testing.assert_array_equal(array, before[name], err_msg=name)
    assert all(np.abs(array).max() > 0 for array in state.parameters["low_noise"].values())

    # Without a change the adapted model is the base; with one it is not.
    full = dataclasses.replace(loss, lora_scale=None)
    whole = {"low_noise": {name: array.astype(jnp.float32) for name, array in base.items()}}
    base_loss, _ = jax.jit(full)(whole, everything, make_batch(4), keys(4))
    first, _ = jax.jit(loss)({"low_noise": initial_adapters(tree, 0)}, everything, make_batch(4), keys(4))
    last, _ = jax.jit(loss)(state.parameters, everything, make_batch(4), keys(4))
    assert float(first) == pytest.approx(float(base_loss), rel=1e-5)
    assert float(last) < 0.98 * float(first)


def test_targets():
    with pytest.raises(InputError, match=r"'blocks\.attn\.\*' matches none"):
        adapter_tree(TREE, LoraConfig(rank=2, targets="blocks.attn.*"))
    assert LoraConfig(rank=4).scale == 1.0
    assert LoraConfig(rank=4, alpha=8.0).scale == 2.0
    assert LoraConfig().scale is None
    adapters = initial_adapters(adapter_tree(TREE, LoraConfig(rank=2)), 0)
    up = [array for name, array in adapters.items() if name.endswith(".up")]
    assert not any(map(np.any, up))


def test_flops_of_a_step():
    """Counted by hand for one layer, 8 tokens: products of the blocks, and of attention."""
    config = dataclasses.replace(CONFIG.denoiser, num_layers=1)
    projections = 2 * 8 * (6 * 24 * 24 + 2 * 24 * 20)
    attention = 2 * 2 * 8 * (8 + 5) * 24
    assert training_flops(config, 8, weights=True) == 3 * projections + 3 * attention
    assert training_flops(config, 8, weights=False) == 2 * projections + 3 * attention


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distribution": "normal"}, "unknown distribution of noise levels 'normal'"),
        ({"caption_dropout": 1.5}, "caption_dropout 1.5: must be between"),
        ({"high_noise_share": 1.0}, "high_noise_share 1.0: must be above 0 and below 1"),
        ({"shift": 0.0}, "must be above 0"),
    ],
)
def test_bad_noise(options, message):
    with pytest.raises(InputError, match=message):
        NoiseConfig(**options)
