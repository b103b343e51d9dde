"""Converts any published Wan checkpoint into ours: python convert/to_orbax.py SRC DST [--dtype bfloat16]."""

import sys

from wan_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:], "--to", "orbax"]))
