"""Our .pth reader and writer against torch.save and torch.load, and pickles that are up to something."""

import os
import pickle
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest
import torch

from tests.checkpoint.trees import assert_same_state, bits
from wan_jax.checkpoint.formats.tensors import TensorInfo
from wan_jax.checkpoint.formats.torch_pickle import TorchPickleFile, write_torch_pickle
from wan_jax.errors import InputError

pytestmark = pytest.mark.quick

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
    infos = {name: TensorInfo(array.shape, array.dtype, "") for name, array in tensors.items()}
    write_torch_pickle(path, infos, lambda names: (tensors[name] for name in names))
    assert list(path.parent.iterdir()) == [path]
    assert zipfile.ZipFile(path).testzip() is None  # checksums
    expected = {
        "a": torch.arange(12.0).reshape(3, 4).T.contiguous(),
        "blocks.0.b": torch.arange(5).bfloat16(),
        "scalar": torch.tensor(1.5).half(),
        "none": torch.zeros(0, 2),
    }
    for mmap in (False, True):
        assert_same_state(torch.load(path, weights_only=True, mmap=mmap), expected)
    ours = TorchPickleFile(path)
    for name, array in tensors.items():
        np.testing.assert_array_equal(ours.read(name), array)
    for offset, _ in ours._members.values():
        assert offset % 64 == 0  # mapped tensors are aligned


def test_a_failing_write_leaves_no_file(path):
    def read_many(names):
        raise RuntimeError("source gone")
        yield

    with pytest.raises(RuntimeError, match="source gone"):
        write_torch_pickle(path, {"a": TensorInfo((2,), np.dtype(np.float32), "")}, read_many)
    assert not list(path.parent.iterdir())


class Malicious:
    """Calls `function(*arguments)` when unpickled."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("touch {marker}",), "posix.system"),
        # The protocol that torch.save uses has Python 2's name for builtins.
        (eval, ("open('{marker}', 'w')",), "__builtin__.eval"),
        (getattr, ("", "join"), "__builtin__.getattr"),
        (__import__, ("os",), "__builtin__.__import__"),
        (torch.load, ("{marker}",), "torch.serialization.load"),
        (torch.nn.Linear, (2, 2), "torch.nn.modules.linear.Linear"),
    ],
)
@pytest.mark.parametrize("wrap", [lambda bad: {"a": torch.ones(1), "b": bad}, lambda bad: bad])
def test_a_pickle_with_code_is_refused_by_name(path, tmp_path, function, arguments, name, wrap):
    marker = tmp_path / "marker"
    filled = [argument.format(marker=marker) if isinstance(argument, str) else argument for argument in arguments]
    torch.save(wrap(Malicious(function, *filled)), path)
    with pytest.raises(InputError) as error:
        TorchPickleFile(path)
    assert f"refused: the pickle wants to call {name}" in str(error.value)
    assert "\n" not in str(error.value)
    assert not marker.exists()


def archive(path, pickled: bytes, storages: dict[str, bytes], compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", pickled)
        for key, data in storages.items():
            file.writestr(f"archive/data/{key}", data)


def described(storage: tuple, offset, shape, strides) -> bytes:
    """The pickle of {"a": tensor} with any description, as torch.save would write it."""

    class Pickler(pickle._Pickler):
        def persistent_id(self, obj):
            return storage if obj == "the storage" else None

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, ("the storage", offset, shape, strides, False, OrderedDict())

    import io

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"a": Tensor()})
    return buffer.getvalue()


FLOATS = ("storage", torch.FloatStorage, "0", "cpu", 4)


def test_handmade_archives_work_at_all(path):
    archive(path, described(FLOATS, 1, (3,), (1,)), {"0": np.arange(4, dtype=np.float32).tobytes()})
    np.testing.assert_array_equal(TorchPickleFile(path).read("a"), [1, 2, 3])


@pytest.mark.parametrize(
    ("storage", "offset", "shape", "strides", "message"),
    [
        (FLOATS, 0, (5,), (1,), "reaches beyond its storage"),
        (FLOATS, 2, (3,), (1,), "reaches beyond its storage"),
        (FLOATS, 0, (2, 2), (1000, 1), "reaches beyond its storage"),
        (FLOATS, -1, (2,), (1,), "unusual description"),
        (FLOATS, 0, (2,), (-1,), "unusual description"),
        (FLOATS, 0, (2, 2), (1,), "unusual description"),
        (FLOATS, 0, ("2",), (1,), "unusual description"),
        (FLOATS, 0, None, (1,), "unusual description"),
        (("storage", torch.FloatStorage, "7", "cpu", 4), 0, (4,), (1,), "data of a is missing"),
        (("storage", torch.FloatStorage, "0", "cpu", 400), 0, (400,), (1,), "data of a is truncated"),
        (("module", torch.FloatStorage, "0", "cpu", 4), 0, (4,), (1,), "refused"),
        (("storage", "FancyStorage", "0", "cpu", 4), 0, (4,), (1,), "damaged"),
    ],
)
def test_descriptions_that_lie(path, storage, offset, shape, strides, message):
    archive(path, described(storage, offset, shape, strides), {"0": bytes(16)})
    with pytest.raises(InputError) as error:
        TorchPickleFile(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_description_changed_after_it_was_built(path):
    """BUILD may still write attributes of what the pickle has made: nothing of it is trusted."""
    good = described(FLOATS, 0, (4,), (1,))
    # Just before the dictionary takes the tensor: state {"offset": 10 ** 6}, BUILD.
    change = pickle.dumps({"offset": 10**6}, 2)[2:-1] + pickle.BUILD
    position = good.rindex(pickle.SETITEM)
    archive(path, good[:position] + change + good[position:], {"0": bytes(16)})
    with pytest.raises(InputError, match="reaches beyond its storage"):
        TorchPickleFile(path)


@pytest.mark.parametrize("content", [[torch.ones(2)], {"a": "text"}, {"state_dict": {"a": 1}}, {3: torch.ones(1)}, 5])
def test_anything_but_a_state_dict_is_refused(path, content):
    torch.save(content, path)
    with pytest.raises(InputError, match=r"not a state dict|is no tensor"):
        TorchPickleFile(path)


def test_the_format_before_pytorch_1_6_gets_advice(path):
    torch.save(STATE, path, _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match=r"older than PyTorch 1\.6"):
        TorchPickleFile(path)


@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_a_truncated_archive(path, kept):
    torch.save({"a": torch.zeros(10_000)}, path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(InputError, match="truncated or damaged zip archive"):
        TorchPickleFile(path)


def test_archives_of_another_kind(path):
    archive(path, described(FLOATS, 0, (4,), (1,)), {"0": bytes(16)}, zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match="compressed"):
        TorchPickleFile(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "hello")
    with pytest.raises(InputError, match="no usable data"):
        TorchPickleFile(path)
    archive(path, b"\x80\x02nonsense", {})
    with pytest.raises(InputError, match="its pickle is damaged"):
        TorchPickleFile(path)
