"""Converts any published Wan checkpoint to diffusers: python convert/to_diffusers.py SRC DST [--dtype bfloat16]."""

import sys

from wan_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:], "--to", "diffusers"]))
