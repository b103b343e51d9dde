"""Files of prompts: what they may hold, and runs of them that fail, stop and go on."""

import json

import jax
import numpy as np
import pytest

from tests.quick_compiles import quick_compiles  # noqa: F401
from tests.text.test_prompt_extension import completion, serve
from wan_jax import WanPipeline, read_video
from wan_jax.cli.main import main
from wan_jax.cli.options import Options
from wan_jax.cli.prompt_files import read_items
from wan_jax.errors import InputError
from wan_jax.media.video import is_complete, read_metadata
from wan_jax.runtime.events import Run, StepDone
from wan_jax.runtime.progress import Bars

JSON_LINES = """
{"prompt": "a red circle", "seed": 3, "size": "48x32", "steps": [4, 2], "guidance": [1, 3.5], "shift": 5}

{"prompt": "一个蓝色的方块", "output": "blue.gif", "steps": 6, "solver": "euler,unipc", "negative_prompt": null}
"""

CSV = """prompt,seed,shift,steps,output
"a red circle, and a
blue square",3,,"4,2",

 a dog ,,2.5,6,dog.gif
"""


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Writes a file of prompts and reads it."""
    monkeypatch.chdir(tmp_path)

    def read(name: str, text: str, **options):
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
        return read_items(Options(prompts=name, **options))

    return read


@pytest.mark.quick
def test_one_prompt():
    options = Options(prompt="a")
    (item,) = read_items(options)
    assert (item.options, item.where) == (options, "")


@pytest.mark.quick
def test_text(read):
    items = read("p.txt", "\ufeffa red circle\r\n\r\n  一个蓝色的方块  \n", seed=5, save_latents="x.npy")
    assert [item.options.prompt for item in items] == ["a red circle", "一个蓝色的方块"]
    assert [item.where for item in items] == ["p.txt line 1", "p.txt line 3"]
    assert [item.options.output for item in items] == ["out-1.mp4", "out-2.mp4"]
    assert [item.options.save_latents for item in items] == ["x-1.npy", "x-2.npy"]
    assert {(item.options.seed, item.options.prompts) for item in items} == {(5, None)}


@pytest.mark.quick
def test_json_lines(read):
    first, second = read("p.jsonl", JSON_LINES, output="videos/v.mp4", seed=7, negative_prompt="blurry")
    assert first.options == Options(
        prompt="a red circle",
        seed=3,
        size="48x32",
        steps="4,2",
        guidance="1,3.5",
        shift=5.0,
        negative_prompt="blurry",
        output="videos/v-1.mp4",
    )
    assert second.where == "p.jsonl line 4"
    assert (second.options.output, second.options.steps, second.options.solver) == ("blue.gif", 6, ("euler", "unipc"))
    assert (second.options.seed, second.options.negative_prompt) == (7, "blurry")


@pytest.mark.quick
def test_csv(read):
    first, second = read("p.csv", CSV, shift=12.0)
    assert first.options.prompt == "a red circle, and a\nblue square"
    assert (first.options.seed, first.options.shift, first.options.steps) == (3, 12.0, (4, 2))
    assert first.options.output == "out-1.mp4"
    assert second.where == "p.csv line 5"
    assert second.options.prompt == "a dog"
    assert (second.options.seed, second.options.shift, second.options.output) == (0, 2.5, "dog.gif")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "b", "sede": 3}', "line 2: unknown key 'sede'; did you mean 'seed'"),
        ("p.jsonl", '{"prompt": "a", "dtype": "float32"}', "key 'dtype' is one of the whole run; give it as --dtype"),
        ("p.jsonl", '{"prompt": "a", "vae_dtype": "float32"}', "give it as --vae-dtype"),
        ("p.jsonl", '{"prompt": "a", "seed": "many"}', "line 1: seed 'many': must be a whole number"),
        ("p.jsonl", '{"prompt": "a", "seed": 1.5}', "line 1: seed 1.5: must be a whole number"),
        ("p.jsonl", '{"prompt": "a", "seed": true}', "line 1: seed True: must be a whole number"),
        ("p.jsonl", '{"prompt": "a", "shift": "five"}', "line 1: shift 'five': must be a number"),
        ("p.jsonl", '{"prompt": 5}', "line 1: prompt 5: must be text"),
        ("p.jsonl", '{"prompt": "a", "steps": [4, {}]}', "line 1: steps []: must be a whole number"),
        ("p.jsonl", '{"prompt": "a", "steps": {"low": 4}}', "line 1: steps {'low': 4}: must be a whole number"),
        ("p.jsonl", '{"prompt": "a", "shift": 1' + "0" * 400 + "}", "line 1: shift .*: must be a number"),
        ("p.jsonl", '{"seed": 5}', "line 1: no prompt"),
        ("p.jsonl", '{"prompt": " "}', "line 1: no prompt"),
        ("p.jsonl", '"a red circle"', "line 1: not an object; write {"),
        ("p.jsonl", '[["prompt", "a"]]', "line 1: not an object"),
        ("p.jsonl", '{"prompt": "a"', "line 1: not JSON"),
        ("p.jsonl", "[" * 100_000, "line 1: not JSON"),
        ("p.jsonl", '{"prompt": "a", "seed": 1, "seed": 2}', "line 1: key 'seed' is there twice"),
        (
            "p.jsonl",
            '{"prompt": "a", "output": "x.gif"}\n{"prompt": "b", "output": "./x.gif"}',
            "line 2: output ./x.gif is also the output of p.jsonl line 1; give each its own",
        ),
        (
            "p.jsonl",
            '{"prompt": "a", "output": "out-2.mp4"}\n{"prompt": "b"}',
            "line 2: output out-2.mp4 is also the output of",
        ),
        ("p.csv", "prompt,sede\na,3", "p.csv line 1: unknown key 'sede'; did you mean 'seed'"),
        ("p.csv", "prompt,seed,seed\na,3,4", "line 1: key 'seed' is there twice"),
        ("p.csv", "prompt,seed\na,3\nb", "line 3: 1 cells; the header has 2 keys"),
        ("p.csv", "prompt,seed\na, and b,3", "line 2: 3 cells; the header has 2 keys"),
        ("p.csv", "prompt,seed\na,many", "line 2: seed 'many': must be a whole number"),
        ("p.csv", 'prompt,seed\n"a,3', "line 2: not CSV"),
        ("p.csv", "prompt,seed\n,3", "line 2: no prompt"),
        ("p.csv", "prompt,seed\n", "prompts file p.csv is empty"),
        ("p.csv", "", "prompts file p.csv is empty"),
        ("p.json", "[]", "prompts file p.json: unknown ending '.json'; use one of .txt, .jsonl, .csv"),
    ],
)
def test_bad_files(read, name, text, message):
    with pytest.raises(InputError) as error:
        read(name, text)
    found = str(error.value)
    assert "\n" not in found
    assert all(part in found for part in message.split(".*")), found


SMALL = ["--size", "48x32", "--frames", "5", "--steps", "2", "--dtype", "float32"]


@pytest.fixture
def run(diffusers_tree, tmp_path, monkeypatch, capsys):
    """Writes lines to prompts.jsonl and runs them; gives (exit code, report, standard error)."""
    monkeypatch.chdir(tmp_path)

    def run(lines: list[dict], *arguments: str):
        (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
        capsys.readouterr()
        command = ["generate", "--checkpoint", str(diffusers_tree), *SMALL, "--prompts", "prompts.jsonl", "--json"]
        code = main([*command, *arguments])
        output, errors = capsys.readouterr()
        return code, json.loads(output) if output else None, errors

    return run


LINES = [
    {"prompt": "a red circle", "seed": 3},
    {"prompt": "too much", "initial_latents": "huge.npy"},
    {"prompt": "a blue square", "seed": 4, "output": "blue.png", "frames": 9},
]


def test_a_failing_video_and_a_second_run(run, tmp_path, monkeypatch):
    np.save("huge.npy", np.full((16, 2, 4, 6), 3e38, np.float32))  # finite; what the denoiser makes of them is not
    code, report, errors = run(LINES, "--quiet")
    assert code == 1
    assert [video["status"] for video in report["videos"]] == ["made", "failed", "made"]
    assert report["failed"] == ["prompts.jsonl line 2"]
    assert "latents are not finite" in report["videos"][1]["failure"]
    assert errors.splitlines() == [
        "wan-jax: prompts.jsonl line 2: the denoised latents are not finite: the weights are damaged, or need float32",
        "wan-jax: 1 of 3 videos failed",
    ]
    assert report["outputs"] == ["out-1.mp4", *(f"blue-{index:04d}.png" for index in range(9))]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*report["outputs"], "huge.npy", "prompts.jsonl"])
    assert (report["videos"][0]["seed"], report["videos"][2]["seed"], report["seed"]) == (3, 4, None)
    assert (report["settings"]["size"], report["settings"]["shift"]) == ([48, 32], 3.0)
    assert read_metadata("out-1.mp4")["seed"] == 3
    before = (tmp_path / "out-1.mp4").stat().st_mtime_ns

    lines = [LINES[0], {"prompt": "not so much"}, LINES[2]]
    code, report, errors = run(lines)
    assert code == 0
    assert [video["status"] for video in report["videos"]] == ["finished before", "made", "finished before"]
    assert report["outputs"] == ["out-2.mp4"]
    assert "note: out-1.mp4 is finished\n" in errors
    assert "note: blue.png is finished\n" in errors
    assert (tmp_path / "out-1.mp4").stat().st_mtime_ns == before

    # Nothing is left to do, so nothing is loaded; what was made of another line is a failure.
    with monkeypatch.context() as patch:
        patch.setattr(WanPipeline, "from_checkpoint", None)
        code, report, errors = run([LINES[0] | {"prompt": "a green star", "seed": 5}, *lines[1:]], "--quiet")
    assert (code, report["outputs"], report["profile"]) == (1, [], None)
    assert "out-1.mp4 is of another prompt, seed; --overwrite makes it anew" in errors
    assert report["failed"] == ["prompts.jsonl line 1"]

    code, report, _ = run([{"prompt": "a green star", "seed": 5}], "--overwrite")
    assert (code, report["outputs"]) == (0, ["out-1.mp4"])
    assert read_video("out-1.mp4").metadata["prompt"] == "a green star"


def test_what_is_half_there_is_made_again(run, tmp_path):
    line = {"prompt": "a", "output": "a.png"}
    assert run([line], "--save-frames", "frames.npy")[0] == 0
    for missing in ("a-0004.png", "frames-1.npy", "a-0001.png"):
        (tmp_path / missing).unlink()
        if missing == "a-0001.png":
            (tmp_path / missing).touch()  # as a full disk leaves it
        _, report, _ = run([line], "--save-frames", "frames.npy")
        assert [video["status"] for video in report["videos"]] == ["made"]
        assert (tmp_path / missing).stat().st_size


def test_all_lines_are_checked_first(run, tmp_path, monkeypatch):
    monkeypatch.setattr(WanPipeline, "from_checkpoint", None)
    for wrong in ({"size": "50x32"}, {"solver": "eular"}, {"image": "none.png"}, {"output": "nowhere/a.mp4"}):
        code, _, errors = run([{"prompt": "a"}, {"prompt": "b"} | wrong], "--quiet")
        assert code == 2
        assert errors.startswith("wan-jax: prompts.jsonl line 2: ")
        assert next(iter(wrong)) in errors
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_lines_of_one_size_share_executables(run, monkeypatch):
    """Other prompts, seeds and numbers compile nothing."""
    compiled: list[int] = []
    events: list[str] = []
    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(lambda event, duration, **kwargs: events.append(event))
    results = WanPipeline.results

    def counted(self, *args):
        compiled.append(sum(event.endswith("jaxpr_to_mlir_module_duration") for event in events))
        return results(self, *args)

    monkeypatch.setattr(WanPipeline, "results", counted)
    lines = [{"prompt": "a"}, {"prompt": "b", "seed": 1, "steps": 3, "guidance": 2.5}, {"prompt": "c", "shift": 3}]
    code, report, _ = run(lines, "--quiet")
    assert code == 0
    first, second, third = compiled
    assert first < second == third
    assert [video["steps"] for video in report["videos"]] == [2, 3, 2]


def test_interrupt_stops_the_batch(run, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(WanPipeline, "results", interrupt)
    assert run([{"prompt": "a"}, {"prompt": "b"}])[0] == 130


def test_extended_prompts(run, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    lines = [{"prompt": "a circle"}, {"prompt": "a square"}]
    with serve(completion("A red circle moves."), (401, b"")) as server:
        extend = ["--extend-prompt", "--extend-url", server.url, "--extend-model", "small"]
        code, report, errors = run(lines, *extend)
    assert code == 0
    first, second = report["videos"]
    assert (first["prompt"], first["original_prompt"]) == ("A red circle moves.", "a circle")
    assert second["prompt"] == "a square"
    assert "original_prompt" not in second
    assert "note: extended prompt: A red circle moves." in errors
    assert "prompt not extended, used as it is: http://127.0.0.1" in errors
    assert "secret" not in errors + json.dumps(report)
    metadata = read_metadata("out-1.mp4")
    assert (metadata["prompt"], metadata["original_prompt"]) == ("A red circle moves.", "a circle")
    assert read_metadata("out-2.mp4")["prompt"] == "a square"

    with serve((500, b"")) as server:  # finished: nobody is asked
        _, report, errors = run(lines, *extend[:2], server.url, *extend[3:])
    assert server.requests == []
    assert "note: out-1.mp4 is finished\n" in errors


def test_bars_within_a_bar():
    bars = Bars()
    run = Run(bars)
    with run.stage("videos", total=2):
        run.progress("videos", 0, "first")
        with run.stage("denoise", total=4):
            run.emit(StepDone(1, 4, "low_noise", 0.1))
            assert bars.lines == [("first", 0), ("denoise (low_noise expert)", 1)]
        run.progress("videos", 1)
        assert bars.lines == [("first", 1)]
    with run.transfers("load") as report:
        report("vae", 5, 10)
        assert bars.lines == [("load vae", 5)]
    assert bars.lines == []


def test_notes_are_printed_once(capsys):
    for bars in (Bars(), Bars(False)):
        run = Run(bars)
        run.note("the image is stretched")
        run.note("the image is stretched")
    assert capsys.readouterr().err == "note: the image is stretched\n"


def test_metadata_of_files(tmp_path):
    from wan_jax.media.video import Video

    video = Video(np.zeros((5, 32, 48, 3), np.uint8), metadata={"prompt": "一个红色的圆", "steps": (4, 2)})
    for name in ("a.mp4", "a.gif", "a.png"):
        assert not is_complete(tmp_path / name, 5)
        video.save(tmp_path / name)
        assert is_complete(tmp_path / name, 5)
        assert read_metadata(tmp_path / name) == {"prompt": "一个红色的圆", "steps": [4, 2]}
    assert not is_complete(tmp_path / "a.png", 9)
    (tmp_path / "b.mp4").write_bytes(b"no video")
    assert read_metadata(tmp_path / "b.mp4") == read_metadata(tmp_path / "none.png") == {}
