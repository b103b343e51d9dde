"""Meshes and rules, on shapes alone; what runs on several devices is in tests/training/test_mesh.py."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from wan_jax.errors import InputError
from wan_jax.models.denoiser import Denoiser
from wan_jax.models.text_encoder import TextEncoder
from wan_jax.models.vae import VAE
from wan_jax.parallel.sharding import ShardingRules, make_mesh
from wan_jax.parameters import abstract_parameters
from wan_jax.presets import get_preset

MESH = AbstractMesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def test_specs():
    rules = ShardingRules()
    assert rules.spec(("layers", "embed", "mlp"), (40, 64, 128), MESH) == PartitionSpec(None, ("fsdp",), None)
    assert rules.spec(("heads",), (64,), MESH) == PartitionSpec(None)
    assert rules.spec(("embed",), (6,), MESH) == PartitionSpec(None)  # 6 does not divide by 4
    only_data = AbstractMesh((8,), ("data",), axis_types=(AxisType.Auto,))
    assert rules.spec(("embed", "mlp"), (64, 128), only_data) == PartitionSpec(None, None)


def test_two_axes_on_one_mesh_axis():
    with pytest.raises(InputError, match="two axes of \\('embed', 'mlp'\\) on one mesh axis"):
        ShardingRules(mlp=("fsdp",)).spec(("embed", "mlp"), (64, 128), MESH)


def test_a_rule_for_every_axis_of_every_model():
    preset = get_preset("t2v-1.3b")
    for make, config in ((Denoiser, preset.denoiser), (TextEncoder, preset.text_encoder), (VAE, preset.vae)):
        tree = abstract_parameters(lambda make=make, config=config: make(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))
        for info in tree.values():
            ShardingRules().spec(info.axes, info.shape, MESH)


def test_make_mesh():
    assert dict(make_mesh({"data": 1, "fsdp": -1}).shape) == {"data": 1, "fsdp": jax.device_count()}
    with pytest.raises(InputError, match="mesh data 3 x fsdp 5: must use all"):
        make_mesh({"data": 3, "fsdp": 5})
    with pytest.raises(InputError, match="one size may be -1"):
        make_mesh({"data": -1, "fsdp": -1})
