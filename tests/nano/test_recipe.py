"""The nano model's recipe: one source for each default, from Python, from a file and from two command lines."""

import pathlib

import pytest

from wan_jax.cli.main import main
from wan_jax.cli.train import dataclass_of, load_train_recipe
from wan_jax.errors import InputError
from wan_jax.training.config import TrainOptions
from wan_nano.recipe import SMALL, Bucket, NanoOptions, Recipe, nano_recipe
from wan_nano.train import parse_options

CONFIG = str(pathlib.Path(__file__).parent.parent.parent / "configs" / "train_nano.py")
KINDS = (TrainOptions, NanoOptions)


def test_defaults_are_those_of_the_dataclass():
    assert dataclass_of(NanoOptions, nano_recipe().to_dict()) == NanoOptions()
    assert parse_options([]) == NanoOptions()
    assert parse_options(["--small"]) == NanoOptions(**SMALL)


def test_a_file_and_what_differs():
    options = load_train_recipe(
        ["--config", CONFIG, "--config.vae_rate=1", "--config.experts=low_noise", "--config.state=somewhere"], KINDS
    )
    assert isinstance(options, NanoOptions)
    assert (options.vae_rate, options.experts, options.state) == (1.0, "low_noise", "somewhere")
    assert options.buckets == Recipe().buckets


def test_flags_and_overrides_together():
    options = parse_options(
        [
            *("--output", "a", "--stages", "vae=3", "--more", "7", "--fraction-start", "0.5", "--small"),
            *("--config.vae_window=(5,64,64)", "--config.vae_optimizer=muon"),
            "--config.buckets=((33,(96,96),4,64,1.0),)",
        ]
    )
    assert (options.output, options.stages, options.more, options.fraction_start) == ("a", "vae=3", 7.0, 0.5)
    assert (options.vae_window, options.vae_optimizer, options.fill) == ((5, 64, 64), "muon", SMALL["fill"])
    assert options.buckets == (Bucket(33, (96, 96), 4, 64, 1.0),)
    assert parse_options(["--config", CONFIG, "--seed", "3"]).stages.endswith("decoder=100")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.vae_rat=1", "unknown key 'vae_rat'; did you mean 'vae_rate'"),
        ("--config.vae_batch=many", "invalid literal for int"),
        ("--config.vae_optimizer=mion", "did you mean 'muon'"),
        ("--config.stages=vea=3", "did you mean 'vae'"),
        ("--config.experts=high", "did you mean 'high_noise'"),
        ("--config.fraction_start=2", "must be from 0 to 1"),
        ("--config.buckets=((33,(96,96)),)", "missing 3 required positional arguments"),
        ("--vae_rate=3", "unknown argument|Unknown command line flag"),
    ],
)
def test_bad_values(argument, message, capsys):
    with pytest.raises(InputError, match=message) as error:
        load_train_recipe(["--config", CONFIG, argument], KINDS)
    assert "\n" not in str(error.value)
    with pytest.raises(SystemExit):
        parse_options([argument])
    assert "error: " in capsys.readouterr().err


def test_the_command(monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr("wan_nano.train.TRAINER", (NanoOptions, lambda options: asked.append(options) or [tmp_path]))
    assert main(["train", "--config", CONFIG, "--config.output=elsewhere"]) == 0
    assert asked[0].output == "elsewhere"
    assert capsys.readouterr().out.strip() == str(tmp_path)
