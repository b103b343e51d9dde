"""The step and the optimizer: accumulation, what is decayed, schedules, the moving average, meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from wan_jax.errors import InputError
from wan_jax.training.config import OptimizerConfig, TrainerConfig
from wan_jax.training.optimizer import decayed, learning_rate, make_optimizer
from wan_jax.training.step import init_state, make_step, split_batch


def loss(parameters, frozen, batch, keys):
    noise = jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
    y = jnp.tanh((batch + noise) @ parameters["model"]["a.kernel"]) + parameters["model"]["a.bias"]
    return jnp.mean(y**2), {"mean": y.mean()}


def run(accumulation: int, steps: int = 3, ema_decay: float = 0.9):
    parameters = {"model": {"a.kernel": jnp.linspace(-1, 1, 6).reshape(3, 2), "a.bias": jnp.ones(2)}}
    optimizer = make_optimizer(OptimizerConfig())
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state = init_state(parameters, optimizer, seed=3, ema=True, replicated=place)
    step = jax.jit(make_step(loss, optimizer, ema_decay))
    states, rows = [state], []
    for index in range(steps):
        batch = np.random.default_rng(index).normal(size=(12, 3)).astype(np.float32)
        state, metrics = step(state, None, split_batch(batch, accumulation), 0.1)
        states.append(state)
        rows.append(metrics)
    return states, rows


@pytest.mark.parametrize("accumulation", [2, 3, 12])
def test_accumulation_equals_a_big_batch(accumulation):
    (*_, expected), expected_rows = run(1)
    (*_, state), rows = run(accumulation)
    # Float32 sums in another order; Adam divides by gradients' own size, which keeps the error relative.
    for ours, reference in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-6)
    for ours, reference in zip(rows, expected_rows, strict=True):
        assert ours.keys() == {"loss", "mean", "gradient_norm"}
        for name, value in ours.items():
            np.testing.assert_allclose(value, reference[name], rtol=1e-5, atol=1e-6)


def test_examples_and_steps_draw_different_noise():
    seen = []

    def record(parameters, frozen, batch, keys):
        seen.append(jax.random.key_data(keys))
        return jnp.sum(parameters * 0.0), {}

    optimizer = optax.sgd(0.1)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state = init_state(jnp.ones(1), optimizer, seed=0, ema=False, replicated=place)
    step = make_step(record, optimizer, 0.0)
    for _ in range(2):
        with jax.disable_jit():
            state, _ = step(state, None, split_batch(np.zeros((6, 1)), 2), 0.1)
    keys = np.concatenate([np.asarray(keys) for keys in seen])
    assert len(np.unique(keys, axis=0)) == len(keys) == 12


def test_batches_are_split_by_turns():
    np.testing.assert_array_equal(split_batch({"x": np.arange(6)}, 2)["x"], [[0, 2, 4], [1, 3, 5]])


def test_moving_average():
    states, _ = run(1, steps=20, ema_decay=0.3)
    average = np.asarray(states[0].parameters["model"]["a.bias"], np.float64)
    for count, state in enumerate(states[1:]):
        decay = min(0.3, (1 + count) / (10 + count))
        average = decay * average + (1 - decay) * np.asarray(state.parameters["model"]["a.bias"], np.float64)
    np.testing.assert_allclose(states[-1].ema["model"]["a.bias"], average, rtol=1e-6)  # float32 roundings of 20 steps


def test_only_matrices_are_decayed():
    tree = {"low_noise": {"blocks.a.kernel": 0, "blocks.a.bias": 0, "blocks.norm.scale": 0, "blocks.modulation": 0}}
    tree["adapters"] = {"blocks.a.adapter.down": 0, "embedding.table": 0}
    names = {name for part in decayed(tree).values() for name, yes in part.items() if yes}
    assert names == {"blocks.a.kernel", "blocks.a.adapter.down"}
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.5))
    parameters = {"a.kernel": jnp.ones(2), "a.bias": jnp.ones(2)}
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, parameters), optimizer.init(parameters), parameters)
    np.testing.assert_allclose(updates["a.kernel"], -0.5, rtol=1e-6)
    np.testing.assert_array_equal(updates["a.bias"], 0)


def test_gradients_are_clipped():
    config = OptimizerConfig(weight_decay=0.0, clip_norm=1.0, eps=1e3)
    optimizer = make_optimizer(config)  # a large eps makes Adam linear in the gradient
    parameters = {"a.kernel": jnp.zeros(2)}
    updates, _ = optimizer.update({"a.kernel": jnp.array([30.0, 40.0])}, optimizer.init(parameters), parameters)
    np.testing.assert_allclose(updates["a.kernel"], [-0.6e-3, -0.8e-3], rtol=2e-3)  # eps against 1


def test_schedules():
    """Rates of a run of 24 steps, 4 of them of warm-up."""

    def rates(schedule, *steps):
        config = OptimizerConfig(learning_rate=2.0, warmup_steps=4, schedule=schedule, final_fraction=0.1)
        return [learning_rate(config, step, max(step - 4, 0) / 20) for step in steps]

    np.testing.assert_allclose(rates("cosine", 0, 1, 2, 3, 4), [0.4, 0.8, 1.2, 1.6, 2.0])
    np.testing.assert_allclose(rates("cosine", 14, 24), [2.0 * (0.1 + 0.9 / 2), 0.2])
    np.testing.assert_allclose(rates("constant", 3, 4, 23), [1.6, 2, 2])
    np.testing.assert_allclose(rates("wsd", 0, 4, 14, 19, 24), [0.4, 2, 2, 1.2, 0.2])
    with pytest.raises(InputError, match="did you mean 'cosine'"):
        OptimizerConfig(schedule="cosin")
    with pytest.raises(InputError, match="warmup_steps 100"):
        TrainerConfig(steps=50)
