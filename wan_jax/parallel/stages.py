"""Pipeline parallelism: each device has some of the layers, and the videos of a batch go from device to device.

While one stage works on a video, the stage before it works on the next one (Huang et al. 2018, arXiv:1811.06965). With
m videos, the prompt's and the negative prompt's counting apart, and p stages, a device works m ticks of m + p - 1 in
one forward pass (`run_stages`). Sampling need not wait for the last stage between its steps: a video that is through
goes in at the front again while others are on their way, and a device waits p - 1 ticks in a whole run (`ticks`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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

    def tick(carry: tuple[jax.Array, jax.Array], index: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        arrived, outputs = carry
        video = jnp.clip(index - stage, 0, videos - 1)  # out of range: the stage has nothing to do, and does it anyway

        def one(axis: int) -> Callable:
            return lambda array: lax.dynamic_slice_in_dim(array, video, 1, axis)

        y = jnp.where(is_first_stage(), one(0)(x), arrived)
        y = run_layers(y, jax.tree.map(one(0), rows), jax.tree.map(one(1), layers))
        # Early ticks write to place 0 what the last stage's first own tick overwrites.
        outputs = lax.dynamic_update_slice_in_dim(outputs, y, video, 0)
        return (to_next_stage(y), outputs), None

    (_, outputs), _ = lax.scan(tick, (jnp.zeros_like(x[:1]), jnp.zeros_like(x)), jnp.arange(videos + stages - 1))
    return outputs


def is_first_stage() -> jax.Array | bool:
    return collectives.index(PIPELINE) == 0


def to_next_stage(array: jax.Array) -> jax.Array:
    """What the stage before has; zeros on the first."""
    return lax.ppermute(array, PIPELINE, [(stage, stage + 1) for stage in range(collectives.size(PIPELINE) - 1)])


def from_last_stage(array: jax.Array) -> jax.Array:
    """What the last stage has, on all."""
    if collectives.size(PIPELINE) == 1:
        return array
    is_last = collectives.index(PIPELINE) == collectives.size(PIPELINE) - 1
    return lax.psum(jnp.where(is_last, array, jnp.zeros_like(array)), PIPELINE)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tick:
    """What each stage works on at one time, an entry per stage; nobody reads what an idle stage computes."""

    videos: np.ndarray  # int32
    is_conditional: np.ndarray  # bool: the prompt's evaluation, or the negative prompt's
    finishes: np.ndarray  # bool []: whether all evaluations of a step are done for the last stage's video


@dataclass(frozen=True)
class PlannedTick:
    """A tick, and what the host must know to feed it."""

    tick: Tick
    steps: np.ndarray  # of each stage's video, counted from 0
    steps_of_videos: np.ndarray  # the same, of each video; 0 for a video that is nowhere
    done: int | None  # the step that all videos have done with this tick


def ticks(steps: int, videos: int, stages: int, evaluations: int) -> Iterator[PlannedTick]:
    """A run of `steps` steps, with `evaluations` of the model (1, or 2 with guidance) for a video's step.

    Videos go round: each enters again when its step before is done. Where there are fewer than the stages need for
    that, some ticks of each round are left empty.
    """
    work = videos * evaluations
    round_length = max(work, stages + evaluations - 1)
    for tick in range((steps - 1) * round_length + work + stages - 1):
        step, place = np.divmod(tick - np.arange(stages), round_length)
        is_busy = (place < work) & (step >= 0) & (step < steps)
        step, place = np.where(is_busy, step, 0), np.where(is_busy, place, 0)
        video = (place // evaluations).astype(np.int32)
        finishes = is_busy[-1] & (place[-1] % evaluations == evaluations - 1)
        done = int(step[-1]) if finishes and place[-1] == work - 1 else None
        steps_of_videos = np.zeros(videos, np.int64)
        steps_of_videos[video[is_busy]] = step[is_busy]
        yield PlannedTick(Tick(video, place % evaluations == 0, finishes), step, steps_of_videos, done)
