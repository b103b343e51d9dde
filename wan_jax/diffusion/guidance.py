"""Classifier-free guidance: how strongly the prompt pulls the velocity away from the negative prompt's."""

import math

import jax
import jax.numpy as jnp

from wan_jax.diffusion.experts import as_pair, by_expert
from wan_jax.errors import InputError


def classifier_free_guidance(conditional: jax.Array, unconditional: jax.Array, scale: jax.Array) -> jax.Array:
    """v = v_uncond + scale * (v_cond - v_uncond), in float32 (Ho and Salimans 2022)."""
    conditional, unconditional = conditional.astype(jnp.float32), unconditional.astype(jnp.float32)
    return unconditional + scale * (conditional - unconditional)


def guidance_by_expert(guidance: float | tuple[float, float], experts: tuple[str, ...]) -> dict[str, float]:
    """Says which scale each expert uses.

    Args:
        guidance: (low-noise expert, high-noise expert), in the official order, or one number for all; 1 is none.
        experts: names of the experts in the plan.

    Raises:
        InputError: a scale that is not finite, or two different scales where there is one expert.
    """
    if not all(map(math.isfinite, as_pair(guidance))):
        raise InputError(f"guidance {guidance} is not finite; give a number, 1 for no guidance")
    return by_expert("guidance", guidance, experts)
