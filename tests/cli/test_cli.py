"""The command line: what it writes, what it prints, and its one line for every kind of bad input."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

import wan_jax
from wan_jax import WanPipeline, read_video
from wan_jax.assets import NANO_WEIGHTS
from wan_jax.cli.main import main
from wan_jax.media.video import Video

SMALL = ["--size", "48x32", "--frames", "5", "--steps", "2", "--dtype", "float32"]
SHAPE = (16, 2, 4, 6)


@pytest.fixture
def generate(diffusers_tree, tmp_path, monkeypatch):
    """Runs `wan-jax generate` in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> int:
        return main(["generate", "--checkpoint", str(diffusers_tree), *SMALL, "--quiet", *arguments])

    return run


def test_generate(generate, tmp_path, capsys):
    latents, frames = tmp_path / "latents.npy", tmp_path / "frames.npy"
    arguments = ["a red circle", "--seed", "3", "--save-latents", str(latents), "--save-frames", str(frames), "--json"]
    assert generate(*arguments) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["seed"] == 3
    assert report["outputs"] == ["out.mp4"]
    assert set(report["seconds"]) == {"load", "compile", "text", "denoise", "decode", "save"}
    assert report["settings"]["size"] == [48, 32]
    assert report["settings"]["shift"] == 3.0  # the tree's own: it is no release
    assert report["peak_bytes"] is None or report["peak_bytes"] > 0
    assert np.load(latents).shape == SHAPE
    assert np.load(latents).dtype == np.float32
    assert np.load(frames).shape == (5, 32, 48, 3)
    video = read_video(tmp_path / "out.mp4")
    assert video.frames.shape == (5, 32, 48, 3)
    assert (video.metadata["prompt"], video.metadata["seed"], video.fps) == ("a red circle", 3, 16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["frames.npy", "latents.npy", "out.mp4"]


def test_a_video_says_how_it_was_made_and_is_made_again(generate, diffusers_tree, tmp_path, capsys):
    assert generate("a red circle", "--seed", "3", "--fps", "12.5", "--save-latents", "a.npy", "--crf", "0") == 0
    made = read_video("out.mp4")
    assert made.fps == made.metadata["fps"] == 12.5
    for file in ("out.mp4", "a.npy"):
        capsys.readouterr()
        assert main(["info", file]) == 0
        assert json.loads(capsys.readouterr().out) == made.metadata

    # Decoded latents have the rate and the words of the run.
    decode = ["decode", "a.npy", "--checkpoint", str(diffusers_tree), "--crf", "0", "--quiet"]
    assert main([*decode, "--output", "decoded.webm"]) == 0
    decoded = read_video("decoded.webm")
    assert (decoded.metadata, decoded.fps) == (made.metadata, 12.5)

    common = ["generate", "--checkpoint", str(diffusers_tree), "--dtype", "float32", "--quiet"]
    assert main([*common, "--again", "out.mp4", "--crf", "0"]) == 0
    assert capsys.readouterr().out.split()[-1] == "out-again.mp4"
    again = read_video("out-again.mp4")
    assert again.metadata == made.metadata
    np.testing.assert_array_equal(again.frames, made.frames)
    assert main([*common, "--again", "a.npy", "--seed", "4", "--output", "other.gif"]) == 0
    assert read_video("other.gif").metadata == made.metadata | {"seed": 4}


def test_again_and_info_of_what_does_not_say(generate, diffusers_tree, tmp_path, capsys):
    frames = np.zeros((5, 32, 48, 3), np.uint8)
    Video(frames).save("plain.mp4")
    Video(frames, metadata={"prompt": "a", "model": "another"}).save("other.mp4")
    np.save("plain.npy", np.zeros((3, 2, 4, 6), np.float32))
    for arguments, message in (
        (["generate", "--again", "plain.mp4"], "plain.mp4: does not say"),
        (["generate", "--again", "none.mp4"], "none.mp4: does not say"),
        (["generate", "--again", "other.mp4", "--checkpoint", str(diffusers_tree)], "another made it, not"),
        (["info", "plain.mp4"], "plain.mp4: is no video that says"),
        (["info", "plain.npy"], "plain.npy: is no video that says"),
        (["decode", "plain.npy", "--checkpoint", str(diffusers_tree)], "plain.npy has 3 channels"),
        (["train", "--config", "none.py"], "none.py does not exist"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len([line for line in error.splitlines() if not line.startswith("note: ")]) == 1


def test_help_of_train(capsys):
    assert main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--config.data.batch_size=1" in out
    assert "metadata.jsonl" in out


def test_the_command_and_python_agree(generate, diffusers_tree, tmp_path):
    start = np.random.default_rng(5).standard_normal(SHAPE).astype(np.float32)
    np.save(tmp_path / "start.npy", start)
    arguments = ["--guidance", "2,5", "--shift", "5", "--solver", "dpm++", "--schedule", "diffusers"]
    arguments += ["--negative-prompt", "", "--initial-latents", "start.npy", "--save-latents", "end.npy"]
    assert generate("a red circle", *arguments) == 0
    video = WanPipeline.from_pretrained(diffusers_tree, dtype="float32")(
        "a red circle",
        size=(48, 32),
        frames=5,
        steps=2,
        guidance=(2.0, 5.0),
        shift=5.0,
        solver="dpm++",
        schedule="diffusers",
        negative_prompt="",
        initial_latents=start,
    )
    np.testing.assert_array_equal(np.load(tmp_path / "end.npy"), video.latents)


def test_several_prompts(generate, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red circle\n\n一个蓝色的方块\n", encoding="utf-8")
    assert generate("--prompts", "prompts.txt", "--output", "v.gif") == 0
    assert capsys.readouterr().out.split() == ["v-1.gif", "v-2.gif"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.txt", "v-1.gif", "v-2.gif"]


def test_notes_say_that_a_releases_shift_wins(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree = shutil.copytree(NANO_WEIGHTS, tmp_path / "tree")
    scheduler = tree / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"flow_shift": 3.0}))
    assert main(["generate", "a", "--checkpoint", str(tree), *SMALL]) == 0
    errors = capsys.readouterr().err
    assert "flow_shift 3" in errors
    assert "shift 5" in errors


def test_no_pytorch_at_run_time(diffusers_tree, tmp_path):
    """With every road to PyTorch and diffusers closed, the whole run works."""
    program = (
        "import sys\n"
        "class Closed:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'diffusers', 'accelerate'):\n"
        "            raise ModuleNotFoundError(f'{name} is closed', name=name)\n"
        "sys.meta_path.insert(0, Closed())\n"
        "from wan_jax.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = ["generate", "a red circle", "--checkpoint", str(diffusers_tree), *SMALL, "--quiet"]
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.mp4").is_file()
    assert "torch" not in done.stderr.lower()


NOT_FINITE = np.full(SHAPE, np.inf, np.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "--size", "50x32"], "size 50x32: the width must be a multiple of 16; use 48 or 64"),
        (["a", "--size", "large"], "write WIDTHxHEIGHT"),
        (["a", "--frames", "6"], "frames 6: must be 4n + 1; use 5 or 9"),
        (["a", "--solver", "unipcc"], "did you mean 'unipc'"),
        (["a", "--schedule", "offical"], "did you mean 'official'"),
        (["a", "--noise", "pytorch"], "unknown noise 'pytorch'"),
        (["a", "--dtype", "float16"], "unknown dtype 'float16'"),
        (["a", "--vae-dtype", "half"], "unknown VAE dtype 'half'"),
        (["a", "--guidance", "high"], "LOW,HIGH"),
        (["a", "--output", "nowhere/out.mp4"], "output folder nowhere does not exist"),
        (["a", "--output", "out.avi"], "unknown ending '.avi'"),
        (["a", "--save-latents", "nowhere/x.npy"], "folder nowhere does not exist"),
        (["a", "--save-latents", "x.txt"], "must end in .npy"),
        (["--prompts", "empty.txt"], "prompts file empty.txt is empty"),
        (["--prompts", "none.txt"], "prompts file none.txt does not exist"),
        (["--prompts", "start.npy"], "unknown ending '.npy'; use one of .txt, .jsonl, .csv"),
        (["--prompts", "latin.txt"], "is not UTF-8 text"),
        (["--prompts", "bad.jsonl"], "bad.jsonl line 2: frames 6: must be 4n + 1; use 5 or 9"),
        (["--prompts", "bad.csv"], "bad.csv line 2: steps 'many': write one whole number, or LOW,HIGH"),
        (["a", "--steps", "2,1,1"], "steps '2,1,1': write one whole number, or LOW,HIGH"),
        (["a", "--extend-prompt"], "--extend-prompt needs --extend-url URL and --extend-model NAME"),
        ([], "give a prompt"),
        (["a", "--prompts", "empty.txt"], "one of the two"),
        (["a", "--initial-latents", "none.npy"], "latents file none.npy does not exist"),
        (["a", "--initial-latents", "empty.txt"], "is not a .npy array"),
        (["a", "--initial-latents", "start.npy"], "needs (16, 2, 4, 6)"),
        (["a", "--initial-latents", "double.npy"], "holds float64"),
        (["a", "--initial-latents", "infinite.npy"], "NaN or infinity"),
        (["a", "--checkpoint", "none"], "checkpoint 'none' does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(generate, tmp_path, capsys, arguments, message):
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "latin.txt").write_text("ein Bär", encoding="latin-1")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "frames": 6}')
    (tmp_path / "bad.csv").write_text("prompt,steps\na,many")
    np.save(tmp_path / "start.npy", np.zeros((16, 2, 4, 7), np.float32))
    np.save(tmp_path / "double.npy", np.zeros(SHAPE))
    np.save(tmp_path / "infinite.npy", NOT_FINITE)
    before = sorted(tmp_path.iterdir())
    assert generate(*arguments) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1, errors
    assert message in errors[0]
    assert sorted(tmp_path.iterdir()) == before


def test_unknown_hub_id_without_network(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "a", "--checkpoint", "nobody/nothing", *SMALL, "--quiet"]) == 2
    assert "nobody/nothing is no local path and could not be downloaded" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["generate", "a", "--stpes", "3"], ["generate", "a", "--seed"], ["genrate"], [], ["plan", "--devices", "two"]],
)
def test_bad_arguments_are_one_line(arguments, capsys):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("wan-jax: ")
    assert "--help" in line


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert wan_jax.__version__ in capsys.readouterr().out


def test_sample(diffusers_tree, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.py").write_text(
        "from wan_jax.cli.recipes import recipe\n\n"
        "def get_config():\n"
        "    config = recipe()\n"
        "    config.prompt, config.size, config.frames, config.dtype = 'a red circle', '48x32', 5, 'float32'\n"
        "    config.quiet = True\n"
        "    return config\n"
    )
    arguments = ["--config", "small.py", f"--config.checkpoint={diffusers_tree}", "--config.steps=2", "--config.seed=4"]
    assert main(["sample", *arguments, "--config.json=True"]) == 0
    assert json.loads(capsys.readouterr().out)["seed"] == 4
    assert main(["sample", *arguments, "--config.stpes=3"]) == 2
    assert "did you mean 'steps'" in capsys.readouterr().err
