"""Functions compiled ahead of time, so that compiling never counts as running."""

from collections.abc import Callable
from typing import Any

import jax


class CompiledFunction:
    """A function jitted by shapes: `compile` does the slow part when it is due, calling does the rest.

    `matmul_precision` is the `jax.default_matmul_precision` to compile under; other keyword arguments go to `jax.jit`.
    """

    def __init__(self, function: Callable, *, matmul_precision: str | None = None, **jit_options: Any):
        self._jitted = jax.jit(function, **jit_options)
        self._matmul_precision = matmul_precision
        self._executables: dict[Any, jax.stages.Compiled] = {}

    def compile(self, *args: Any) -> bool:
        """Compiles for the shapes, dtypes and shardings of `args`; returns whether that had not been done yet."""
        key = _signature(args)
        if key in self._executables:
            return False
        with jax.default_matmul_precision(self._matmul_precision):
            self._executables[key] = self._jitted.lower(*args).compile()
        return True

    def __call__(self, *args: Any) -> Any:
        self.compile(*args)
        return self._executables[_signature(args)](*args)

    def workspace_bytes(self, *args: Any) -> int:
        """Device memory that a call takes beside its arguments; they may be abstract (jax.ShapeDtypeStruct)."""
        self.compile(*args)
        return workspace_bytes(self._executables[_signature(args)])


def workspace_bytes(executable: jax.stages.Compiled) -> int:
    """Device memory that one run takes beside its arguments: scratch, and results that do not reuse donated memory."""
    analysis: Any = executable.memory_analysis()
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes


def _signature(args: Any) -> Any:
    leaves, structure = jax.tree.flatten(args)
    return structure, tuple((leaf.shape, leaf.dtype, getattr(leaf, "sharding", None)) for leaf in leaves)
