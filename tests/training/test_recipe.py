"""Training recipes: every default in one place, unknown keys refused, and a run that goes on is the same run."""

import dataclasses
import json
import pathlib

import pytest

from wan_jax.cli.train import dataclass_of, load_train_recipe, train_recipe
from wan_jax.errors import InputError
from wan_jax.training.config import TrainOptions, check_same_run

pytestmark = pytest.mark.quick

CONFIGS = pathlib.Path(__file__).parent.parent.parent / "configs"
DEMO = ["--config", str(CONFIGS / "train_demo.py")]


def test_lora_recipe():
    options = load_train_recipe(["--config", str(CONFIGS / "train_lora_a14b.py")])
    assert options.lora.rank == 32
    assert options.experts == "low_noise"
    assert options.trainer.optimizer.schedule == "constant"


def test_defaults_are_those_of_the_dataclasses():
    assert dataclass_of(TrainOptions, train_recipe().to_dict()) == TrainOptions()


def test_overrides():
    options = load_train_recipe(
        [
            *DEMO,
            "--config.trainer.optimizer.learning_rate=1",
            "--config.trainer.keep_every=7",
            "--config.samples.prompts=('a', 'b')",
            "--config.remat=layer",
        ]
    )
    assert options.trainer.optimizer.learning_rate == 1.0
    assert options.trainer.keep_every == 7
    assert options.samples.prompts == ("a", "b")
    assert options.remat == "layer"
    assert options.trainer.steps == 20


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.trainer.optimzer.eps=1", "did you mean 'optimizer'"),
        ("--config.trainer.stepz=3", "did you mean 'steps'"),
        ("--config.trainer.steps=many", "invalid literal for int"),
        ("--config.remat=half", "unknown remat 'half'"),
        ("--config.experts=high", "did you mean 'high_noise'"),
        ("--config.samples.every=5", "samples.prompts is empty"),
        ("--config.data.batch_size=0", "must be at least 1"),
    ],
)
def test_bad_values(argument, message):
    with pytest.raises(InputError, match=message) as error:
        load_train_recipe([*DEMO, argument])
    assert "\n" not in str(error.value)


def test_misspelt_recipe(tmp_path):
    path = tmp_path / "recipe.py"
    path.write_text(
        "from wan_jax.cli.train import train_recipe\n\n"
        "def get_config():\n    c = train_recipe()\n    c.lora.rang = 3\n    return c\n"
    )
    with pytest.raises(InputError, match=r"unknown key 'rang'; did you mean 'rank'"):
        load_train_recipe(["--config", str(path)])
    with pytest.raises(InputError, match=r"train_demo\.py"):
        load_train_recipe([])


def test_a_run_that_goes_on_must_be_the_same():
    options = TrainOptions()
    before = json.loads(json.dumps(dataclasses.asdict(options)))
    quiet = dataclasses.replace(
        options, quiet=True, trainer=dataclasses.replace(options.trainer, save_every=3), output="elsewhere"
    )
    check_same_run(before, dataclasses.asdict(quiet), "run")
    other = dataclasses.replace(options, lora=dataclasses.replace(options.lora, rank=3))
    with pytest.raises(InputError, match=r"lora\.rank was 0"):
        check_same_run(before, dataclasses.asdict(other), "run")
