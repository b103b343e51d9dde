"""Choices that may differ between the experts: one value for both, or a pair (low-noise expert, high-noise expert)."""

from collections.abc import Iterable
from typing import Any, TypeVar

from wan_jax.errors import InputError

T = TypeVar("T")


def as_pair(choice: T | tuple[T, T]) -> tuple[T, T]:
    """One value -> the same for both; a pair stays. The low-noise expert's comes first, as in the official configs."""
    return choice if isinstance(choice, tuple) else (choice, choice)


def by_expert(what: str, choice: Any, experts: Iterable[str]) -> dict[str, Any]:
    """The choice of each of the experts ("high_noise" and "low_noise", or "denoiser") by its name.

    Raises:
        InputError: a pair of two different values where there is one expert.
    """
    low, high = as_pair(choice)
    if "denoiser" in experts and low != high:
        raise InputError(f"{what} ({low}, {high}) is for two experts but the model has one; give one value")
    return {name: high if name == "high_noise" else low for name in experts}
