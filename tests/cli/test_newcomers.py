"""What a newcomer expects: random seeds, several videos, notes about prompts that a model cannot know."""

import json

import pytest

from wan_jax import InputError, SamplingParams
from wan_jax.assets import NANO_WEIGHTS
from wan_jax.cli.main import main
from wan_jax.cli.options import Options
from wan_jax.cli.prompt_files import read_items
from wan_jax.media.video import read_metadata
from wan_jax.text.tokenizer import Tokenizer

TINY = ["--size", "48x32", "--frames", "5", "--steps", "1", "--guidance", "1"]


@pytest.mark.quick
def test_random_seeds():
    seeds = {SamplingParams("a", seed="random").seed for _ in range(3)}
    assert len(seeds) == 3
    assert SamplingParams("a", seed=None).seed == 0
    for wrong in ("randon", "", 2**64, -1, True):
        with pytest.raises(InputError, match="seed"):
            SamplingParams("a", seed=wrong)


@pytest.mark.quick
def test_several_videos(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    items = read_items(Options(prompt="a", seed=5, videos=3, output="x/v.gif", save_latents="x.npy"))
    assert [(item.options.seed, item.options.output) for item in items] == [
        (5, "x/v-1.gif"),
        (6, "x/v-2.gif"),
        (7, "x/v-3.gif"),
    ]
    assert [item.options.save_latents for item in items] == ["x-1.npy", "x-2.npy", "x-3.npy"]
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "output": "a.mp4"}\n{"prompt": "b"}')
    outputs = [item.options.output for item in read_items(Options(prompts="p.jsonl", videos=2))]
    assert outputs == ["a-1.mp4", "a-2.mp4", "out-2-1.mp4", "out-2-2.mp4"]
    with pytest.raises(InputError, match="videos"):
        read_items(Options(prompt="a", videos=0))


def test_notes_and_seeds_of_nano(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "a dog on a beach", *TINY, "--seed", "random", "--videos", "2", "--json"]) == 0
    out, errors = capsys.readouterr()
    seeds = [video["seed"] for video in json.loads(out)["videos"]]
    assert seeds[1] == seeds[0] + 1
    assert [read_metadata(f"out-{index}.mp4")["seed"] for index in (1, 2)] == seeds
    (note,) = [line for line in errors.splitlines() if "trained on" in line]
    assert "'dog', 'beach'" in note
    assert main(["generate", "a red circle moves right. " * 60, *TINY]) == 0
    errors = capsys.readouterr().err
    assert "tokens" in errors
    assert "are cut" in errors
    assert "trained on" not in errors


@pytest.mark.quick
def test_words_of_nano():
    tokenizer = Tokenizer.from_pretrained(NANO_WEIGHTS / "tokenizer")
    for prompt in ("a red circle moves right", "一个蓝色方块向左移动", "緑の星が跳ねる", "The digit 7 grows."):
        assert tokenizer.unknown_words(prompt) == [], prompt
    assert tokenizer.unknown_words("two cats boxing, 一只狗") == ["cats", "boxing", "只", "狗"]
    assert tokenizer.count_cut("a red circle", 5) == 0
    assert tokenizer.count_cut("a red circle", 3) == 2
    assert tokenizer.count_cut("a red circle " * 9, 5) == 32
