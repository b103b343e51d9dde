"""The sharding rules, on shapes alone; what runs on several devices is in tests/training/test_mesh.py."""

import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from wan_jax.models.denoiser import Denoiser
from wan_jax.models.text_encoder import TextEncoder
from wan_jax.models.vae import VAE
from wan_jax.parallel.sharding import parameter_spec
from wan_jax.parameters import abstract_parameters
from wan_jax.presets import get_preset

pytestmark = pytest.mark.quick


def test_specs():
    assert parameter_spec(("layers", "embed", "mlp")) == P("pipeline", "fsdp", "tensor")
    assert parameter_spec(("layers", "embed")) == P("pipeline", None)  # a vector stays whole
    assert parameter_spec((None, "embed")) == P(None, "fsdp")
    assert parameter_spec(("heads",)) == P("tensor")


def test_a_rule_for_every_axis_of_every_model():
    preset = get_preset("t2v-1.3b")
    for make, config in ((Denoiser, preset.denoiser), (TextEncoder, preset.text_encoder), (VAE, preset.vae)):
        tree = abstract_parameters(lambda make=make, config=config: make(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))
        for info in tree.values():
            used = [axis for axis in parameter_spec(info.axes) if axis is not None]
            assert len(used) == len(set(used))
