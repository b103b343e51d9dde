"""Run recipes for `wan-jax sample`: ml_collections configs whose keys are the options of `wan-jax generate`.

A recipe is a Python file with `get_config()` that takes `recipe()` and sets what differs from the preset.
"""

import dataclasses
import difflib
import os
import re
from collections.abc import Sequence

from ml_collections import ConfigDict, config_dict

from wan_jax.errors import InputError
from wan_jax.options import Options


def recipe() -> ConfigDict:
    """All options of a run at their defaults; unknown keys are refused, with the nearest known one named."""
    config = ConfigDict()
    for option in dataclasses.fields(Options):
        kind = option.metadata["kind"]
        config[option.name] = config_dict.placeholder(kind) if option.default is None else option.default
    return config.lock()


def load_recipe(arguments: Sequence[str]) -> Options:
    """`["--config", "configs/x.py", "--config.steps=30"]` -> the options of the run.

    Raises:
        InputError: no recipe is named, it does not exist, a key is misspelt, or a value has the wrong type.
    """
    from absl import flags
    from ml_collections import config_flags

    path = _config_path(arguments)
    if not os.path.isfile(path):
        raise InputError(f"recipe {path} does not exist; see the files in configs/")
    values = flags.FlagValues()
    argv = ["wan-jax sample", *arguments]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    try:
        rest = values(argv)
        config = values.config
        if rest[1:]:
            raise InputError(f"unknown argument {rest[1]!r}; options of a recipe are written --config.NAME=VALUE")
        return Options(**config.to_dict())
    except (flags.Error, AttributeError, TypeError) as error:
        raise InputError(_one_line(path, error)) from error


def _config_path(arguments: Sequence[str]) -> str:
    for index, argument in enumerate(arguments):
        if argument.startswith("--config="):
            return argument.removeprefix("--config=")
        if argument == "--config" and index + 1 < len(arguments):
            return arguments[index + 1]
    raise InputError("name a recipe: wan-jax sample --config configs/t2v_a14b_480p.py")


def _one_line(path: str, error: Exception) -> str:
    cause = error.args[0] if error.args else error
    text = str(cause.args[0]) if isinstance(cause, KeyError) else str(cause)
    unknown = re.search(r"""["'](\w+)["']""", text)
    if isinstance(cause, KeyError) and unknown:  # ml_collections' text begins with the key
        known = [option.name for option in dataclasses.fields(Options)]
        nearest = difflib.get_close_matches(unknown[1], known, n=1, cutoff=0.0)[0]
        return f"recipe {path}: unknown key {unknown[1]!r}; did you mean {nearest!r}?"
    return f"recipe {path}: {' '.join(text.split())}"
