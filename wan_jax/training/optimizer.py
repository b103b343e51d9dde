"""AdamW and Muon, with clipping and schedules of the learning rate.

The learning rate is an argument of a step, because it may follow the clock: optimizers make updates for a rate of 1.
"""

import math
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from wan_jax.training.config import OptimizerConfig

# Last parts of the names of matrices. Weight decay is for them: decayed, a scale, a bias or a modulation would be
# drawn to a value that means nothing. (Their number of axes does not tell: parameters of layers are stacked.)
DECAYED = ("kernel", "down", "up")
# Kernels at the edges of a model: they are no maps within a width, so Muon leaves them to AdamW.
EDGES = {"patch_embedding", "head", "conv_in", "conv_out", "quant_conv", "post_quant_conv", "readout"}


def learning_rate(config: OptimizerConfig, step: int, fraction: float) -> float:
    """Returns the learning rate of an update.

    Args:
      config: rate, warm-up and schedule.
      step: updates before this one.
      fraction: how much of the schedule after the warm-up is over, from 0 to 1.
    """
    warmup = min((step + 1) / (config.warmup_steps + 1), 1.0)
    final = config.final_fraction
    factors = {
        "constant": 1.0,
        "cosine": final + (1 - final) * (1 + math.cos(math.pi * fraction)) / 2,
        "wsd": min(1.0, final + 2 * (1 - fraction)),
    }
    return config.learning_rate * warmup * factors[config.schedule]


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Makes clipping by the global norm, then AdamW or Muon at a learning rate of 1, in the parameters' dtype.

    AdamW: Loshchilov and Hutter, arXiv 1711.05101. Muon: Jordan 2024, with updates of AdamW's size (Liu et al., arXiv
    2502.16982), so that one learning rate serves both.
    """
    if config.name == "muon":
        optimizer = optax.contrib.muon(
            1.0,
            weight_decay=config.weight_decay,
            adam_b1=config.beta_1,
            adam_b2=config.beta_2,
            eps=config.eps,
            muon_weight_dimension_numbers=muon_dimensions,
            consistent_rms=0.2,
        )
    else:
        optimizer = optax.adamw(
            optax.constant_schedule(1.0),  # a schedule has a count, which checkpoints hold
            b1=config.beta_1,
            b2=config.beta_2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decayed,
        )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)


def decayed(parameters: Any) -> Any:
    """Returns for each parameter of a tree whether it is decayed, by the end of its name."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _name(path)[-1] in DECAYED, parameters)


def muon_dimensions(parameters: Any) -> Any:
    """Returns for each parameter of a tree the axes that Muon takes as a matrix's; None: the parameter is AdamW's.

    Kernels [in, out] are matrices, stacked ones [L, in, out] one for each layer; of convolutions [(t,) h, w, in, out]
    all that goes into one output is a row. Biases, norms, modulations, tables and kernels in EDGES are AdamW's.
    """

    def dimensions(path: Any, parameter: Any) -> MuonDimensionNumbers | None:
        *modules, last = _name(path)
        if last != "kernel" or EDGES.intersection(modules):
            return None
        rank = len(parameter.shape)
        return MuonDimensionNumbers(1, 2) if rank == 3 else MuonDimensionNumbers(tuple(range(rank - 1)), rank - 1)

    return jax.tree_util.tree_map_with_path(dimensions, parameters)


def _name(path: Any) -> list[str]:
    """The parts of a parameter's dotted name, which is the last key of its path."""
    return jax.tree_util.keystr(path[-1:], simple=True).split(".")
