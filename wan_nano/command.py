"""`wan-jax evaluate`: the command's flags. What it measures with is imported when it runs."""

import argparse
import pathlib
from typing import Any

from wan_jax.cli.loading import CLUSTER
from wan_jax.cli.options import add_options, options_of


def add_command(commands: Any) -> None:
    command = commands.add_parser(
        "evaluate", help="measure what generated videos show, for prompts that the nano model never saw"
    )
    names = ("checkpoint", "negative_prompt", "size", "frames", "steps", "guidance", "shift", "solver", "schedule")
    add_options(command, [*names, "lora", "lora_high", "lora_low", "dtype", "vae_dtype", "profile", *CLUSTER, "quiet"])
    command.add_argument("--one", type=int, default=12, help="prompts with one object, a language", metavar="N")
    command.add_argument("--two", type=int, default=6, help="prompts with two, a language", metavar="N")
    command.add_argument("--languages", default="en,zh,ja", help="(default en,zh,ja)", metavar="NAMES")
    command.add_argument(
        "--batch", type=int, help="prompts denoised at once (default 6 on a CPU, else 48)", metavar="N"
    )
    command.add_argument(
        "--compare", nargs="+", default=[], help='further settings on the same seeds: "steps=10 solver=euler" ...'
    )
    command.add_argument("--report", type=pathlib.Path, help="write all figures to this file", metavar="F.json")
    command.add_argument(
        "--sheet", type=pathlib.Path, help="draw frames of the first setting's videos", metavar="F.png"
    )
    command.set_defaults(run=_evaluate)


def _evaluate(values: argparse.Namespace) -> None:
    from wan_nano.evaluate import evaluate_options

    names = ("compare", "one", "two", "languages", "batch", "report", "sheet")
    evaluate_options(options_of(values), **{name: getattr(values, name) for name in names})
