"""The readers of files of weights on hostile files: InputError in one line, or tensors; never much memory or time.

Seconds by default; `pytest -m nightly` tries for minutes.
"""

import io
import json
import pickle
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.checkpoint.trees import archive, save, save_pickle
from wan_jax.checkpoint.formats.safetensors import DTYPES, SafetensorsFile, open_safetensors_folder
from wan_jax.checkpoint.formats.torch_pickle import TorchPickleFile
from wan_jax.errors import InputError

SECONDS = 5  # of one file of a few kilobytes: some hundredths on a quiet machine
MEMORY = 4 << 20  # and what Python's allocators may give for it
STATE = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones(5, np.float16)}


EXAMPLES = pytest.mark.parametrize(
    "examples", [pytest.param(100, marks=pytest.mark.quick), pytest.param(5_000, marks=pytest.mark.nightly)]
)


def search(examples: int, check, **inputs) -> None:
    """Calls `check` with that many random inputs; the brief search tries the same ones each time."""
    quiet = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}
    settings(max_examples=examples, derandomize=examples < 1000, **quiet)(given(**inputs)(check))()


def read_all(reader, path, content: bytes) -> dict[str, np.ndarray] | None:
    """The tensors of a file with that content, or None where it is refused as users should see it."""
    path.write_bytes(content)
    return opened(lambda: reader(path), len(content))


def opened(open_store, nbytes: int) -> dict[str, np.ndarray] | None:
    start = time.perf_counter()
    tracemalloc.start()
    try:
        store = open_store()
        tensors = {name: store.read(name) for name in store.tensors}
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 100 * nbytes
        message = ""
    except InputError as error:
        tensors, message = None, str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert message.isprintable()  # one line
    assert len(message) < 2100
    assert peak < MEMORY + 200 * nbytes
    assert time.perf_counter() - start < SECONDS
    return tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def good(folder) -> dict[str, bytes]:
    save(folder / "good.safetensors", STATE)
    save_pickle(folder / "good.pth", STATE)
    return {name: (folder / f"good.{name}").read_bytes() for name in ("safetensors", "pth")}


READERS = {"safetensors": SafetensorsFile, "pth": TorchPickleFile}
CHANGES = st.lists(
    st.tuples(st.sampled_from(["flip", "cut", "insert", "end"]), st.integers(0, 2**31), st.binary(max_size=9)),
    min_size=1,
    max_size=4,
)


def damaged(content: bytes, changes) -> bytes:
    for kind, position, data in changes:
        at = position % (len(content) + 1)
        match kind:
            case "flip":
                content = content[:at] + data + content[at + len(data) :]
            case "cut":
                content = content[:at] + content[at + len(data) :]
            case "insert":
                content = content[:at] + data + content[at:]
            case "end":
                content = content[:at]
    return content


@EXAMPLES
@pytest.mark.parametrize("kind", READERS)
def test_damaged_files(folder, good, kind, examples):
    def check(changes):
        read_all(READERS[kind], folder / f"damaged.{kind}", damaged(good[kind], changes))

    search(examples, check, changes=CHANGES)


NUMBERS = st.one_of(
    st.integers(-2, 20), st.sampled_from([2**31, 2**63, 2**64, -(2**63), 10**400]), st.floats(), st.booleans()
)
JSON = st.recursive(
    st.one_of(st.none(), NUMBERS, st.text(max_size=5), st.sampled_from(sorted(DTYPES))),
    lambda values: st.one_of(st.lists(values, max_size=4), st.dictionaries(st.text(max_size=5), values, max_size=4)),
    max_leaves=8,
)
ENTRIES = st.one_of(
    JSON,
    st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.one_of(st.sampled_from(sorted(DTYPES)), JSON),
            "shape": st.one_of(st.lists(st.integers(0, 3), max_size=3), st.lists(NUMBERS, max_size=3), JSON),
            "data_offsets": st.one_of(st.lists(st.integers(0, 24), min_size=2, max_size=2), st.lists(NUMBERS), JSON),
        },
    ),
)


HEADERS = st.dictionaries(st.one_of(st.text(max_size=3), st.just("__metadata__")), ENTRIES)


@EXAMPLES
def test_safetensors_headers(folder, examples):
    def check(content, data):
        read_all(SafetensorsFile, folder / "header.safetensors", header(json.dumps(content)) + bytes(data))

    search(examples, check, content=HEADERS, data=st.integers(0, 24))


INDICES = st.one_of(JSON, st.fixed_dictionaries({"weight_map": st.dictionaries(st.text(max_size=3), JSON, min_size=1)}))


