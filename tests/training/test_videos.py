"""Folders of videos: metadata, rates, buckets, and the messages about those that cannot be used."""

import numpy as np
import pytest

from wan_jax.errors import InputError
from wan_jax.media.frames import read_frames
from wan_jax.media.video import Video
from wan_jax.testing.models import DEMO
from wan_jax.training.videos import (
    Bucket,
    choose_bucket,
    fit_to_bucket,
    parse_buckets,
    read_metadata,
)


def test_metadata(tmp_path):
    lines = ['{"file_name": "a.mp4", "caption": "一"}', "", '{"video": "b/c.mp4", "text": ""}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    first, second = read_metadata(tmp_path)
    assert (first.file, first.caption) == (tmp_path / "a.mp4", "一")
    assert (second.file, second.caption) == (tmp_path / "b" / "c.mp4", "")
    table = tmp_path / "table.csv"
    table.write_text('file_name,size,prompt\na.mp4,3,"one, two"\n')
    (only,) = read_metadata(tmp_path, table)
    assert only.caption == "one, two"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.jsonl", '{"file_name": "a.mp4"}\n', "line 1.*caption"),
        ("metadata.jsonl", '{"file_name": "a.mp4", "text": 3}\n', "line 1.*caption"),
        ("metadata.jsonl", '["a.mp4", "b"]\n', "line 1.*file_name"),
        ("metadata.jsonl", '{"file_name": "a.mp4", "text": "b"}\n{oh\n', "line 2: not JSON"),
        ("metadata.csv", "file,caption\na,b\n", "line 2.*file_name"),
        ("captions.txt", "", "neither metadata.jsonl"),
    ],
)
def test_bad_metadata(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read_metadata(tmp_path)


ROWS = {
    "metadata.jsonl": (
        '{"file_name": "a.mp4", "caption": "one\\ntwo \\" \\u2028\u2028 \x85 end"}\r\n\n'
        ' {"caption": "", "file_name": "b c.mp4", "size": [1, 2]} ',
        [("a.mp4", 'one\ntwo " \u2028\u2028 \x85 end'), ("b c.mp4", "")],
    ),
    "metadata.csv": (
        '\ufefffile_name,caption\r\na.mp4,"one\r\ntwo ""x"", three"\r\n\r\n"b,c.mp4",\u2028 five " six\r\n',
        [("a.mp4", 'one\r\ntwo "x", three'), ("b,c.mp4", '\u2028 five " six')],
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_any_valid_line_is_kept_as_it_is(name, tmp_path):
    """Line breaks inside quotes, the separators of Unicode, quotes and commas."""
    text, expected = ROWS[name]
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert [(example.file.name, example.caption) for example in read_metadata(tmp_path)] == expected


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("metadata.csv", b"file_name,caption\na.mp4,a, red, circle\n", "line 2: 4 cells; the header has 2"),
        ("metadata.csv", b"file_name,caption\na.mp4\n", "line 2: 1 cells"),
        ("metadata.csv", b'file_name,caption\na.mp4,"open\nb.mp4,b\nc.mp4,c\n', "line 2: not CSV"),
        ("metadata.csv", b'file_name,caption\na.mp4,"x" y\n', "line 2: not CSV"),
        ("metadata.csv", b"file_name;caption\na.mp4;b\n", "line 2: has no text under file_name or video"),
        ("metadata.csv", b"file_name,caption,caption\na.mp4,b,c\n", "line 1: key 'caption' is there twice"),
        ("metadata.csv", b"file_name,caption\n", "is empty"),
        ("metadata.csv", b"", "is empty"),
        ("metadata.csv", b"file_name,caption\n,b\n", "line 2: names no file"),
        ("metadata.csv", "file_name,caption\na.mp4,caf\xe9\n".encode("cp1252"), r"Windows-1252 or another \(byte 0xe9"),
        ("metadata.csv", "file_name,caption\na.mp4,b\n".encode("utf-16"), "not UTF-8 text but UTF-16"),
        ("metadata.csv", "file_name,caption\na.mp4,b\n".encode("utf-16-le"), "not UTF-8 text but UTF-16"),
        ("metadata.jsonl", '{"file_name": "a.mp4", "caption": "b"}'.encode("utf-32"), "not UTF-8 text but UTF-32"),
        ("metadata.jsonl", b'{"file_name": "a.mp4", "caption": "b", "caption": "c"}', "line 1: key 'caption' is there"),
        ("metadata.jsonl", b'{"file_name": "a.mp4", "caption": "b"} {"x": 1}', "line 1: not JSON"),
        ("metadata.jsonl", b'{"file_name": "a.mp4", "caption": "b", "x": NaN}', "line 1: not JSON"),
        ("metadata.jsonl", b'{"file_name": "a.mp4",\n"caption": "b"}', "line 1: not JSON"),
        ("metadata.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("metadata.jsonl", b'{"file_name": "a\\u0000.mp4", "caption": "b"}', "line 1: names no file"),
        ("metadata.jsonl", b'{"file_name": null, "caption": "b"}', "line 1: has no text under file_name"),
    ],
)
def test_what_is_no_row_is_said_with_its_line(name, data, message, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message) as error:
        read_metadata(tmp_path)
    assert "\n" not in str(error.value)


def test_two_metadata_files_or_one_that_is_missing(tmp_path):
    for name in ("metadata.jsonl", "metadata.csv"):
        (tmp_path / name).write_text("")
    with pytest.raises(InputError, match="has both of"):
        read_metadata(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        read_metadata(tmp_path, tmp_path / "other.csv")


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """Twelve frames, each of its own grey, at 24 frames a second."""
    path = tmp_path_factory.mktemp("videos") / "grey.mp4"
    greys = np.arange(12, dtype=np.uint8) * 20
    Video(np.broadcast_to(greys[:, None, None, None], (12, 32, 48, 3)).copy(), fps=24).save(path)
    return path


@pytest.mark.parametrize(
    ("fps", "longest", "expected"),
    [
        (24, 99, range(12)),
        (24, 5, range(5)),
        (12, 99, range(0, 12, 2)),
        (16, 99, [0, 1, 3, 4, 6, 7, 9, 10]),  # the frame that shows at k / 16 s
        (48, 7, [0, 0, 1, 1, 2, 2, 3]),
    ],
)
def test_rates(video, fps, longest, expected):
    frames = read_frames(video, fps, longest)
    assert frames.shape[1:] == (32, 48, 3)
    np.testing.assert_array_equal(np.round(frames.mean(axis=(1, 2, 3)) / 20), list(expected))


def test_what_is_no_video(tmp_path, video):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(video.read_bytes()[:300])
    with pytest.raises(InputError, match=r"broken\.mp4 cannot be read as a video"):
        read_frames(broken, 16, 5)
    with pytest.raises(InputError, match=r"none\.mp4 does not exist"):
        read_frames(tmp_path / "none.mp4", 16, 5)


def test_buckets():
    buckets = parse_buckets("96x64x17, 64x96x17,96x64x5", DEMO)
    assert buckets[1] == Bucket(64, 96, 17)
    for shape, chosen in {(20, 70, 100): 0, (17, 100, 70): 1, (16, 70, 100): 2, (5, 100, 70): 2}.items():
        assert choose_bucket(np.zeros((*shape, 3), np.uint8), buckets) == buckets[chosen]
    with pytest.raises(InputError, match="has 4 frames"):
        choose_bucket(np.zeros((4, 70, 100, 3), np.uint8), buckets)
    frames = np.zeros((20, 70, 100, 3), np.uint8)
    frames[:, :, 50] = 255
    fitted = fit_to_bucket(frames, buckets[0])
    assert fitted.shape == (17, 64, 96, 3)
    assert fitted[0, 32].mean(-1).argmax() in (47, 48)  # the middle stays the middle


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("96x64", "write WIDTHxHEIGHTxFRAMES"),
        ("100x64x17", "bucket 100x64x17.*16"),
        ("96x64x16", r"bucket 96x64x16: frames must be 4n \+ 1"),
        ("0x64x17", "must be multiples"),
    ],
)
def test_bad_buckets(text, message):
    with pytest.raises(InputError, match=message):
        parse_buckets(text, DEMO)
