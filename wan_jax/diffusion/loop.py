"""The one denoise loop: it runs on the host and calls the compiled step (diffusion/step.py) for each step of a plan."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np
from flax import nnx

from wan_jax.diffusion.conditioning import TEXT_ONLY, Conditioning
from wan_jax.diffusion.segments import Segment, StepInputs
from wan_jax.diffusion.solvers import StepState
from wan_jax.diffusion.step import Expert, PipelineState, compile_step, initial_carry
from wan_jax.errors import InputError
from wan_jax.parallel import stages


@dataclass(frozen=True)
class StepReport:
    """What `denoise` tells its caller after each step."""

    index: int  # of the step that is done, from 0
    total: int
    expert: str
    seconds: float
    compile_seconds: float  # spent before this step, and not part of `seconds`; 0 if nothing was compiled


def denoise(
    latents: jax.Array,
    segments: Sequence[Segment],
    get_expert: Callable[[str], Expert],
    on_step: Callable[[StepReport], None] | None = None,
    conditioning: Conditioning = TEXT_ONLY,
) -> jax.Array:
    """Turns noise into latents of videos.

    Args:
        latents: float32 [B, C, F, h, w] at the plan's first noise level; left intact.
        segments: the plan; see `plan_segments`.
        get_expert: gives the expert of a name. Called once per segment, after the loop has dropped the expert before
            it, so that the caller may swap weights.
        on_step: called after each step.
        conditioning: the frames that are known beforehand.

    Returns:
        float32 [B, C, F, h, w], without noise.

    Raises:
        InputError: guidance without a negative prompt.
    """
    state = segments[0].solver.init(conditioning.restore(latents))
    for segment in segments:
        # The call holds the only reference to the expert, so that it is gone before the next one is asked for.
        state = run_segment(segment, get_expert(segment.expert), state, conditioning, on_step)
    return state.latents


def run_segment(
    segment: Segment,
    expert: Expert,
    state: StepState,
    conditioning: Conditioning,
    on_step: Callable[[StepReport], None] | None,
) -> StepState:
    """Runs consecutive steps of one expert; `state` is donated."""
    if not segment.is_guided:
        expert = replace(expert, negative=None)
    elif expert.negative is None:
        scale = segment.guidance[segment.guidance != 1][0]
        raise InputError(
            f"guidance {scale:g} of expert {segment.expert!r} needs a negative prompt; give one, or use guidance 1"
        )
    if segment.starts_solver and segment.steps.start > 0:
        state = segment.solver.init(state.latents)
    start = time.perf_counter()
    step = compile_step(expert, segment, state, conditioning)
    compile_seconds = time.perf_counter() - start
    arrays = nnx.state(expert.denoiser), expert.positive, expert.negative
    carry = initial_carry(expert, state)
    start = time.perf_counter()
    for inputs, done in _calls(expert, segment, len(state.latents)):
        carry = step(*arrays, carry, conditioning, *inputs)
        if done is None:
            continue
        # Waiting makes the reported seconds true and lets Ctrl-C in; it costs far less than a step.
        jax.block_until_ready(carry)
        if on_step is not None:
            seconds = time.perf_counter() - start
            on_step(StepReport(done, segment.total, segment.expert, seconds, compile_seconds))
        start, compile_seconds = time.perf_counter(), 0.0
    return carry.state if isinstance(carry, PipelineState) else carry


def _calls(
    expert: Expert, segment: Segment, videos: int
) -> Iterator[tuple[tuple[StepInputs, stages.Tick | None], int | None]]:
    """The inputs of each call of the compiled step, and the index of the step that all videos have done with it."""
    spec = expert.placement.mesh_spec
    if spec.pipeline == 1:
        for offset, index in enumerate(segment.steps):
            yield (segment.inputs(np.full(videos, offset)), None), index
        return
    evaluations = 1 if expert.negative is None or spec.cfg > 1 else 2
    for planned in stages.ticks(len(segment.steps), videos // spec.data, spec.pipeline, evaluations):
        done = None if planned.done is None else segment.steps[planned.done]
        yield (segment.inputs(np.tile(planned.steps_of_videos, spec.data)), planned.tick), done
