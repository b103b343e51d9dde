"""Shared fixtures: the persistent compile cache, float32 matmuls, and no network."""

import os
import pathlib

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

CACHE = pathlib.Path(os.environ.get("WAN_JAX_TEST_CACHE", pathlib.Path.home() / ".cache" / "wan_jax" / "tests"))
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
