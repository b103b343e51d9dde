"""The nano model: a procedural world, what trains on it, what judges it, and the weights that ship with the package."""

from pathlib import Path

# A diffusers tree of the preset "nano" and its model card.
WEIGHTS = Path(__file__).parent / "weights"
