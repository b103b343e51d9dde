"""Choices that may differ between a model's two experts."""

from collections.abc import Iterable
from typing import Any, TypeVar

from wan_jax.config import PerExpert
from wan_jax.errors import InputError

T = TypeVar("T")


def as_pair(choice: T | tuple[T, T]) -> PerExpert[T]:
    """One value counts for both experts; a pair is (low-noise, high-noise), the order of the official configs."""
    return PerExpert(*choice) if isinstance(choice, tuple) else PerExpert(low=choice, high=choice)


def by_expert(what: str, choice: Any, experts: Iterable[str]) -> dict[str, Any]:
    """The choice of each expert ("high_noise" and "low_noise", or "denoiser") by its name.

    Raises:
        InputError: a pair of two different values where there is one expert.
    """
    low, high = as_pair(choice)
    if "denoiser" in experts and low != high:
        raise InputError(f"{what} ({low}, {high}) is for two experts but the model has one; give one value")
    return {name: high if name == "high_noise" else low for name in experts}
