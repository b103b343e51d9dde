"""Muon: which parameters it takes and as what matrices, and how far its updates go."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from optax.contrib import MuonDimensionNumbers

from wan_jax.models.denoiser import Denoiser
from wan_jax.models.text_encoder import TextEncoder
from wan_jax.models.vae import VAE
from wan_jax.parameters import abstract_parameters
from wan_jax.presets import get_preset
from wan_jax.training.config import OptimizerConfig
from wan_jax.training.optimizer import make_optimizer, muon_dimensions

MATRIX, LAYERS = MuonDimensionNumbers((0,), 1), MuonDimensionNumbers(1, 2)
FRAMES, VIDEOS = MuonDimensionNumbers((0, 1, 2), 3), MuonDimensionNumbers((0, 1, 2, 3), 4)


@pytest.mark.parametrize(
    ("kind", "component", "expected"),
    [
        (
            Denoiser,
            "denoiser",
            {
                "blocks.self_attention.query.kernel": LAYERS,
                "blocks.feed_forward.down.kernel": LAYERS,
                "time_projection.kernel": MATRIX,
                "patch_embedding.kernel": None,
                "head.linear.kernel": None,
                "blocks.modulation": None,
                "blocks.self_attention.query.bias": None,
                "blocks.self_attention.query_norm.scale": None,
            },
        ),
        (
            TextEncoder,
            "text_encoder",
            {
                "embedding.table": None,
                "blocks.attention.relative_bias": None,
                "blocks.feed_forward.gate.kernel": LAYERS,
            },
        ),
        (
            VAE,
            "vae",
            {
                "encoder.conv_in.kernel": None,
                "decoder.conv_out.kernel": None,
                "quant_conv.kernel": None,
                "decoder.middle.attention.qkv.kernel": MATRIX,
                "encoder.stages.0.blocks.0.conv_1.kernel": VIDEOS,
                "encoder.stages.0.downsample.conv.kernel": FRAMES,
            },
        ),
    ],
)
def test_muon_dimensions(kind, component, expected):
    config = get_preset("nano")
    tree = abstract_parameters(lambda: kind(getattr(config, component), dtype="float32", rngs=nnx.Rngs(0)))
    arrays = {name: jax.ShapeDtypeStruct(info.shape, info.dtype) for name, info in tree.items()}
    found = muon_dimensions({"model": arrays})["model"]
    assert {name: found[name] for name in expected} == expected


def test_muon_updates():
    """Each layer's update is as long as AdamW's: 0.2 of the learning rate."""
    generator = np.random.default_rng(0)
    shapes = {
        "blocks.up.kernel": (2, 12, 24),
        "conv_1.kernel": (3, 3, 3, 4, 8),
        "head.linear.kernel": (8, 4),
        "norm.scale": (8,),
    }
    parameters = {name: jnp.ones(shape) for name, shape in shapes.items()}
    slopes = {name: jnp.asarray(generator.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    slopes["blocks.up.kernel"] = slopes["blocks.up.kernel"].at[1].multiply(1e-3)
    optimizer = make_optimizer(OptimizerConfig("muon", beta_2=0.98))
    updates, _ = jax.jit(optimizer.update)(slopes, optimizer.init(parameters), parameters)
    # Newton and Schulz's singular values end between 0.7 and 1.2; the weight decay adds 0.01.
    for matrix in (*updates["blocks.up.kernel"], updates["conv_1.kernel"]):
        assert float(jnp.sqrt(jnp.square(matrix).mean())) == pytest.approx(0.2, rel=0.4)
    # The first update of Adam is the sign of the slope; Nesterov's look ahead makes it b1 / (1 + b1) longer.
    for name in ("head.linear.kernel", "norm.scale"):
        np.testing.assert_allclose(updates[name], -(1 + 0.9 / 1.9) * jnp.sign(slopes[name]), atol=1e-3)
