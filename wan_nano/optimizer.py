"""AdamW or Muon, with a learning rate that the loop sets, because it depends on the clock."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from wan_jax.training.optimizer import decayed

OPTIMIZERS = ("adamw", "muon")
# What lies at a model's edges, and what reads attributes from texts: kernels there are not maps within a width, and
# Muon's users leave them to AdamW.
EDGES = {"patch_embedding", "head", "conv_in", "conv_out", "quant_conv", "post_quant_conv", "readout"}
BETAS = {"b1": 0.9, "b2": 0.98}
WEIGHT_DECAY = 0.01


def make_optimizer(name: str, rate: float) -> optax.GradientTransformation:
    """Clipping, then AdamW, or Muon (Jordan 2024) for kernels and AdamW for the rest.

    Muon's updates are scaled to the size of AdamW's (Liu et al., arXiv 2502.16982), so that one learning rate serves
    both and both optimizers. `with_learning_rate` sets it in a state.
    """

    def adamw(learning_rate: Any) -> optax.GradientTransformation:
        return optax.adamw(learning_rate, **BETAS, eps=1e-8, weight_decay=WEIGHT_DECAY, mask=decayed)

    def muon(learning_rate: Any) -> optax.GradientTransformation:
        return optax.contrib.muon(
            learning_rate,
            weight_decay=WEIGHT_DECAY,
            adam_b1=BETAS["b1"],
            adam_b2=BETAS["b2"],
            muon_weight_dimension_numbers=matrices,
            consistent_rms=0.2,
        )

    kinds = {"adamw": adamw, "muon": muon}
    return optax.chain(optax.clip_by_global_norm(1.0), optax.inject_hyperparams(kinds[name])(learning_rate=rate))


def with_learning_rate(optimizer_state: Any, rate: float) -> Any:
    """The state of `make_optimizer` with this learning rate for the next update."""
    clip, injected = optimizer_state
    hyperparameters = {**injected.hyperparams, "learning_rate": jnp.asarray(rate, jnp.float32)}
    return clip, injected._replace(hyperparams=hyperparameters)


def matrices(parameters: Mapping[str, Any]) -> dict[str, MuonDimensionNumbers | None]:
    """Which axes Muon takes as those of a matrix, by parameter; None: the parameter is AdamW's.

    Kernels [in, out] are matrices, stacked ones [L, in, out] one for each layer; of convolutions [(t,) h, w, in, out]
    all that goes into one output is a row. Biases, norms, modulations, tables and what is in EDGES are AdamW's.
    """

    def of(name: str) -> MuonDimensionNumbers | None:
        *modules, last = name.split(".")
        if last != "kernel" or EDGES.intersection(modules):
            return None
        rank = len(parameters[name].shape)
        return MuonDimensionNumbers(1, 2) if rank == 3 else MuonDimensionNumbers(tuple(range(rank - 1)), rank - 1)

    return {name: of(name) for name in parameters}
