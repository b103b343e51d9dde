"""Weights go straight into parts: any mesh from any file, each process reading what its devices have."""

import os

import numpy as np
import pytest

from wan_jax.checkpoint import open_checkpoint
from wan_jax.checkpoint.components import local_box
from wan_jax.models.build import abstract_model
from wan_jax.parallel.mesh_spec import MeshSpec
from wan_jax.parallel.placement import Placement
from wan_jax.testing.models import DEMO, write_demo


@pytest.fixture(scope="module", params=["orbax", "diffusers"])
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / request.param
    write_demo(folder, request.param)
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def whole(checkpoint):
    return {name: np.asarray(array) for name, array in checkpoint.load("low_noise", "float32").items()}


@pytest.mark.parametrize("mesh", ["pipeline2-fsdp2-tensor2", "fsdp2-tensor2", "single"])
def test_one_checkpoint_on_8_on_4_and_on_1(checkpoint, whole, mesh):
    places = Placement.over(MeshSpec.parse(mesh)).parameter_shardings(abstract_model(DEMO.denoiser))
    for name, array in checkpoint.load("low_noise", "float32", places).items():
        assert array.sharding == places[name]
        np.testing.assert_array_equal(array, whole[name])


class SecondHalf:
    """Where parameters lie, in a process that has the second half of the devices."""

    def __init__(self, sharding):
        self.sharding = sharding

    def addressable_devices_indices_map(self, shape):
        indices = self.sharding.devices_indices_map(shape)
        return {device: indices[device] for device in self.sharding.mesh.devices.flatten()[4:]}


# Of the slowest axis the second half of the devices has the second half: layers, heads and features, the model's width.
@pytest.mark.parametrize(("mesh", "fraction"), [("pipeline2-ring4", 0.7), ("tensor8", 0.8), ("fsdp8", 0.95)])
def test_a_process_reads_its_part(checkpoint, whole, monkeypatch, mesh, fraction):
    places = Placement.over(MeshSpec.parse(mesh)).parameter_shardings(abstract_model(DEMO.denoiser))
    read = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: read.append(preadv(*args)) or read[-1])
    boxes = {name: local_box(SecondHalf(sharding), whole[name].shape) for name, sharding in places.items()}
    for name, host in checkpoint.part("low_noise").read_stacked(np.dtype(np.float32), boxes):
        np.testing.assert_array_equal(host, whole[name] if boxes[name] is None else whole[name][boxes[name]])
    assert sum(box is not None for box in boxes.values()) > len(boxes) / 4
    if checkpoint.layout == "diffusers":  # rows of a tensor are read apart, columns are not
        assert sum(read) < fraction * checkpoint.part("low_noise").nbytes


def test_boxes():
    placement = Placement.over(MeshSpec(fsdp=2, tensor=4))
    sharding = placement.parameter_sharding(("layers", "embed", "mlp"))
    assert local_box(sharding, (2, 8, 8)) is None  # one process has all
    assert local_box(SecondHalf(sharding), (2, 8, 8)) == (slice(0, 2), slice(4, 8), slice(0, 8))
    assert local_box(None, (3,)) is None
