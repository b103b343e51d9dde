"""What is written: checked before work, never in place of a user's other files, and kept when anything goes wrong."""

import json
import os
import pathlib
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest

from wan_jax import WanPipeline, read_video
from wan_jax.cli.main import main
from wan_jax.errors import InputError, OutputError
from wan_jax.media.video import Video, VideoWriter
from wan_jax.runtime.files import PREFIX, check_writable, hidden, keep_array, save_array, written_whole

SMALL = ["--size", "48x32", "--frames", "5", "--steps", "2", "--dtype", "float32", "--quiet"]
SHAPE = (16, 2, 4, 6)


@pytest.fixture
def generate(diffusers_tree, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> int:
        return main(["generate", "--checkpoint", str(diffusers_tree), *SMALL, *arguments])

    return run


@pytest.fixture
def nothing_loads(monkeypatch):
    """Fails a test that comes as far as loading weights."""
    monkeypatch.setattr(WanPipeline, "from_checkpoint", None)


def names(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", [KeyboardInterrupt, signal.SIGTERM, signal.SIGHUP, OutputError("the disk is full")])
def test_a_run_that_ends_after_denoising_keeps_the_latents(
    kind, generate, diffusers_tree, tmp_path, monkeypatch, capsys
):
    np.save(tmp_path / "out.latents.npy", np.zeros(3))

    def stop(*args, **kwargs):
        if isinstance(kind, signal.Signals):
            os.kill(os.getpid(), kind)
            signal.pause()
        raise kind

    with monkeypatch.context() as patch:
        patch.setattr(VideoWriter, "write", stop)
        code = generate("a red circle", "--output", "a name.mp4")
    assert code == {signal.SIGTERM: 143, signal.SIGHUP: 129, KeyboardInterrupt: 130}.get(kind, 1)
    (line,) = capsys.readouterr().err.splitlines()
    (kept,) = tmp_path.glob("a name-*.latents.npy")
    assert f"wan-jax decode '{kept.name}' --output 'a name.mp4'" in line
    assert names(tmp_path) == [kept.name, "out.latents.npy"]

    with monkeypatch.context() as patch:  # the VAE is all that decoding needs
        patch.setattr(WanPipeline, "from_checkpoint", None)
        arguments = ["decode", kept.name, "--checkpoint", str(diffusers_tree), "--output", "b.png", "--quiet"]
        assert main(arguments) == 0
    assert generate("a red circle", "--output", "a.png") == 0
    for index in range(5):
        frames = [read_video(tmp_path / f"{name}-{index:04d}.png").frames for name in "ab"]
        np.testing.assert_array_equal(*frames)


def test_a_users_files_are_not_touched(generate, tmp_path, capsys):
    start = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    np.save("out.latents.npy", start)
    before = pathlib.Path("out.latents.npy").read_bytes()
    assert generate("a", "--initial-latents", "out.latents.npy") == 0
    assert pathlib.Path("out.latents.npy").read_bytes() == before
    for name in ("--save-latents", "--save-frames"):
        capsys.readouterr()
        assert generate("a", "--initial-latents", "out.latents.npy", name, "./out.latents.npy") == 2
        assert "initial latents" in capsys.readouterr().err
    assert generate("a", "--save-latents", "x.npy", "--save-frames", "x.npy") == 2
    assert pathlib.Path("out.latents.npy").read_bytes() == before
    assert names(tmp_path) == ["out.latents.npy", "out.mp4"]


def test_overwriting_is_said(generate, capsys):
    loud = [argument for argument in SMALL if argument != "--quiet"]
    pathlib.Path("out.gif").write_bytes(b"before")
    assert generate("a", "--output", "out.gif") == 0
    assert main(["generate", "a", "--output", "out.gif", *loud]) == 0
    assert "out.gif is overwritten" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["a", "--output", "/proc/out.mp4"], "/proc/out.mp4"),
        (["a", "--output", "/proc/out.png"], "/proc/out"),
        (["a", "--output", "folder.mp4"], "folder.mp4 is a folder"),
        (["a", "--output", "字" * 84 + ".mp4"], "name"),
        (["a", "--output", "x" * 251 + ".png"], "name"),
        (["a", "--output", "file/out.mp4"], "folder file"),
        (["a", "--output", "loop/out.mp4"], "loop"),
        (["a", "--save-latents", "/proc/x.npy"], "--save-latents"),
        (["a", "--save-frames", "nowhere/x.npy"], "--save-frames"),
        (["a red \udcff circle"], "prompt"),
        (["a", "--negative-prompt", "\udcff"], "negative_prompt"),
        ([""], "prompt"),
        ([" \n"], "prompt"),
        (["a", "--seed", str(2**64)], "seed"),
        (["a", "--seed", "-1"], "seed"),
        (["a", "--steps", "100000000"], "steps"),
        (["a", "--steps", "9" * 30], "steps"),
        (["a", "--frames", "9" * 5000], "frames"),
        (["a", "--size", "9" * 5000 + "x16"], "size"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_what_cannot_be_written_or_made_is_said_first(arguments, what, generate, nothing_loads, tmp_path, capsys):
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    before = names(tmp_path)
    assert generate(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert what in line
    assert names(tmp_path) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--prompts", "nul-output.jsonl"],
        ["generate", "--prompts", "nul-latents.jsonl"],
        ["demo", "file"],
        ["demo", "/proc/x"],
        ["evaluate", "--one", "1", "--report", "nowhere/x.json"],
        ["evaluate", "--one", "1", "--sheet", "x.foo"],
        ["evaluate", "--one", "1", "--batch", "0"],
        ["evaluate", "--one", "1", "--compare", "foo"],
        ["evaluate", "--one", "1", "--compare", "steps=x"],
        ["evaluate", "--one", "1", "--compare", "size=50x32"],
        ["bench", "denoiser", "--preset", "demo", "--plot", "x.foo"],
        ["bench", "vae", "--preset", "demo", "--output", "folder"],
        ["bench", "mesh", "--preset", "demo", "--output", "/proc/x.json"],
    ],
    ids=" ".join,
)
def test_other_commands_check_first(arguments, nothing_loads, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "nul-output.jsonl").write_text('{"prompt": "a", "output": "a\\u0000.mp4"}')
    (tmp_path / "nul-latents.jsonl").write_text('{"prompt": "a", "save_latents": "a\\u0000.npy"}')
    assert main(arguments) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.quick
def test_the_longest_name_that_a_file_can_have(tmp_path):
    video = Video(np.zeros((2, 16, 16, 3), np.uint8))
    for ending in ("mp4", "gif", "webm", "png"):
        room = 255 - len(ending) - 1 - (5 if ending == "png" else 0)
        name = "字" * (room // 3) + "x" * (room % 3)
        for file in video.save(tmp_path / f"{name}.{ending}"):
            assert file.stat().st_size
            assert len(os.fsencode(file.name)) == 255
    kept = keep_array(tmp_path / ("字" * 83 + ".mp4"), np.zeros(3))
    assert kept.parent == tmp_path


@pytest.mark.quick
def test_files_of_dead_runs_are_removed(tmp_path):
    program = (
        "import os, pathlib, signal\n"
        "from wan_jax.runtime.files import hidden\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "with hidden(folder / 'a.mp4') as file, hidden(folder / 'a.png', is_folder=True) as frames:\n"
        "    file.write_bytes(b'half'); (frames / '1.png').touch()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGKILL
    assert all(name.startswith(PREFIX) for name in names(tmp_path))
    assert len(names(tmp_path)) == 2
    with hidden(tmp_path / "live.mp4") as live:
        check_writable(tmp_path / "b.mp4")
        assert names(tmp_path) == [live.name]
    assert names(tmp_path) == []


@pytest.fixture
def full_disk():
    """Files cannot grow beyond some bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.quick
@pytest.mark.parametrize("ending", ["mp4", "mov", "webm", "gif", "png"])
def test_a_full_disk(ending, tmp_path, full_disk):
    frames = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), np.uint8)
    full_disk(2000)
    with pytest.raises(OutputError, match=f"v.{ending}") as error:
        Video(frames).save(tmp_path / f"v.{ending}")
    assert "\n" not in str(error.value)
    assert names(tmp_path) == []
    with pytest.raises(OutputError, match="could not be written"):
        save_array(tmp_path / "x.npy", frames)
    assert names(tmp_path) == []


def test_latents_go_elsewhere_when_their_disk_is_full(generate, tmp_path, monkeypatch, capsys):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))

    def save(path, *content):
        if path != "x.npy" and pathlib.Path(path).parent == elsewhere:
            return save_array(path, *content)
        raise OutputError(f"{path} could not be written (the disk is full)")

    monkeypatch.setattr("wan_jax.runtime.files.save_array", save)
    assert generate("a", "--save-latents", "x.npy") == 1
    (line,) = capsys.readouterr().err.splitlines()
    (kept,) = elsewhere.iterdir()
    assert "x.npy could not be written" in line
    assert str(kept) in line
    assert read_video("out.mp4").frames.shape[0] == 5  # the video could be written


def test_two_runs_with_one_output(diffusers_tree, tmp_path):
    program = "import sys; from wan_jax.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "generate", "a", "--checkpoint", str(diffusers_tree), *SMALL]
    runs = [subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE) for _ in range(2)]
    assert [(run.communicate()[1], run.returncode) for run in runs] == [(b"", 0), (b"", 0)]
    assert names(tmp_path) == ["out.mp4"]


def test_a_batch_takes_nothing_else_for_finished(generate, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a\nb\nc\n")
    (tmp_path / "out-1.mp4").touch()
    Video(np.zeros((5, 32, 48, 3), np.uint8)).save("out-2.mp4")
    before = (tmp_path / "out-2.mp4").read_bytes()
    assert generate("--prompts", "p.txt", "--json") == 1
    out, errors = capsys.readouterr()
    assert [video["status"] for video in json.loads(out)["videos"]] == ["made", "failed", "made"]
    assert "out-2.mp4" in errors.splitlines()[0]
    assert (tmp_path / "out-2.mp4").read_bytes() == before


@pytest.mark.quick
def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    (tmp_path / "a.npy").write_bytes(b"before")

    def stop():
        with written_whole(tmp_path / "a.npy") as temporary:
            temporary.write_bytes(b"half")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        stop()
    assert (tmp_path / "a.npy").read_bytes() == b"before"
    assert names(tmp_path) == ["a.npy"]
    with pytest.raises(InputError, match="folder"):
        check_writable(tmp_path)
