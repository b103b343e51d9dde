"""The making of the nano model: a procedural world, what trains on it, and what judges it. wan_jax never imports it."""
