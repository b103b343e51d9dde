"""AdamW with warm-up, cosine decay and clipping."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from wan_jax.errors import InputError, unknown_name
from wan_jax.training.config import SCHEDULES, OptimizerConfig

# Last parts of the names of matrices. Weight decay is for them: decayed, a scale, a bias or a modulation would be
# drawn to a value that means nothing. (Their number of axes does not tell: parameters of layers are stacked.)
DECAYED = ("kernel", "down", "up")


def learning_rate(config: OptimizerConfig, steps: int) -> Callable[[Any], Any]:
    """The learning rate of each update, counted from 0, in a run of `steps`: up in a line, then as scheduled."""
    if config.schedule not in SCHEDULES:
        raise unknown_name("learning rate schedule", config.schedule, SCHEDULES)
    if not 0 <= config.warmup_steps < steps:
        raise InputError(f"warmup_steps {config.warmup_steps}: must be less than the {steps} steps of the run")
    warmup = optax.linear_schedule(
        config.learning_rate / (config.warmup_steps + 1), config.learning_rate, config.warmup_steps
    )
    if config.schedule == "constant":
        after = optax.constant_schedule(config.learning_rate)
    else:
        after = optax.cosine_decay_schedule(
            config.learning_rate, steps - config.warmup_steps, alpha=config.final_fraction
        )
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW (Loshchilov and Hutter, arXiv 1711.05101) in the parameters' dtype."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, steps),
            b1=config.beta_1,
            b2=config.beta_2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decayed,
        ),
    )


def decayed(parameters: Any) -> Any:
    """True for the parameters of a tree that are decayed, by the ends of their names."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path[-1:], simple=True).rpartition(".")[2] in DECAYED, parameters
    )
