"""The .pth reader and writer, and pickles that are up to something. PyTorch's own files are in tests/parity."""

import io
import os
import pickle
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest

from tests.checkpoint.trees import archive, bits, save_pickle
from wan_jax.checkpoint.formats.tensors import TensorInfo
from wan_jax.checkpoint.formats.torch_pickle import TorchPickleFile, write_torch_pickle
from wan_jax.errors import InputError

pytestmark = pytest.mark.quick

STATE = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4).T,
    "blocks.0.b": np.arange(5).astype(ml_dtypes.bfloat16),
    "scalar": np.asarray(1.5, np.float16),
    "none": np.zeros((0, 2), np.float32),
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pth"


def test_reads_what_it_writes(path):
    save_pickle(path, STATE)
    assert list(path.parent.iterdir()) == [path]
    archived = zipfile.ZipFile(path)
    assert archived.testzip() is None  # checksums
    file = TorchPickleFile(path)
    assert file.tensors.keys() == STATE.keys()
    for name, array in STATE.items():
        np.testing.assert_array_equal(bits(file.read(name)), bits(array).reshape(array.shape))
    # Mapped tensors are aligned: data begins 30 bytes, the name and the extra field after its header.
    for entry in archived.infolist():
        if "/data/" in entry.filename:
            assert (entry.header_offset + 30 + len(entry.filename) + len(entry.extra) + 20) % 64 == 0


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
        (zipfile.ZipFile, ("{marker}", "w"), "zipfile.ZipFile"),
    ],
)
@pytest.mark.parametrize("wrap", [lambda bad: {"b": bad}, lambda bad: bad])
def test_a_pickle_with_code_is_refused_by_name(path, tmp_path, function, arguments, name, wrap):
    marker = tmp_path / "marker"
    filled = [argument.format(marker=marker) if isinstance(argument, str) else argument for argument in arguments]
    archive(path, pickle.dumps(wrap(Malicious(function, *filled)), 2), {})
    with pytest.raises(InputError) as error:
        TorchPickleFile(path)
    assert name in str(error.value)
    assert "refused" in str(error.value)
    assert "\n" not in str(error.value)
    assert not marker.exists()


REBUILD = type("_rebuild_tensor_v2", (), {"__module__": "torch._utils"})
FLOAT_STORAGE = type("FloatStorage", (), {"__module__": "torch"})
FLOATS = ("storage", FLOAT_STORAGE, "0", "cpu", 4)


def described(storage: tuple, offset, shape, strides) -> bytes:
    """The pickle of {"a": tensor} with any description, as torch.save would write it."""

    class Pickler(pickle._Pickler):
        def persistent_id(self, obj):
            return storage if obj == "the storage" else None

        def save_global(self, obj, name=None):  # what it names need not exist
            self.write(pickle.GLOBAL + f"{obj.__module__}\n{obj.__name__}\n".encode())

    class Tensor:
        def __reduce__(self):
            return REBUILD, ("the storage", offset, shape, strides, False, OrderedDict())

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"a": Tensor()})
    return buffer.getvalue()


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
        (("storage", FLOAT_STORAGE, "7", "cpu", 4), 0, (4,), (1,), "data of a is missing"),
        (("storage", FLOAT_STORAGE, "0", "cpu", 400), 0, (400,), (1,), "data of a is truncated"),
        (("module", FLOAT_STORAGE, "0", "cpu", 4), 0, (4,), (1,), "refused"),
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
    """BUILD may write attributes of what the pickle has made."""
    good = described(FLOATS, 0, (4,), (1,))
    # Just before the dictionary takes the tensor: state {"offset": 10 ** 6}, BUILD.
    change = pickle.dumps({"offset": 10**6}, 2)[2:-1] + pickle.BUILD
    position = good.rindex(pickle.SETITEM)
    archive(path, good[:position] + change + good[position:], {"0": bytes(16)})
    with pytest.raises(InputError, match="refused: the pickle changes"):
        TorchPickleFile(path)


@pytest.mark.parametrize("content", [[1.0], {"a": "text"}, {"state_dict": {"a": 1}}, {3: 1.0}, 5])
def test_anything_but_a_state_dict_is_refused(path, content):
    archive(path, pickle.dumps(content, 2), {})
    with pytest.raises(InputError, match=r"not a state dict|is no tensor|no state dict needs"):
        TorchPickleFile(path)


@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_a_truncated_archive(path, kept):
    save_pickle(path, {"a": np.zeros(10_000, np.float32)})
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
