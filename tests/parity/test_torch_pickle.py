"""Our .pth reader and writer against torch.save and torch.load."""

from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest
import torch

from tests.checkpoint.trees import save_pickle
from tests.parity.torch_trees import assert_same_state, bits
from wan_jax.checkpoint.formats.torch_pickle import TorchPickleFile
from wan_jax.errors import InputError

BASE = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
STATE = {
    "plain": BASE,
    "bfloat16": torch.randn(5, 3).bfloat16(),
    "half": torch.randn(3).half(),
    "transposed": BASE.T,
    "slice of a shared storage": BASE[1:3, ::2],
    "expanded": torch.ones(1).expand(3, 2),
    "scalar": torch.tensor(2.5),
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "empty": torch.zeros(0, 3),
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pth"


@pytest.mark.parametrize(
    "wrap",
    [dict, OrderedDict, lambda state: {"state_dict": state, "epoch": 3, "name": "x"}, lambda state: {"model": state}],
)
def test_reads_what_torch_saves(path, wrap):
    torch.save(wrap(STATE), path)
    file = TorchPickleFile(path)
    assert file.tensors.keys() == STATE.keys()
    for name, tensor in STATE.items():
        assert file.tensors[name].shape == tuple(tensor.shape)
        np.testing.assert_array_equal(bits(file.read(name)), bits(tensor), err_msg=name)


def test_reads_a_modules_state_dict(path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    torch.save(module.state_dict(), path)  # an OrderedDict with an attribute: _metadata
    np.testing.assert_array_equal(TorchPickleFile(path).read("0.weight"), module[0].weight.detach())


def test_torch_reads_what_we_write(path):
    tensors = {
        "a": np.arange(12, dtype=np.float32).reshape(3, 4).T,
        "blocks.0.b": np.arange(5).astype(ml_dtypes.bfloat16),
        "scalar": np.asarray(1.5, np.float16),
        "none": np.zeros((0, 2), np.float32),
    }
    save_pickle(path, tensors)
    expected = {
        "a": torch.arange(12.0).reshape(3, 4).T.contiguous(),
        "blocks.0.b": torch.arange(5).bfloat16(),
        "scalar": torch.tensor(1.5).half(),
        "none": torch.zeros(0, 2),
    }
    for mmap in (False, True):
        assert_same_state(torch.load(path, weights_only=True, mmap=mmap), expected)


def test_the_format_before_pytorch_1_6_gets_advice(path):
    torch.save(STATE, path, _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match=r"older than PyTorch 1\.6"):
        TorchPickleFile(path)


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [(torch.load, ("x",), "torch.serialization.load"), (torch.nn.Linear, (2, 2), "torch.nn.modules.linear.Linear")],
)
def test_a_pickle_with_code_of_torch_is_refused_by_name(path, function, arguments, name):
    class Malicious:
        def __reduce__(self):
            return function, arguments

    torch.save({"a": torch.ones(1), "b": Malicious()}, path)
    with pytest.raises(InputError, match=f"refused.*{name}"):
        TorchPickleFile(path)
