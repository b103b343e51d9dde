"""`wan-jax train`: reads a recipe and trains as it says.

A recipe is a Python file with `get_config()` that takes `train_recipe()` and sets what differs:

    config = train_recipe()
    config.data.folder = "videos"
    config.lora.rank = 32
"""

import argparse
import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from wan_jax.errors import unknown_name

if TYPE_CHECKING:
    from ml_collections import ConfigDict

HELP = f"""usage: wan-jax train --config RECIPE.py [--config.KEY=VALUE ...]

{__doc__.strip()}

The folder holds videos and metadata.jsonl, a line {{"file_name": "a.mp4", "caption": "a red circle"}} for each, or
metadata.csv with the header file_name,caption. Videos of any rate, size and length are turned upright, resampled by
time, cut to the nearest bucket that they are long enough for, and encoded once. See docs/training.md; what the keys
mean is in wan_jax/training/config.py. They are, with their defaults:

"""

# Entry points of other packages: each is a pair (dataclass of options, function that trains by them).
TRAINERS = "wan_jax.trainers"


def add_command(commands: Any) -> None:
    command = commands.add_parser(
        "train", help="fine-tune by a recipe: --config FILE [--config.lora.rank=32 ...]", add_help=False
    )
    command.set_defaults(run=_train, takes_rest=True)


def _train(values: argparse.Namespace) -> None:
    from wan_jax.training import check_installed

    check_installed()
    from wan_jax.training.config import TrainOptions, flat
    from wan_jax.training.run import train

    if {"-h", "--help"} & set(values.rest):
        options = flat(dataclasses.asdict(TrainOptions()))
        print(HELP + "\n".join(f"  --config.{name}={value}" for name, value in options.items()))
        return
    trainers = {TrainOptions: train, **dict(entry.load() for entry in entry_points(group=TRAINERS))}
    options = load_train_recipe(values.rest, tuple(trainers))
    for path in trainers[type(options)](options):
        print(path)


def train_recipe() -> "ConfigDict":
    """Returns all options of a training run at their defaults; a misspelt key raises and names the nearest one."""
    from wan_jax.training.config import TrainOptions

    return recipe_of(TrainOptions())


def load_train_recipe(arguments: Sequence[str], kinds: Sequence[type] = ()) -> Any:
    """Reads the options of a run from `["--config", "configs/x.py", "--config.trainer.steps=30"]`.

    Args:
        arguments: the recipe's file, and values that replace its own.
        kinds: dataclasses of options with defaults, TrainOptions without any; the one with the recipe's keys is made.

    Raises:
        InputError: no recipe is named, it does not exist, a key is misspelt, or a value has the wrong type.
    """
    from wan_jax.cli.recipes import read_config
    from wan_jax.training.config import TrainOptions, flat

    kinds = kinds or (TrainOptions,)

    def make(values: Mapping[str, Any]) -> Any:
        keys = {kind: {item.name for item in dataclasses.fields(kind)} for kind in kinds}
        return dataclass_of(next((kind for kind in kinds if keys[kind] == set(values)), kinds[0]), values)

    names = [name for kind in kinds for name in flat(dataclasses.asdict(kind()))]
    return read_config("train", arguments, [part for name in names for part in name.split(".")], make)


def dataclass_of(kind: type, values: Mapping[str, Any]) -> Any:
    """Makes a dataclass from nested mappings; raises InputError for an unknown key."""
    fields = {item.name: item for item in dataclasses.fields(kind)}
    arguments = {}
    for name, value in values.items():
        if name not in fields:
            raise unknown_name("key", name, fields)
        section: Any = fields[name].type
        is_section = dataclasses.is_dataclass(section)
        arguments[name] = dataclass_of(section, value) if is_section else value
    return kind(**arguments)


def recipe_of(options: Any) -> "ConfigDict":
    """Makes a recipe whose keys are the fields of a dataclass, at its values; unknown keys are refused."""
    from ml_collections import ConfigDict, config_dict

    config = ConfigDict()
    for item in dataclasses.fields(options):
        value = getattr(options, item.name)
        if dataclasses.is_dataclass(value):
            config[item.name] = recipe_of(value)
        elif value is None:  # the field's type is `T | None`
            (kind,) = (kind for kind in typing.get_args(item.type) if kind is not types.NoneType)
            config[item.name] = config_dict.placeholder(kind)
        else:
            config[item.name] = value
    return config.lock()
