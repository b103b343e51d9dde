"""A small run as a process of its own: `python -m tests.training.killed_run FOLDER STEPS [STEP TO DIE AT]`.

With a step to die at it kills itself with SIGKILL as that step's batch is made, while the checkpoint before may still
be on its way to the disk.
"""

import itertools
import os
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from wan_jax.training.config import OptimizerConfig, TrainerConfig
from wan_jax.training.trainer import DrawnBatches, Trainer


def loss(parameters, frozen, batch, keys):
    noise = jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
    y = (batch["x"] + 0.1 * noise) @ (frozen + parameters["a.kernel"]) + parameters["a.bias"]
    return jnp.mean((y - batch["y"]) ** 2), {"largest": jnp.abs(y).max()}


def parameters():
    return {"a.kernel": jnp.ones((3, 2)), "a.bias": jnp.zeros(2)}


def make_batch(step: int):
    x = np.random.default_rng(step).normal(size=(4, 3)).astype(np.float32)
    return {"x": x, "y": x[:, :2]}


def trainer(folder: Path, steps: int, make=make_batch, *, arguments=None, **changes) -> Trainer:
    """A run of `steps`; `changes` are of TrainerConfig, `arguments` of Trainer."""
    config = TrainerConfig(
        **{
            "steps": steps,
            "log_every": 3,
            "save_every": 4,
            "optimizer": OptimizerConfig(warmup_steps=2, learning_rate=0.1),
        }
        | changes
    )
    arguments = {"frozen": jnp.eye(3, 2), "show": None} | (arguments or {})
    return Trainer(
        loss, parameters(), DrawnBatches(lambda start: map(make, itertools.count(start))), config, folder, **arguments
    )


def main() -> None:
    folder, steps, *fatal = sys.argv[1:]

    def make(step: int):
        if fatal and step == int(fatal[0]):
            os.kill(os.getpid(), signal.SIGKILL)
        return make_batch(step)

    trainer(Path(folder), int(steps), make).run()


if __name__ == "__main__":
    main()
