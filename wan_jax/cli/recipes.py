"""Recipes: options that belong together, by name (`wan-jax generate --recipe NAME`) or in a file (`wan-jax sample`).

A file is an ml_collections config whose keys are the options of `wan-jax generate`: Python with a `get_config()` that
takes `recipe()`, or `recipe(NAME)`, and sets what differs.
"""

import difflib
import os
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from wan_jax.cli.options import OPTIONS, Options
from wan_jax.errors import InputError, unknown_name

if TYPE_CHECKING:
    from ml_collections import ConfigDict

EXAMPLES = {"sample": "configs/t2v_a14b_480p.py", "train": "configs/train_demo.py"}

Result = TypeVar("Result")

# LightX2V's own run of its step-distilled models (configs/distill/wan22): two steps of each expert, whatever the shift,
# without guidance.
_FOUR_STEPS = {"steps": "2,2", "schedule": "lightx2v", "solver": "euler", "shift": 5.0, "guidance": "1"}
_LORA = "lightx2v/Wan2.2-Distill-Loras/wan2.2_{}_A14b_{}_noise_lora_rank64_lightx2v_4step_{}.safetensors"

# What differs from the checkpoint's preset. Pairs: low-noise expert, high-noise expert.
RECIPES: dict[str, dict[str, Any]] = {
    "t2v-a14b-4step": {
        "checkpoint": "Wan-AI/Wan2.2-T2V-A14B",
        **_FOUR_STEPS,
        "lora_high": (_LORA.format("t2v", "high", "1217"),),
        "lora_low": (_LORA.format("t2v", "low", "1217"),),
    },
    "i2v-a14b-4step": {
        "checkpoint": "Wan-AI/Wan2.2-I2V-A14B",
        **_FOUR_STEPS,
        "lora_high": (_LORA.format("i2v", "high", "1022"),),
        "lora_low": (_LORA.format("i2v", "low", "1022"),),
    },
    # Two guided steps of the model as it is lay out the motion, of which distilled models show less; four distilled
    # ones finish the picture. Eight forwards.
    "t2v-a14b-mixed": {
        "checkpoint": "Wan-AI/Wan2.2-T2V-A14B",
        "steps": "4,2",
        "schedule": "lightx2v,official",
        "solver": "euler,unipc",
        "shift": 5.0,
        "guidance": "1,4",
        "lora_low": (_LORA.format("t2v", "low", "1217"),),
    },
}


def get_recipe(name: str) -> dict[str, Any]:
    """The options of the recipe called `name`; raises InputError naming the nearest one."""
    if name not in RECIPES:
        raise unknown_name("recipe", name, RECIPES)
    return RECIPES[name]


def recipe(name: str | None = None) -> "ConfigDict":
    """All options of a run, as the recipe of that name has them or at their defaults.

    Unknown keys are refused, with the nearest known one named.
    """
    from ml_collections import ConfigDict, config_dict

    config = ConfigDict()
    for key, option in OPTIONS.items():
        kind = option.metadata["kind"]
        config[key] = config_dict.placeholder(kind) if option.default is None else option.default
    config.update(get_recipe(name) if name is not None else {})
    return config.lock()


def load_recipe(arguments: Sequence[str]) -> Options:
    """`["--config", "configs/x.py", "--config.steps=30"]` -> the options of the run.

    Raises:
        InputError: no recipe is named, it does not exist, a key is misspelt, or a value has the wrong type.
    """
    return read_config("sample", arguments, list(OPTIONS), lambda values: Options(**values))


def read_config(
    command: str,
    arguments: Sequence[str],
    known: Sequence[str],
    make: Callable[[dict[str, Any]], Result],
    otherwise: "ConfigDict | None" = None,
) -> Result:
    """Reads the recipe that the arguments of `wan-jax COMMAND` name and makes options of its values.

    Args:
        command: for messages.
        arguments: `["--config", FILE, "--config.KEY=VALUE", ...]`.
        known: the keys that there are, for messages.
        make: from the config as a (nested) dict; what it raises as AttributeError or TypeError is bad input.
        otherwise: the recipe where the arguments name none; without it they must.

    Raises:
        InputError: see load_recipe.
    """
    from absl import flags
    from ml_collections import config_flags

    path = _config_path(arguments)
    values = flags.FlagValues()
    argv = [f"wan-jax {command}", *arguments]
    if path is None and otherwise is None:
        raise InputError(f"name a recipe: wan-jax {command} --config {EXAMPLES[command]}")
    if path is not None and not os.path.isfile(path):
        raise InputError(f"recipe {path} does not exist; see the files in configs/")
    try:
        if path is not None:
            config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
        else:
            config_flags.DEFINE_config_dict("config", otherwise, flag_values=values, sys_argv=argv)
        rest = values(argv)
        config = values.config
        if rest[1:]:
            raise InputError(f"unknown argument {rest[1]!r}; options of a recipe are written --config.NAME=VALUE")
        return make(config.to_dict())
    except (flags.Error, AttributeError, KeyError, TypeError) as error:
        raise InputError(_one_line(f"recipe {path}" if path else "recipe", error, known)) from error


def _config_path(arguments: Sequence[str]) -> str | None:
    for index, argument in enumerate(arguments):
        if argument.startswith("--config="):
            return argument.removeprefix("--config=")
        if argument == "--config" and index + 1 < len(arguments):
            return arguments[index + 1]
    return None


def _one_line(recipe: str, error: Exception, known: Sequence[str]) -> str:
    # A KeyError of a section comes as it is, one of the config itself inside another error.
    cause = error if isinstance(error, KeyError) or not error.args else error.args[0]
    text = str(cause.args[0]) if isinstance(cause, KeyError) else str(cause)
    unknown = re.search(r"""["'](\w+)["']""", text)
    if isinstance(cause, KeyError) and unknown:  # ml_collections' text begins with the key
        nearest = difflib.get_close_matches(unknown[1], known, n=1, cutoff=0.0)[0]
        return f"{recipe}: unknown key {unknown[1]!r}; did you mean {nearest!r}?"
    return f"{recipe}: {' '.join(text.split())}"