@EXAMPLES
def test_indices_of_shards(tmp_path, examples):
    path = tmp_path / "model.safetensors.index.json"

    def check(index):
        path.write_text(json.dumps(index))
        assert opened(lambda: open_safetensors_folder(tmp_path), path.stat().st_size) is None

    search(examples, check, index=INDICES)


def header(content: str) -> bytes:
    return len(content.encode()).to_bytes(8, "little") + content.encode()


def text(value: str) -> bytes:
    return pickle.BINUNICODE + len(value.encode()).to_bytes(4, "little") + value.encode()


# What a pickle of tensors is made of, in any order, and what it is not.
PIECES = st.one_of(
    st.sampled_from(
        [
            *(
                b"\x80\x02",
                b"(",
                b")",
                b"]",
                b"}",
                b"N",
                b"\x88",
                b"\x89",
                b"K\x01",
                b"K\x00",
                b"M\xff\xff",
                b"J\xff\xff\xff\xff",
            ),
            *(b"\x85", b"\x86", b"\x87", b"t", b"s", b"u", b"a", b"e", b"b", b"R", b"Q", b"\x94", b"q\x00", b"h\x00"),
            *(b"q\x01", b"h\x01", b"r\xff\xff\xff\x7f", b"j\xff\xff\xff\x7f", b"\x93", b"0", b"2", b"."),
            *(
                b"\x8b\x08\0\0\0" + b"\xff" * 8,
                b"\x8e" + b"\xff" * 8,
                b"\x8d" + b"\xff" * 7 + b"\x7f",
                b"\x95" + b"\xff" * 8,
            ),
            *(b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n", b"ccollections\nOrderedDict\n"),
            *(b"ctorch\nSize\n", b"cposix\nsystem\n", text("storage"), text("0"), text("cpu"), text("a")),
        ]
    ),
    st.binary(max_size=4),
)


@EXAMPLES
def test_pickles(folder, good, examples):
    """Pieces alone, or within a good pickle."""
    path = folder / "pickle.pth"
    with zipfile.ZipFile(io.BytesIO(good["pth"])) as file:
        pickled = file.read("archive/data.pkl")

    def check(pieces, at, replaced):
        at = at % len(pickled)
        content = b"".join([pickled[:at], *pieces, pickled[at + replaced :]] if replaced else [*pieces, b"."])
        archive(path, content, {"0": bytes(48), "1": bytes(10)})
        opened(lambda: TorchPickleFile(path), path.stat().st_size)

    search(examples, check, pieces=st.lists(PIECES, max_size=40), at=st.integers(0, 1000), replaced=st.integers(0, 3))


# Found by hand: each took gigabytes, hours or a traceback.

NESTED = text("a") + b"\x85" + (b"q\x00h\x00\x86" * 60)  # a tuple of a tuple of ..., twice each: 2^60 leaves


@pytest.mark.quick
@pytest.mark.parametrize(
    "pickled",
    [
        pytest.param(b"\x80\x02}r\xff\xff\xff\x1f.", id="an index of the memo for 6 GiB"),
        pytest.param(b"\x80\x02}" + NESTED + b"K\x01s.", id="a key whose hash takes for ever"),
        pytest.param(b"\x80\x02ctorch\nSize\n" + NESTED + b"\x93.", id="a name whose hash takes for ever"),
        pytest.param(b"\x80\x02(" + text("storage") + NESTED + b"K\x01K\x01K\x01tQ.", id="a type whose hash does"),
        pytest.param(b"\x80\x02(" + NESTED + b"K\x01K\x01K\x01K\x01tQ.", id="a kind whose text does"),
        pytest.param(b"\x80\x02}(" + text("a") + NESTED + b"u.", id="a value whose text does"),
        pytest.param(b"\x80\x04\x8e" + (2**33).to_bytes(8, "little") + b".", id="bytes of 8 GiB"),
        pytest.param(b"\x80\x05\x96" + (2**33).to_bytes(8, "little") + b".", id="a bytearray of 8 GiB"),
        pytest.param(b"\x80\x02]" + b"\x85" * 100_000 + b".", id="100,000 tuples in each other"),
        pytest.param(
            b"\x80\x02(" + b"K\x01" * 10_000 + b"tq\x00" + b"ctorch\nSize\nh\x00\x85R" * 3000 + b".", id="copies"
        ),
        pytest.param(b"\x80\x02}\x8b\xff\xff\0\0" + b"\x7f" * 65535 + b"K\x01s.", id="a number as key"),
        pytest.param(b"\x80\x02}" + text("a\n\x1b[31m" * 9999) + b"K\x01s.", id="a long name with escapes"),
    ],
)
def test_pickles_that_want_too_much(tmp_path, pickled):
    path = tmp_path / "model.pth"
    archive(path, pickled, {"0": bytes(16)})
    assert not opened(lambda: TorchPickleFile(path), path.stat().st_size)


@pytest.mark.quick
@pytest.mark.parametrize("shape", [(10**9,), (2**40, 2**40), (2,) * 100])
def test_a_tensor_larger_than_its_storage(tmp_path, shape):
    """Strides of zero repeat a few bytes for ever."""
    from tests.checkpoint.test_torch_pickle import FLOATS, described

    path = tmp_path / "model.pth"
    archive(path, described(FLOATS, 0, shape, (0,) * len(shape)), {"0": bytes(16)})
    assert opened(lambda: TorchPickleFile(path), path.stat().st_size) is None


@pytest.mark.quick
@pytest.mark.parametrize("change", ["zlib", "unknown", "encrypted", "byteorder", "time"])
def test_archives_that_zipfile_does_not_like(tmp_path, change):
    path = tmp_path / "model.pth"
    save_pickle(path, STATE)
    if change == "byteorder":  # 64 MiB of zeros in 64 kB
        with zipfile.ZipFile(path) as file:
            members = {entry.filename: file.read(entry) for entry in file.infolist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for name, content in members.items():
                file.writestr(
                    name,
                    bytes(64 << 20) if name.endswith("byteorder") else content,
                    zipfile.ZIP_STORED if not name.endswith("byteorder") else None,
                )
    else:
        content = bytearray(path.read_bytes())
        entry = content.index(b"PK\x01\x02")  # of data.pkl in the directory
        for start, version in ((entry, 2), (0, 0)):
            if change == "encrypted":
                content[start + 6 + version] |= 1
            elif change == "time":
                content[start + 10 + version : start + 14 + version] = b"\xff" * 4
            else:
                content[start + 8 + version] = 8 if change == "zlib" else 77
        path.write_bytes(content)
    tensors = opened(lambda: TorchPickleFile(path), path.stat().st_size)
    assert (tensors is None) == (change != "time")


ONE = '"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}'


@pytest.mark.quick
@pytest.mark.parametrize(
    "content",
    [
        pytest.param(header("[" * 100_000), id="nesting"),
        pytest.param(header('{"a":' * 100_000), id="nesting of objects"),
        pytest.param(
            header('{"a": {"dtype": "U8", "shape": [Infinity], "data_offsets": [0, 1]}}') + b"1", id="infinity"
        ),
        pytest.param(header('{"a": {"dtype": "U8", "shape": [1e999], "data_offsets": [0, 1]}}') + b"1", id="1e999"),
        pytest.param(header('{"a": {"dtype": "U8", "shape": [true], "data_offsets": [0, 1]}}') + b"1", id="a boolean"),
        pytest.param(header('{"a": {"dtype": "U8", "shape": [1.5], "data_offsets": [0, 1]}}') + b"1", id="a fraction"),
        pytest.param(header('{"a": {"dtype": "U8", "shape": "1", "data_offsets": [0, 1]}}') + b"1", id="a text"),
        pytest.param(header('{"a": {"dtype": ["U8"], "shape": [1], "data_offsets": [0, 1]}}') + b"1", id="a list"),
        pytest.param(header('{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]}}') + b"1", id="3 offsets"),
        pytest.param(header(f"{{{ONE}, {ONE}}}") + b"1", id="the same name twice"),
        pytest.param(header(f"{{{ONE}, {ONE.replace('a', 'b', 1)}}}") + b"1", id="the same bytes twice"),
        pytest.param(header('{"a": {"dtype": "U8", "shape": [1], "data_offsets": [-1, 0]}}') + b"1", id="before"),
        pytest.param(header(f'{{"__metadata__": {{"k": [1]}}, {ONE}}}') + b"1", id="metadata that are no texts"),
        pytest.param(header(f'{{"__metadata__": [1], {ONE}}}') + b"1", id="metadata that are a list"),
        pytest.param(
            header("{" + ONE.replace("[1]", f"[{','.join(['9' * 4000] * 999)}]") + "}") + b"1",
            id="a product of a million digits",
        ),
        pytest.param(header('{"a\\n\\u001b[31m": 1}'), id="a name with escapes"),
        pytest.param(header("{" + ONE.replace("a", "\\ud800", 1) + "}"), id="half a character"),
        pytest.param((2).to_bytes(8, "little") + b"\xff\xfe", id="no UTF-8"),
    ],
)
def test_safetensors_headers_that_lie(tmp_path, content):
    assert read_all(SafetensorsFile, tmp_path / "model.safetensors", content) is None
