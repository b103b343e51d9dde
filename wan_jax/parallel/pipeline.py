"""Pipeline parallelism: each device has some of the layers, and the videos of a batch go from device to device.

While one stage works on a video, the stage before it works on the next one (Huang et al. 2018, arXiv:1811.06965). With
m videos, the prompt's and the negative prompt's counting apart, and p stages, a device works m turns of m + p - 1.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from wan_jax.parallel import collectives
from wan_jax.parallel.collectives import PIPELINE


def run_stages(run_layers: Callable[[jax.Array, Any, Any], jax.Array], x: jax.Array, rows: Any, layers: Any) -> Any:
    """Runs all layers, those of this device being a stage.

    Args:
      run_layers: (x, rows, layers) -> x for one video, a batch of 1, through this device's layers.
      x: [B, S, dim], the same on all devices along the pipeline.
      rows: arrays [B, ...] that go with x.
      layers: arrays [layers of this device, B, ...].

    Returns:
      [B, S, dim], valid on the last stage alone; see `from_last_stage`.
    """
    stages, stage, videos = collectives.size(PIPELINE), collectives.index(PIPELINE), x.shape[0]
    if stages == 1:
        return run_layers(x, rows, layers)
    following = [(device, device + 1) for device in range(stages - 1)]

    def turn(carry: tuple[jax.Array, jax.Array], index: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        arrived, outputs = carry
        video = jnp.clip(index - stage, 0, videos - 1)  # out of range: the stage has nothing to do, and does it anyway

        def one(axis: int) -> Callable:
            return lambda array: lax.dynamic_slice_in_dim(array, video, 1, axis)

        y = jnp.where(stage == 0, one(0)(x), arrived)
        y = run_layers(y, jax.tree.map(one(0), rows), jax.tree.map(one(1), layers))
        # Early turns write rubbish to place 0, which the last stage's first own turn overwrites.
        outputs = lax.dynamic_update_slice_in_dim(outputs, y, video, 0)
        return (lax.ppermute(y, PIPELINE, following), outputs), None

    turns = jnp.arange(videos + stages - 1)
    (_, outputs), _ = lax.scan(turn, (jnp.zeros_like(x[:1]), jnp.zeros_like(x)), turns)
    return outputs


def from_last_stage(array: jax.Array) -> jax.Array:
    """What the last stage has, on all."""
    if collectives.size(PIPELINE) == 1:
        return array
    is_last = collectives.index(PIPELINE) == collectives.size(PIPELINE) - 1
    return lax.psum(jnp.where(is_last, array, jnp.zeros_like(array)), PIPELINE)
