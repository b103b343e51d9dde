"""The `wan-jax` command: builds the parser from the commands' modules, runs one, and gives its exit code."""

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points

from wan_jax.cli import convert, decode, demo, extend, generate, plan, train
from wan_jax.errors import InputError
from wan_jax.runtime import xla_flags

COMMANDS = (generate, train, extend, decode, convert, plan, demo)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0 done, 1 some videos of a file failed, 2 bad input, 130 interrupted."""
    parser = make_parser()
    values, rest = parser.parse_known_args(arguments)
    if rest and "takes_rest" not in values:  # the commands whose arguments their recipe knows
        parser.error(f"unknown argument {rest[0]!r}; see wan-jax {values.command} --help")
    values.rest = rest
    xla_flags.configure()
    xla_flags.use_compile_cache()
    try:
        return values.run(values) or 0
    except InputError as error:
        print(f"wan-jax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("wan-jax: interrupted", file=sys.stderr)
        return 130


def make_parser() -> argparse.ArgumentParser:
    """Every command adds its flags; what a command needs to run is imported when it runs."""
    parser = argparse.ArgumentParser(prog="wan-jax", description="Wan video models in JAX.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add_command(commands)
    for entry_point in entry_points(group="wan_jax.commands"):
        entry_point.load()(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
