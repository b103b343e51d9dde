"""Clips of cameras: upright, in the shape they are shown in, and each frame at its time."""

from fractions import Fraction

import av
import numpy as np
import pytest

from wan_jax.errors import InputError
from wan_jax.media.frames import read_frames, resampled
from wan_jax.media.video import Video, read_video

GREYS = np.arange(12, dtype=np.uint8) * 20
CODECS = {".mp4": "libx264", ".mov": "libx264", ".mkv": "libx264", ".avi": "mpeg4", ".ts": "libx264"}
CODECS |= {".webm": "libvpx-vp9"}


def write(path, frames, times=None, *, tick=Fraction(1, 600), prepare=lambda stream: None, rate=30):
    """A file made with PyAV alone; `times` in seconds, by default one frame every 1 / rate."""
    times = [index / Fraction(rate) for index in range(len(frames))] if times is None else times
    with av.open(str(path), "w") as container:
        stream = container.add_stream(CODECS[path.suffix], rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        if path.suffix != ".avi":
            stream.codec_context.time_base = tick
        prepare(stream)
        for time, frame in zip(times, frames, strict=True):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.time_base = Fraction(1, rate) if path.suffix == ".avi" else tick
            picture.pts = round(time / picture.time_base)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def grey_frames(count=12, size=(48, 32)):
    return np.broadcast_to(GREYS[:count, None, None, None], (count, size[1], size[0], 3)).copy()


def numbers(frames):
    """Which of the greys each frame is."""
    return np.round(frames.mean(axis=(1, 2, 3)) / 20).astype(int).tolist()


# Of (x, y) to (a x + c y, b x + d y): a, b, c, d, and what NumPy does.
TURNS = {
    "upright": (1, 0, 0, 1, lambda x: x),
    "right": (0, 1, -1, 0, lambda x: np.rot90(x, -1)),
    "half": (-1, 0, 0, -1, lambda x: np.rot90(x, 2)),
    "left": (0, -1, 1, 0, lambda x: np.rot90(x, 1)),
    "mirrored": (-1, 0, 0, 1, lambda x: x[:, ::-1]),
    "upside down": (1, 0, 0, -1, lambda x: x[::-1]),
    "mirrored and left": (0, 1, 1, 0, lambda x: x.swapaxes(0, 1)),
    "mirrored and right": (0, -1, -1, 0, lambda x: np.rot90(x, 2).swapaxes(0, 1)),
}


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("ending", [".mp4", ".mov"])
def test_clips_are_upright(tmp_path, turn, ending):
    a, b, c, d, expected = TURNS[turn]
    scene = np.zeros((32, 48, 3), np.uint8)
    scene[:16, :24], scene[:16, 24:], scene[16:, :24] = (255, 255, 255), (200, 30, 30), (30, 30, 200)

    def prepare(stream):
        stream.set_display_matrix([a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30])

    file = write(tmp_path / f"a{ending}", [scene] * 3, prepare=prepare)
    for frames in (read_frames(file, 30), read_video(file).frames):
        assert frames[0].shape == expected(scene).shape
        assert np.abs(frames[0].astype(int) - expected(scene)).mean() < 6  # chroma at half the resolution


@pytest.mark.parametrize("ending", [".mp4", ".mov", ".mkv", ".webm", ".ts"])
def test_a_frame_belongs_to_its_time(tmp_path, ending):
    """Two frames a second, then thirty, then a pause."""
    times = [0, 0.5, 1.0, 1 + 1 / 30, 1 + 2 / 30, 1.1, 1 + 4 / 30, 2.0, 2.5, 2 + 16 / 30, 2 + 17 / 30, 2.6]
    tick = Fraction(1, 90_000)
    file = write(tmp_path / f"a{ending}", grey_frames(), times, tick=tick)
    for fps in (4, 10, 16):
        expected = [
            max(i for i, time in enumerate(times) if time <= k / fps + 0.1 / fps) for k in range(int(2.6 * fps))
        ]
        assert numbers(read_frames(file, fps))[: len(expected)] == expected
    video = read_video(file)
    assert len(video.frames) / video.fps == pytest.approx(2.65, abs=0.3)


@pytest.mark.parametrize("ending", [".mp4", ".mkv", ".webm", ".avi", ".ts", ".mov"])
def test_a_constant_rate_is_left_alone(tmp_path, ending):
    """Times in files are rounded, to milliseconds in Matroska, and need not begin at 0."""
    file = write(tmp_path / f"a{ending}", grey_frames())
    assert numbers(read_frames(file, 30)) == list(range(12))
    assert numbers(read_frames(file, 15)) == list(range(0, 12, 2))
    assert numbers(read_frames(file, 60, 5)) == [0, 0, 1, 1, 2]
    video = read_video(file)
    assert (numbers(video.frames), video.fps) == (list(range(12)), 30)


def test_jitter_drops_no_frame(tmp_path):
    jitter = np.random.default_rng(0).uniform(-0.002, 0.002, 12)
    file = write(tmp_path / "a.mp4", grey_frames(), [5 + i / 30 + jitter[i] for i in range(12)])
    assert numbers(read_frames(file, 30)) == list(range(12))


def test_times_that_go_back_and_sizes_that_change(tmp_path):
    """Files of two streams, one behind the other."""
    first = write(tmp_path / "a.ts", grey_frames(6), tick=Fraction(1, 90_000)).read_bytes()
    second = write(tmp_path / "b.ts", grey_frames(6, size=(96, 64)), tick=Fraction(1, 90_000)).read_bytes()
    (tmp_path / "c.ts").write_bytes(first + second)
    video = read_video(tmp_path / "c.ts")
    assert video.frames.shape == (12, 32, 48, 3)
    assert numbers(video.frames) == [0, 1, 2, 3, 4, 5] * 2


def test_frames_that_show_at_each_time():
    assert list(resampled([(1, "a"), (2, "b"), (4, "c")], 1)) == ["a", "b", "c", "c"]
    assert list(resampled([(0.5, "a"), (1, "b")], 0.5)) == ["a"]
    assert list(resampled([], 16)) == []


def test_pixels_are_square(tmp_path):
    """An anamorphic clip, 40x32 stored and 64x32 shown."""

    def prepare(stream):
        stream.codec_context.sample_aspect_ratio = Fraction(8, 5)

    file = write(tmp_path / "a.mp4", grey_frames(size=(40, 32)), prepare=prepare)
    assert read_frames(file, 30).shape == (12, 32, 64, 3)


def test_hd_without_tags_is_read_as_players_do(tmp_path):
    red = np.zeros((720, 1280, 3), np.uint8) + np.array([200, 30, 30], np.uint8)
    picture = av.VideoFrame.from_ndarray(red, format="rgb24").reformat(format="yuv420p", dst_colorspace=1)
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.height, stream.width, stream.pix_fmt = 720, 1280, "yuv420p"
        picture.colorspace, picture.color_range = 2, 0
        container.mux(stream.encode(picture))
        container.mux(stream.encode())
    assert np.abs(read_video(tmp_path / "a.mp4").frames.astype(int) - red).max() <= 3


def test_sound_alone_is_no_video(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44_100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44_100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(InputError, match=r"a\.mp4 cannot be read as a video \(it has no pictures\)"):
        read_frames(tmp_path / "a.mp4", 16)


@pytest.mark.parametrize("data", [b"", b"text", b"\0" * 1000, b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0AVI "])
def test_what_is_no_video(tmp_path, data):
    (tmp_path / "a.mp4").write_bytes(data)
    for read in (read_video, lambda path: read_frames(path, 16)):
        with pytest.raises(InputError, match=r"a\.mp4 cannot be read as a video"):
            read(tmp_path / "a.mp4")


def test_a_gif_of_ours_keeps_its_rate(tmp_path):
    (file,) = Video(grey_frames(), fps=16).save(tmp_path / "a.gif")
    assert numbers(read_frames(file, 16)) == list(range(12))
    assert read_video(file).fps == 16
