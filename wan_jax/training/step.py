"""One training step for any loss: gradients over microbatches, an update, a moving average."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Sharding

# loss(parameters, frozen, batch, keys) -> (the mean over the examples, figures to report).
# `parameters` is trained and float32, `frozen` is read, `keys` [b] has a random key for each example of `batch`.
Loss = Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that a step changes."""

    step: jax.Array  # int32, number of updates done
    key: jax.Array  # uint32 [2]: all randomness is a function of this and `step`
    parameters: Any  # float32
    optimizer: Any
    ema: Any  # exponential moving average of the parameters; None without one


def init_state(
    parameters: Any,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    ema: bool,
    replicated: Sharding,
) -> TrainState:
    """The state before the first step. Whatever belongs to a parameter lies where the parameter lies.

    Args:
      parameters: any tree of arrays, placed. They become part of the state, which the first step overwrites.
      optimizer: of `make_optimizer`, or another.
      seed: of all randomness.
      ema: whether to keep a moving average.
      replicated: where scalars lie.
    """
    places = jax.tree.map(lambda array: array.sharding, parameters)
    optimizer_places: Any = replicated
    if any(place != replicated for place in jax.tree.leaves(places)):  # optax cannot tell of every optimizer
        shapes = jax.eval_shape(optimizer.init, parameters)
        optimizer_places = optax.tree_utils.tree_map_params(
            optimizer, lambda _, place: place, shapes, places, transform_non_params=lambda _: replicated
        )
    return TrainState(
        step=jax.device_put(jnp.int32(0), replicated),
        key=jax.device_put(jax.random.key_data(jax.random.key(seed, impl="threefry2x32")), replicated),
        parameters=parameters,
        optimizer=jax.jit(optimizer.init, out_shardings=optimizer_places)(parameters),
        ema=jax.tree.map(jnp.copy, parameters) if ema else None,
    )


def make_step(
    loss: Loss, optimizer: optax.GradientTransformation, ema_decay: float
) -> Callable[[TrainState, Any, Any, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """Makes step(state, frozen, batch, rate) -> (state, metrics), to be jitted with the state donated.

    `optimizer` makes updates for a learning rate of 1; they are multiplied by `rate`.

    The batch's arrays are [accumulation, b, ...]; microbatches run one after the other and their gradients are
    averaged. Every example has a random key of its own, so that results depend neither on how a batch is cut into
    microbatches nor on the mesh. Metrics are the loss's means and the gradients' norm.
    """
    gradients = jax.value_and_grad(loss, has_aux=True)

    def step(state: TrainState, frozen: Any, batch: Any, rate: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        accumulation, size = jax.tree.leaves(batch)[0].shape[:2]
        keys = example_keys(state, accumulation, size)

        def evaluate(microbatch: Any, keys: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
            (value, metrics), slopes = gradients(state.parameters, frozen, microbatch, keys)
            return slopes, {"loss": value, **metrics}

        def add(total: Any, xs: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, evaluate(*xs)), None

        first = jax.tree.map(lambda x: x[0], (batch, keys))
        total = evaluate(*first)
        if accumulation > 1:
            rest = jax.tree.map(lambda x: x[1:], (batch, keys))
            total, _ = lax.scan(add, total, rest)
        slopes, metrics = jax.tree.map(lambda x: x / accumulation, total)

        metrics["gradient_norm"] = optax.global_norm(slopes)
        updates, optimizer_state = optimizer.update(slopes, state.optimizer, state.parameters)
        updates = jax.tree.map(lambda update: rate * update, updates)
        parameters = optax.apply_updates(state.parameters, updates)
        ema = None
        if state.ema is not None:
            # The usual start: an average over few steps at first, so that the initial values fade.
            count = state.step.astype(jnp.float32)
            decay = jnp.minimum(ema_decay, (1 + count) / (10 + count))
            ema = jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), state.ema, parameters)
        return TrainState(state.step + 1, state.key, parameters, optimizer_state, ema), metrics

    return step


def example_keys(state: TrainState, accumulation: int, size: int) -> jax.Array:
    """Keys [accumulation, size] of this step; microbatch a holds the examples a, a + accumulation, ..."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key, impl="threefry2x32"), state.step)
    return jax.random.split(key, (size, accumulation)).T


def split_batch(batch: Any, accumulation: int) -> Any:
    """[B, ...] arrays of host or device -> [accumulation, B / accumulation, ...], in the order of `example_keys`."""

    def split(array: Any) -> Any:
        array = array.reshape(-1, accumulation, *array.shape[1:])
        if isinstance(array, jax.Array):
            return array.swapaxes(0, 1)
        return np.ascontiguousarray(np.swapaxes(array, 0, 1))

    return jax.tree.map(split, batch)
