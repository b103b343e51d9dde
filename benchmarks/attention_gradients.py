"""Gradients of attention on a GPU: errors at even and odd lengths, and seconds at the length of 832x480x81.

    python -m benchmarks.attention_gradients [--output DIR]

Errors are ||ours - reference|| / ||reference|| against the reference in float32, for query, key and value. Results go
to DIR/attention_gradients.json (DIR: $OUT, or benchmarks/results) after every figure.
"""

import argparse
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.attention import normal
from wan_jax.kernels.attention import attention

NAMES = ("pallas_gpu", "cudnn", "chunked", None)
LENGTHS = (4096, 3001)  # cuDNN's backward pass takes the first
LONG = 32_760
RUNS = 3


def gradients(name: str | None, *inputs: jax.Array) -> tuple[jax.Array, ...]:
    """Of the sum of the output's squares, half: no entry is like another."""

    def loss(*inputs: jax.Array) -> jax.Array:
        return 0.5 * jnp.sum(attention(*inputs, implementation=name).astype(jnp.float32) ** 2)

    return jax.grad(loss, argnums=(0, 1, 2))(*inputs)


def errors(name: str | None, length: int) -> list[float]:
    inputs = [normal(seed, length, heads=2) for seed in range(3)]
    expected = gradients("reference", *(x.astype(jnp.float32) for x in inputs))
    ours = jax.jit(lambda *inputs: gradients(name, *inputs))(*inputs)
    pairs = zip(ours, expected, strict=True)
    return [float(jnp.linalg.norm(x.astype(jnp.float32) - y) / jnp.linalg.norm(y)) for x, y in pairs]


def seconds(name: str | None, length: int) -> float:
    """Forward and backward together."""
    inputs = [normal(seed, length) for seed in range(3)]
    compiled = jax.jit(lambda *inputs: gradients(name, *inputs)).lower(*inputs).compile()
    times = []
    for _ in range(1 + RUNS):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*inputs))
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[RUNS // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = pathlib.Path(os.environ.get("OUT", "benchmarks/results"))
    parser.add_argument("--output", type=pathlib.Path, default=default)
    path = parser.parse_args().output / "attention_gradients.json"
    result: dict[str, Any] = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    tasks: list[tuple[str, Callable, str | None, int]] = []
    tasks += [(f"error {length} {name}", errors, name, length) for length in LENGTHS for name in NAMES]
    tasks += [(f"seconds {length} {name}", seconds, name, length) for length in (LONG, LONG - 1) for name in NAMES[:3]]
    for label, measure, name, length in tasks:
        try:
            result[label] = measure(name, length)
        except Exception as failure:  # the others go on
            result[label] = f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
        print(label, result[label], flush=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
