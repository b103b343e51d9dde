"""Our safetensors reader and writer against the safetensors library."""

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from tests.checkpoint.test_safetensors import OURS, save_by_us
from tests.parity.torch_trees import bits
from wan_jax.checkpoint.formats.safetensors import SafetensorsFile

TENSORS = {
    "matrix": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
    "odd": torch.randn(7).to(torch.bfloat16),
    "half": torch.randn(2, 2, 2).half(),
    "eight": torch.randn(9).to(torch.float8_e4m3fn),
    "five": torch.randn(9).to(torch.float8_e5m2),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
    "double": torch.randn(2).double(),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "long": torch.arange(4),
    "flag": torch.tensor([True, False]),
}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(TENSORS, path, {"format": "pt", "note": "kept out of the tensors"})
    return path


def test_reads_every_dtype(path):
    file = SafetensorsFile(path)
    assert file.tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        array = file.read(name)
        assert array.shape == tuple(tensor.shape) == file.tensors[name].shape
        assert array.tobytes() == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    assert file.read("eight").dtype == ml_dtypes.float8_e4m3fn
    assert file.read("five").dtype == ml_dtypes.float8_e5m2


def test_reads_into_another_dtype_as_torch_rounds(path):
    array = SafetensorsFile(path).read("matrix", np.dtype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(bits(array), bits(TENSORS["matrix"].bfloat16()))


@pytest.mark.parametrize("shard_bytes", [10**9, 100, 1])
def test_the_library_reads_what_we_write(tmp_path, shard_bytes):
    save_by_us(tmp_path, OURS, shard_bytes)
    read: dict = {}
    for file in tmp_path.glob("*.safetensors"):
        with safetensors.safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        read |= safetensors.torch.load_file(file)
    assert read.keys() == OURS.keys()
    for name, array in OURS.items():
        assert tuple(read[name].shape) == array.shape
        np.testing.assert_array_equal(bits(read[name]), bits(array).reshape(array.shape), err_msg=name)
