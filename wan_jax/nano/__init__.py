"""The nano model: a procedural world, what trains on it, and the weights that ship with the package."""
