"""Training a denoiser on a mesh of 8 devices gives what one device gives."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wan_jax.config import DenoiserConfig
from wan_jax.models.denoiser import Denoiser
from wan_jax.parallel.sharding import ShardingRules, make_mesh, whole
from wan_jax.parameters import abstract_parameters, with_parameters
from wan_jax.testing.models import random_parameters
from wan_jax.training.config import OptimizerConfig, TrainerConfig
from wan_jax.training.metrics import read_metrics
from wan_jax.training.trainer import MadeBatches, Trainer

CONFIG = DenoiserConfig(num_layers=2, dim=32, num_heads=2, ffn_dim=24, text_dim=12, text_length=5, freq_dim=16)


def build():
    return Denoiser(CONFIG, dtype=jnp.float32, remat="layer", rngs=nnx.Rngs(0))


def loss(parameters, frozen, batch, keys):
    # As DenoiserLoss does it.
    model = with_parameters(
        build, {name: array if name.startswith("blocks.") else whole(array) for name, array in parameters.items()}
    )
    noise = jax.vmap(lambda key: jax.random.normal(key, batch["latents"].shape[1:]))(keys)
    velocity = model(batch["latents"] + noise, jnp.full(len(keys), 500.0), model.encode_context(batch["text"]))
    return jnp.mean((velocity - noise) ** 2), {}


def make_batch(step):
    draw = np.random.default_rng(step).standard_normal
    return {"latents": draw((16, 16, 1, 4, 4), np.float32), "text": draw((16, 5, 12), np.float32)}


def train(folder, axes, accumulation=1, steps=3):
    tree = abstract_parameters(build)
    parameters, mesh = random_parameters(tree, 0, jnp.float32), None
    if axes is not None:
        mesh = make_mesh(axes)
        parameters = jax.device_put(parameters, ShardingRules().shardings(tree, mesh))
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup_steps=0, eps=1e-3)
    config = TrainerConfig(steps=steps, accumulation=accumulation, optimizer=optimizer, save_every=2)
    trainer = Trainer(loss, parameters, MadeBatches(make_batch), config, folder, mesh=mesh, show=None)
    trainer.run()
    return trainer


def test_a_mesh_trains_as_one_device_does(tmp_path):
    alone, spread = train(tmp_path / "alone", None), train(tmp_path / "spread", {"data": 2, "fsdp": 4}, accumulation=2)
    kernel = spread.state.parameters["blocks.feed_forward.up.kernel"]
    moment = spread.state.optimizer[1][0].mu["blocks.feed_forward.up.kernel"]
    for array in (kernel, moment, spread.state.ema["blocks.feed_forward.up.kernel"]):
        assert array.sharding.shard_shape(array.shape) == (2, 32 // 4, 24)
    for ours, theirs in zip(read_metrics(tmp_path / "spread"), read_metrics(tmp_path / "alone"), strict=True):
        assert abs(ours["loss"] - theirs["loss"]) < 2e-6 * theirs["loss"]  # float32 sums in another order
        assert abs(ours["gradient_norm"] - theirs["gradient_norm"]) < 1e-5 * theirs["gradient_norm"]
    assert_same_parameters(spread, alone)

    # The batch stays split and the layers come together; left alone the compiler would send activations around.
    (program,) = spread._step._executables.values()
    assert "all-gather" in program.as_text()
    assert "all-to-all" not in program.as_text()

    # A run goes on with another mesh: here, from its second step, with one device.
    (tmp_path / "spread" / "checkpoints" / "3").rename(tmp_path / "3")
    again = train(tmp_path / "spread", None)
    assert again.state.parameters["blocks.feed_forward.up.kernel"].sharding.num_devices == 1
    assert_same_parameters(again, alone)


def assert_same_parameters(ours, theirs):
    for name, array in ours.state.parameters.items():
        # An update is at most 1e-3 a step; Adam with eps 1e-3 keeps a gradient's relative error of 1e-5 as it is.
        np.testing.assert_allclose(array, theirs.state.parameters[name], atol=1e-6, err_msg=name)
