"""`python -m wan_bench PART ...`: `wan-jax bench` from a checkout that is not installed."""

import argparse
import sys

from wan_bench.command import add_command
from wan_jax.runtime import xla_flags

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m wan_bench")
    add_command(parser.add_subparsers())
    values = parser.parse_args(["bench", *sys.argv[1:]])
    xla_flags.configure()
    xla_flags.use_compile_cache()
    values.run(values)
