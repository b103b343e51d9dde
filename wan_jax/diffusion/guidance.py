"""Classifier-free guidance: how strongly the prompt pulls the velocity away from the negative prompt's."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wan_jax.diffusion.experts import as_pair, by_expert
from wan_jax.errors import InputError


def classifier_free_guidance(conditional: jax.Array, unconditional: jax.Array, scale: jax.Array) -> jax.Array:
    """v = v_uncond + scale * (v_cond - v_uncond), in float32 (Ho and Salimans 2022).

    Args:
        conditional, unconditional: velocities [B, ...] for the prompts and for the negative prompts.
        scale: [B].
    """
    conditional, unconditional = conditional.astype(jnp.float32), unconditional.astype(jnp.float32)
    return unconditional + per_video(scale, conditional) * (conditional - unconditional)


def per_video(values: jax.Array, like: jax.Array) -> jax.Array:
    """[B] -> [B, 1, ...], to be multiplied with an array [B, ...]."""
    return jnp.expand_dims(values, range(1, like.ndim))


def guidance_by_expert(guidance: Any, experts: tuple[str, ...]) -> dict[str, Any]:
    """Says which scale each expert uses.

    Args:
        guidance: a scale, 1 for no guidance; or a list with one for each video; or a pair (low-noise expert, high-noise
            expert) of either.
        experts: names of the experts in the plan.

    Raises:
        InputError: a scale that is not finite, or two different scales where there is one expert.
    """
    if not all(np.isfinite(scale).all() for scale in as_pair(guidance)):
        raise InputError(f"guidance {guidance} is not finite; give a number, 1 for no guidance")
    return by_expert("guidance", guidance, experts)
