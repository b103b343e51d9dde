"""wan-jax train, from a folder of videos to a checkpoint that a pipeline opens, and to LoRA files."""

import dataclasses
import json

import numpy as np
import pytest

from wan_jax import Lora, WanPipeline, read_video
from wan_jax.checkpoint import open_checkpoint
from wan_jax.cli.main import main
from wan_jax.config import DenoiserConfig, SamplingConfig, TextEncoderConfig, VAEConfig, WanConfig
from wan_jax.lora.files import open_lora
from wan_jax.media.video import Video
from wan_jax.testing.models import write_demo
from wan_jax.training.metrics import read_metrics

TINY = WanConfig(
    name="tiny",
    denoiser=DenoiserConfig(num_layers=2, dim=16, num_heads=2, ffn_dim=24, text_dim=20, text_length=8, freq_dim=16),
    text_encoder=TextEncoderConfig(vocab_size=300, dim=20, num_layers=1, num_heads=2, head_dim=8, ffn_dim=16),
    vae=VAEConfig(base_dim=4, dim_mult=(1, 1, 1, 1), num_res_blocks=1),
    sampling=SamplingConfig(size=(32, 32), frames=5, steps=2, shift=3.0, guidance=(1.0, 1.0), negative_prompt=""),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "tiny"
    write_demo(path, "orbax", TINY)
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Three videos of two shapes, one that is broken, one too short."""
    folder = tmp_path_factory.mktemp("videos")
    rows = []
    for name, shape in {"a": (9, 40, 64), "b": (8, 40, 60), "c": (7, 64, 40), "short": (3, 40, 64)}.items():
        frames = np.random.default_rng(len(rows)).integers(0, 255, (*shape, 3), np.uint8)
        Video(frames).save(folder / f"{name}.mp4")
        rows.append({"file_name": f"{name}.mp4", "caption": f"a video called {name}"})
    (folder / "broken.mp4").write_bytes(b"nothing")
    rows.append({"file_name": "broken.mp4", "caption": ""})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def train(checkpoint, videos, tmp_path):
    """Runs `wan-jax train` in tmp_path/run."""
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        f"""
from wan_jax.cli.train import train_recipe

def get_config():
    config = train_recipe()
    config.checkpoint = {str(checkpoint)!r}
    config.output = {str(tmp_path / "run")!r}
    config.dtype = "float32"
    config.data.folder = {str(videos)!r}
    config.data.buckets = "32x16x5,16x32x5"
    config.data.batch_size = 4
    config.export.dtype = "float32"
    config.trainer.steps = 6
    config.trainer.save_every = 2
    config.trainer.log_every = 3
    config.trainer.optimizer.warmup_steps = 1
    config.trainer.optimizer.learning_rate = 1e-2
    return config
"""
    )

    def run(**options) -> int:
        arguments = [f"--config.{name.replace('__', '.')}={value}" for name, value in options.items()]
        return main(["train", "--config", str(recipe), *arguments])

    return run


def test_training_both_experts(train, tmp_path, capsys, monkeypatch, checkpoint):
    samples = {"samples__every": 3, "samples__prompts": "('a video',)"}
    assert train(**samples, export__weights="raw") == 0
    out, notes = capsys.readouterr()
    run = tmp_path / "run"
    assert out.split() == [str(run / "checkpoint-6")]
    assert "broken.mp4 cannot be read" in notes
    assert "short.mp4: has 3 frames" in notes
    assert "2 of 5 videos" in notes
    assert "step 6/6  loss " in notes
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "loss_high_noise", "loss_low_noise", "gradient_norm", "learning_rate"} <= rows[0].keys()
    assert sorted(path.name for path in (run / "samples").iterdir()) == ["step-000003-0.mp4", "step-000006-0.mp4"]
    assert read_video(run / "samples" / "step-000006-0.mp4").frames.shape == (5, 32, 32, 3)
    assert len(list((run / "cache").glob("*-32x16x5.npy"))) == 2
    assert len(list((run / "cache").glob("*-16x32x5.npy"))) == 1

    # What is exported is what was trained, and the rest of the base.
    pipeline = WanPipeline.from_pretrained(run / "checkpoint-6", dtype="float32")
    video = pipeline("a video")
    sample = read_video(run / "samples" / "step-000006-0.mp4").frames
    video.save(tmp_path / "again.mp4")
    assert (
        np.abs(read_video(tmp_path / "again.mp4").frames.astype(int) - sample).mean() < 1
    )  # float32, fused differently
    old, new = open_checkpoint(checkpoint), open_checkpoint(run / "checkpoint-6")
    for name in ("vae", "text_encoder", "high_noise", "low_noise"):
        changed = any(
            not np.array_equal(x, y)
            for x, y in zip(
                *(part.part(name).read_parameters(part.part(name).table) for part in (old, new)), strict=True
            )
        )
        assert changed == name.endswith("noise")

    # The run goes on from its folder, and encodes nothing again.
    def refuse(*arguments, **options):
        raise AssertionError("encoded again")

    monkeypatch.setattr(WanPipeline, "encode", refuse)
    (run / "checkpoints" / "6").rename(tmp_path / "6")
    assert train(**samples, export__weights="raw") == 0
    again = read_metrics(run)
    assert "after step 4" in capsys.readouterr().err
    for row, expected in zip(again, rows, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-6)

    assert train(**samples, noise__shift=2.0) == 2
    assert "noise.shift was None" in capsys.readouterr().err


def test_training_a_lora_on_a_mesh(train, tmp_path, capsys, checkpoint):
    assert train(mesh="data2-fsdp2", experts="low_noise", lora__rank=2, trainer__steps=3, export__merged=True) == 0
    run = tmp_path / "run"
    files = [run / f"lora-3-low_noise-{style}.safetensors" for style in ("diffusers", "comfyui")]
    assert capsys.readouterr().out.split() == [*map(str, files), str(run / "checkpoint-3")]
    for file in files:
        opened = open_lora(file, TINY.denoiser)
        assert len(opened.changes_of("low_noise")) == 2 * 10
        assert not opened.ignored
    pipeline = WanPipeline.from_pretrained(checkpoint, dtype="float32")
    before = pipeline("a video").latents
    pipeline.set_loras([Lora(str(files[0]), expert="low_noise")])
    adapted = pipeline("a video").latents
    merged = WanPipeline.from_pretrained(run / "checkpoint-3", dtype="float32")("a video").latents
    assert np.abs(adapted - before).max() > 1e-3
    np.testing.assert_allclose(adapted, merged, atol=1e-4)  # float32, merged while running and before


def test_a_batch_of_one_and_a_folder_that_nothing_was_trained_in(train, videos, tmp_path, capsys):
    """Batches of 1 are the default. A run that failed before its first checkpoint claims nothing."""
    broken = tmp_path / "broken.csv"
    broken.write_text("file_name,caption\nbroken.mp4,a\n")
    one = {"data__batch_size": 1, "trainer__steps": 2}
    assert train(**one, data__metadata=broken) == 2
    assert "none of the 1 videos" in capsys.readouterr().err
    assert train(**one, noise__shift=2.0) == 0
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2]
    assert {"loss_high_noise", "loss_low_noise"} <= rows[0].keys()
    assert train(**one) == 2
    assert "noise.shift was 2.0" in capsys.readouterr().err

    # It goes on with other data, and says so.
    (tmp_path / "run" / "checkpoints" / "2").rename(tmp_path / "2")
    rows = (videos / "metadata.jsonl").read_text().splitlines()
    (videos / "metadata.jsonl").write_text("\n".join(rows[1:]))
    try:
        (tmp_path / "2").rename(tmp_path / "run" / "checkpoints" / "2")
        assert train(**one, noise__shift=2.0) == 0
    finally:
        (videos / "metadata.jsonl").write_text("\n".join(rows))
    assert "the data are not those that this run has trained on: 2 examples, 3 before" in capsys.readouterr().err


def test_models_that_need_an_image_are_refused(train, tmp_path, capsys):
    for conditioning in ("first_frame", "image_latents"):
        write_demo(tmp_path / conditioning, "orbax", dataclasses.replace(TINY, name="x", conditioning=conditioning))
        assert train(checkpoint=tmp_path / conditioning) == 2
        assert "x makes videos from images" in capsys.readouterr().err


def test_no_usable_video(train, tmp_path, capsys):
    metadata = tmp_path / "other.csv"
    metadata.write_text("file_name,caption\nbroken.mp4,a\nmissing.mp4,b\n")
    assert train(data__metadata=metadata) == 2
    assert "none of the 2 videos" in capsys.readouterr().err
    metadata.write_text("file_name,caption\nmissing.mp4,b\n")
    assert train(data__metadata=metadata) == 2
    assert "none of the 1 videos exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mesh": "cfg2"}, "mesh cfg2: training has no use for cfg"),
        ({"mesh": "data64"}, "mesh data64: needs 64 devices"),
        ({"mesh": "data2", "data__batch_size": 2, "trainer__accumulation": 2}, "batch_size 2: must divide by"),
        ({"trainer__accumulation": 3}, "batch_size 4 does not split into accumulation 3"),
        ({"export__lora_styles": "diffusers,kohya"}, "unknown style of LoRA files 'kohya'"),
        ({"export__lora_styles": ""}, "unknown style of LoRA files ''"),
        ({"data__fps": 0}, "fps 0.0: must be at least"),
        ({"trainer__keep_every": 0}, "keep_every 0: must be at least 1"),
        ({"trainer__ema_decay": "nan"}, "ema_decay nan: must be between 0 and 1"),
        ({"trainer__optimizer__learning_rate": -1}, "learning_rate -1.0: must be above 0"),
        ({"trainer__optimizer__beta_1": 1}, "beta_1 1.0: must be at least 0 and below 1"),
        ({"trainer__optimizer__clip_norm": 0}, "clip_norm 0.0: must be above 0"),
        ({"trainer__seed": 2**40}, "must be below 2**32"),
        ({"noise__logit_mean": "inf"}, "logit_mean inf: must be finite"),
        ({"lora__rank": 2, "lora__alpha": "nan"}, "alpha nan: must be above 0"),
        ({"samples__every": 1, "samples__prompts": "('',)"}, "must be texts"),
        ({"samples__every": 1, "samples__prompts": "('a',)", "samples__steps": 10**8}, "steps 100000000"),
        ({"data__buckets": "30x16x5"}, "bucket 30x16x5: must be multiples of 16"),
        ({"data__folder": "/nowhere"}, "has neither metadata.jsonl and metadata.csv"),
        ({"lora__rank": 2, "lora__targets": "nothing.*"}, "LoRA target 'nothing.*' matches none"),
        ({"samples__every": 1, "samples__prompts": "('a',)", "samples__frames": 4}, "frames 4: must be 4n"),
    ],
)
def test_bad_options(train, options, message, capsys, tmp_path):
    assert train(**options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_there_is_nothing_to_export_yet(train, capsys):
    assert train(export_only=True) == 2
    assert "no checkpoint" in capsys.readouterr().err


def test_what_training_needs_beside_the_package(train, monkeypatch, capsys):
    monkeypatch.setattr("wan_jax.training.REQUIREMENTS", ("optax", "grain_of_salt"))
    assert train() == 2
    assert "training needs grain_of_salt" in capsys.readouterr().err
