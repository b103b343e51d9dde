"""Wan text-to-video models in JAX and Flax."""
