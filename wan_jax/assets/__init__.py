"""Files that ship with the package: the weights of the nano model, a diffusers tree with its model card."""

from pathlib import Path

NANO_WEIGHTS = Path(__file__).parent / "nano"
