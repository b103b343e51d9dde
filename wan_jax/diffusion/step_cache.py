"""EasyCache (Zhou et al. 2025, arXiv:2507.02860): steps that hardly change the velocity go without the denoiser.

From one computed step to the next the velocity v changes with the latents x at a rate |dv| / |dx|, | | being the mean
of absolute values of a video. So a step that moves x by dx is expected to change v by rate * |dx| / |v| of itself.
While the sum of these estimates since the last computed step is below the threshold, v is x + (v - x of that step).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from wan_jax.diffusion.guidance import per_video
from wan_jax.parallel import collectives
from wan_jax.parallel.collectives import DATA


def thresholds(threshold: float | None, steps: int) -> np.ndarray | None:
    """Of an expert's steps; None: no cache. The last is computed, and the first fifth: two renew all that is cached."""
    if not threshold:
        return None
    values = np.full(steps, threshold, np.float32)
    values[: max(2, round(steps / 5))] = values[-1:] = 0
    return values


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepCache:
    """What the steps before leave, a row per video; float32."""

    before: Any  # latents of the step before, [B, C, F, h, w]
    latents: Any  # of the last computed step
    velocity: Any  # of that step
    rate: Any  # [B]
    error: Any  # [B], the sum of the estimates
    saved: Any  # [B], forward passes that were not needed

    @classmethod
    def start(cls, shape: Sequence[int]) -> "StepCache":
        """Zeros for latents of this shape, on the host."""
        return cls(*(np.zeros(each, np.float32) for each in [shape] * 3 + [shape[:1]] * 3))

    def velocity_of(
        self, latents: jax.Array, threshold: jax.Array, evaluate: Callable[[], jax.Array], forwards: int
    ) -> tuple[jax.Array, "StepCache"]:
        """The velocity, by `evaluate`, of `forwards` passes, unless no video needs it; and the cache after it."""

        def size(x: jax.Array) -> jax.Array:
            return jnp.abs(x).mean(axis=range(1, x.ndim))

        def kept(old: jax.Array, new: jax.Array) -> jax.Array:
            return jnp.where(per_video(skips, new), old, new)

        error = self.error + self.rate * size(latents - self.before) / size(self.velocity)
        skips = error < threshold  # not where it is NaN, as in the first step
        needed = jnp.any(~skips).astype(jnp.int32)
        if collectives.size(DATA) > 1:  # all devices decide the same: they work together
            needed = lax.pmax(needed, DATA)
        new = lax.cond(needed > 0, evaluate, lambda: jnp.zeros_like(self.velocity))
        rate = size(new - self.velocity) / size(latents - self.latents)
        after = (
            kept(self.latents, latents),
            kept(self.velocity, new),
            kept(self.rate, rate),
            kept(error, jnp.zeros_like(error)),
        )
        cache = StepCache(latents, *after, self.saved + forwards * skips)
        return kept(latents + (self.velocity - self.latents), new), cache
