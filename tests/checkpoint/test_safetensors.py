"""The safetensors reader and writer, and every way a file can be broken. tests/parity has the safetensors library."""

import json
import os

import ml_dtypes
import numpy as np
import pytest

from tests.checkpoint.trees import bits, save
from wan_jax.checkpoint.formats.safetensors import SafetensorsFile, open_safetensors_folder, write_safetensors
from wan_jax.checkpoint.formats.tensors import TensorInfo
from wan_jax.errors import InputError

pytestmark = pytest.mark.quick

RANDOM = np.random.default_rng(0)
TENSORS = {
    "matrix": RANDOM.standard_normal((3, 5), np.float32),
    "odd": RANDOM.standard_normal(7, np.float32).astype(ml_dtypes.bfloat16),
    "half": RANDOM.standard_normal((2, 2, 2), np.float32).astype(np.float16),
    "eight": RANDOM.standard_normal(9, np.float32).astype(ml_dtypes.float8_e4m3fn),
    "five": RANDOM.standard_normal(9, np.float32).astype(ml_dtypes.float8_e5m2),
    "scalar": np.asarray(2.5, np.float32),
    "empty": np.zeros((0, 4), np.float32),
    "double": RANDOM.standard_normal(2),
    "bytes": np.arange(5, dtype=np.uint8),
    "long": np.arange(4),
    "flag": np.array([True, False]),
}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "model.safetensors"
    save(path, TENSORS, {"note": "kept out of the tensors"})
    return path


def test_reads_every_dtype(path):
    file = SafetensorsFile(path)
    assert file.tensors.keys() == TENSORS.keys()
    assert file.metadata["note"] == "kept out of the tensors"
    for name, array in TENSORS.items():
        read = file.read(name)
        assert read.shape == array.shape == file.tensors[name].shape
        assert read.dtype == array.dtype
        assert read.tobytes() == array.tobytes()


def test_reads_what_the_system_gives_in_pieces(path, monkeypatch):
    """One call gives at most 2 GiB; here, 7 bytes."""
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda descriptor, views, offset: preadv(descriptor, [views[0][:7]], offset))
    np.testing.assert_array_equal(SafetensorsFile(path).read("matrix"), TENSORS["matrix"])


def test_a_file_that_shrinks_while_open(path):
    file = SafetensorsFile(path)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(InputError, match="1 bytes early"):
        list(file.read_many(list(file.tensors)))


def test_reads_into_another_dtype(path):
    array = SafetensorsFile(path).read("matrix", np.dtype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(bits(array), bits(TENSORS["matrix"].astype(ml_dtypes.bfloat16)))


def save_by_us(folder, tensors: dict[str, np.ndarray], shard_bytes: int):
    infos = {name: TensorInfo(array.shape, array.dtype, "") for name, array in tensors.items()}
    read_many = lambda names: (tensors[name] for name in names)  # noqa: E731
    write_safetensors(folder, "model", infos, read_many, shard_bytes)


# The odd number of bfloat16 values would misalign what follows, if the file were written in this order.
OURS = {
    "odd": np.arange(7).astype(ml_dtypes.bfloat16),
    "matrix": np.arange(15, dtype=np.float32).reshape(3, 5),
    "transposed": np.arange(12, dtype=np.float32).reshape(3, 4).T,
    "scalar": np.asarray(1.5, np.float16),
    "big": np.arange(40, dtype=np.float32),
}


@pytest.mark.parametrize("shard_bytes", [10**9, 100, 1])
def test_reads_what_it_writes(tmp_path, shard_bytes):
    save_by_us(tmp_path, OURS, shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == {10**9: 1, 100: 3, 1: 5}[shard_bytes]
    assert sorted(tmp_path.iterdir()) == sorted([*files, *tmp_path.glob("*.index.json")])
    if len(files) > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(array.nbytes for array in OURS.values())
        assert {name: index["weight_map"][name] for name in OURS} == index["weight_map"]
    ours = open_safetensors_folder(tmp_path)
    for name, array in OURS.items():
        np.testing.assert_array_equal(ours.read(name), array)


def test_a_failing_write_leaves_no_file(tmp_path):
    def read_many(names):
        yield np.zeros(7, ml_dtypes.bfloat16)
        raise RuntimeError("source gone")

    infos = {name: TensorInfo((7,), np.dtype(ml_dtypes.bfloat16), "") for name in "ab"}
    with pytest.raises(RuntimeError, match="source gone"):
        write_safetensors(tmp_path, "model", infos, read_many)
    assert not list(tmp_path.iterdir())


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_truncated_file_says_how_much_is_missing(path):
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InputError) as error:
        SafetensorsFile(path)
    assert f"truncated: its header says {size} bytes, the file has {size - 3}" in one_line(error)
    assert str(path) in str(error.value)


def header(content: bytes, data: bytes = b"") -> bytes:
    return len(content).to_bytes(8, "little") + content + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"abc", "has 3 bytes, too few"),
        (b"\xff" * 40, "not a safetensors file"),
        (header(b"{}")[:9], "truncated: its header alone needs 10 bytes, the file has 9"),
        (header(b"{nonsense}"), "header is damaged"),
        (header(b"[1, 2]"), "header is damaged"),
        (header(b'{"a": {"dtype": "F32", "shape": [2]}}'), "header is damaged"),
        (header(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', b"1234"), "header is damaged"),
        (header(b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}'), "header is damaged"),
        (header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', b"12345678"), "header is damaged"),
        (header(b'{"a": {"dtype": "F6_E3M2", "shape": [4], "data_offsets": [0, 3]}}', b"123"), "dtype F6_E3M2"),
        (header(b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}', b"12"), "too long: its header says"),
    ],
)
def test_damaged_files_are_named(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        SafetensorsFile(path)
    assert message in one_line(error)
    assert str(path) in str(error.value)


@pytest.fixture
def sharded(tmp_path):
    save_by_us(tmp_path, OURS, 100)
    return tmp_path


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(InputError) as error:
        open_safetensors_folder(sharded)
    assert "shard model-00002-of-00003.safetensors is missing" in one_line(error)


def test_shards_without_an_index(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    assert open_safetensors_folder(sharded).tensors.keys() == OURS.keys()
    (sharded / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(InputError) as error:
        open_safetensors_folder(sharded)
    assert "shard model-00003-of-00003.safetensors is missing" in one_line(error)


def test_a_tensor_in_two_shards(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    save(sharded / "another.safetensors", {"odd": np.ones(2, np.float32)})
    with pytest.raises(InputError) as error:
        open_safetensors_folder(sharded)
    assert "odd is twice" in one_line(error)
    assert "another.safetensors" in str(error.value)


def test_an_index_that_leaves_its_folder(sharded):
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"odd": "../secret.safetensors"}}))
    with pytest.raises(InputError, match="outside its folder"):
        open_safetensors_folder(sharded)
    index.write_text("{}")
    with pytest.raises(InputError, match="not a valid index"):
        open_safetensors_folder(sharded)


def test_an_empty_folder(tmp_path):
    with pytest.raises(InputError, match="holds no"):
        open_safetensors_folder(tmp_path)
