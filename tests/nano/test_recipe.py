"""The nano model's recipe: one source for each default, from Python, from a file and from the command line."""

import pathlib

import pytest

from wan_jax.cli.main import main
from wan_jax.cli.train import dataclass_of, load_train_recipe
from wan_jax.errors import InputError
from wan_jax.training.config import TrainOptions
from wan_nano.recipe import SMALL, Bucket, NanoOptions, nano_recipe, parse_stages

pytestmark = pytest.mark.quick

CONFIGS = pathlib.Path(__file__).parent.parent.parent / "configs"
CONFIG = str(CONFIGS / "train_nano.py")
KINDS = (TrainOptions, NanoOptions)


def test_defaults_are_those_of_the_dataclass():
    assert dataclass_of(NanoOptions, nano_recipe().to_dict()) == NanoOptions()
    assert dataclass_of(NanoOptions, nano_recipe(small=True).to_dict()) == NanoOptions(**SMALL)


def test_a_file_and_what_differs():
    options = load_train_recipe(
        ["--config", CONFIG, "--config.vae_rate=1", "--config.experts=low_noise", "--config.state=somewhere"], KINDS
    )
    assert isinstance(options, NanoOptions)
    assert (options.vae_rate, options.experts, options.state) == (1.0, "low_noise", "somewhere")
    assert options.buckets == NanoOptions().buckets
    small = load_train_recipe(
        ["--config", str(CONFIGS / "train_nano_cpu.py"), "--config.buckets=((33,(96,96),4,64,1.0),)"], KINDS
    )
    assert small.buckets == (Bucket(33, (96, 96), 4, 64, 1.0),)
    assert small.fill == SMALL["fill"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.vae_rat=1", "did you mean 'vae_rate'"),
        ("--config.vae_batch=many", "invalid literal for int"),
        ("--config.vae_optimizer=mion", "did you mean 'muon'"),
        ("--config.stages=vea=3", "did you mean 'vae'"),
        ("--config.stages=vae=x", "NAME=SECONDS"),
        ("--config.experts=high", "did you mean 'high_noise'"),
        ("--config.fraction_start=2", "fraction_start 2"),
        ("--config.buckets=((33,(96,96)),)", "missing 3 required positional arguments"),
        ("--vae_rate=3", "unknown argument|Unknown command line flag"),
    ],
)
def test_bad_values(argument, message):
    with pytest.raises(InputError, match=message) as error:
        load_train_recipe(["--config", CONFIG, argument], KINDS)
    assert "\n" not in str(error.value)


def test_stages():
    assert parse_stages("text=60,vae=4.5") == {"text": 60, "vae": 4.5}


def test_the_command(monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr("wan_nano.train.TRAINER", (NanoOptions, lambda options: asked.append(options) or [tmp_path]))
    assert main(["train", "--config", CONFIG, "--config.output=elsewhere"]) == 0
    assert asked[0].output == "elsewhere"
    assert capsys.readouterr().out.strip() == str(tmp_path)
