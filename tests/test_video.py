"""Files: what is written can be read back, and a failed write leaves nothing."""

import json

import numpy as np
import pytest
from PIL import Image

from wan_jax import video as video_module
from wan_jax.errors import InputError
from wan_jax.video import Video, read_video, save_array

METADATA = {"prompt": "一只猫，白色", "seed": 3}  # noqa: RUF001


@pytest.fixture
def video() -> Video:
    """Smooth moving colours: content that H.264 keeps."""
    frame, row, column = np.meshgrid(np.arange(9), np.arange(32), np.arange(48), indexing="ij")
    frames = np.stack([row * 4 + frame * 8, column * 4, 255 - row * 3 - frame * 4], axis=-1) % 256
    return Video(frames=frames.astype(np.uint8), fps=16, metadata=METADATA)


def test_mp4_round_trip(video, tmp_path):
    assert video.save(tmp_path / "a.mp4") == [tmp_path / "a.mp4"]
    again = read_video(tmp_path / "a.mp4")
    assert again.frames.shape == video.frames.shape
    assert again.fps == 16
    assert again.metadata == METADATA
    # CRF 10 in 4:2:0: a few levels on smooth content (measured 1.0).
    assert np.abs(again.frames.astype(int) - video.frames).mean() < 3
    assert list(tmp_path.iterdir()) == [tmp_path / "a.mp4"]


def test_mp4_is_h264_at_the_official_quality(video, tmp_path):
    video.save(tmp_path / "a.mp4")
    data = (tmp_path / "a.mp4").read_bytes()
    assert b"avc1" in data
    assert b"crf=10.0" in data  # x264 writes its settings into the stream


def test_gif_keeps_length(video, tmp_path):
    video.save(tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 9
        assert json.loads(image.info["comment"].decode()) == METADATA
        total = 0
        for index in range(image.n_frames):
            image.seek(index)
            total += image.info["duration"]
    assert total == pytest.approx(1000 * 9 / 16, abs=10)


def test_png_frames(video, tmp_path):
    files = video.save(tmp_path / "a.png")
    assert [file.name for file in files] == [f"a-{index:04d}.png" for index in range(9)]
    for file, frame in zip(files, video.frames, strict=True):
        with Image.open(file) as image:
            np.testing.assert_array_equal(np.asarray(image), frame)
            assert json.loads(image.text["Description"]) == METADATA
    assert len(list(tmp_path.iterdir())) == 9


@pytest.mark.parametrize(("name", "message"), [("a.avi", "unknown ending '.avi'"), ("no/a.mp4", "does not exist")])
def test_bad_output(video, tmp_path, name, message):
    with pytest.raises(InputError, match=message):
        video.save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", ["mp4", "gif", "png"])
def test_interrupted_save_keeps_the_old_file(video, tmp_path, monkeypatch, ending):
    target = tmp_path / f"a.{ending}"
    target.write_bytes(b"old")

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(video_module.os, "umask", interrupt)
    monkeypatch.setattr(Image.Image, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        video.save(target)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_save_array(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    save_array(tmp_path / "x.npy", array)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), array)
    assert list(tmp_path.iterdir()) == [tmp_path / "x.npy"]
