"""The `wan-jax` command: builds the parser from the commands' modules, runs one, and gives its exit code."""

import argparse
import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib.metadata import entry_points
from typing import Any, NoReturn

import wan_jax
from wan_jax.cli import convert, decode, demo, doctor, extend, generate, plan, train
from wan_jax.errors import InputError, OutputError, Terminated, one_line
from wan_jax.runtime import xla_flags

COMMANDS = (generate, train, extend, decode, convert, plan, doctor, demo)


class Parser(argparse.ArgumentParser):
    """Bad arguments are one line, as all bad input is."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code.

    0 done; 1 some videos of a file failed, or a file could not be written; 2 bad input; 130 and 143 interrupted, by
    Ctrl-C and by SIGTERM.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be any bytes
    try:
        with _signals():
            parser = make_parser()
            values, rest = parser.parse_known_args(arguments)
            if rest and "takes_rest" not in values:  # the commands whose arguments their recipe knows
                raise InputError(f"unknown argument {rest[0]!r}; see wan-jax {values.command} --help")
            values.rest = rest
            xla_flags.configure()
            xla_flags.use_compile_cache()
            xla_flags.check()
            code = values.run(values) or 0
            sys.stdout.flush()
            return code
    except BrokenPipeError:  # nobody reads on, as in `wan-jax plan | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (InputError, OutputError) as error:
        print(f"wan-jax: {one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except Exception as error:
        if (reason := _reason(error)) is None:
            raise
        print(f"wan-jax: {reason}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        is_term = isinstance(error, Terminated)
        print(f"wan-jax: {one_line(error, 'terminated' if is_term else 'interrupted')}", file=sys.stderr)
        return 128 + (error.args[0] if is_term else signal.SIGINT)


def _reason(error: Exception) -> str | None:
    """What is wrong with the devices or with JAX's settings, in one line, where that made a command fail."""
    try:
        from wan_jax.runtime.devices import explain
    except Exception as at_start:  # JAX refuses values of its environment variables as it is imported
        return f"JAX does not start: {' '.join(str(at_start).split())}"
    return explain(error)


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Within it SIGTERM and SIGHUP do what Ctrl-C does."""

    def terminate(signum: int, frame: Any) -> None:
        raise Terminated(signum)

    is_main = threading.current_thread() is threading.main_thread()
    numbers = [each for each in (signal.SIGTERM, signal.SIGHUP) if is_main and signal.getsignal(each) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, terminate)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def make_parser() -> argparse.ArgumentParser:
    """Every command adds its flags; what a command needs to run is imported when it runs."""
    parser = Parser(prog="wan-jax", description="Wan video models in JAX.")
    parser.add_argument("--version", action="version", version=f"wan-jax {wan_jax.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add_command(commands)
    for entry_point in entry_points(group="wan_jax.commands"):
        entry_point.load()(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
