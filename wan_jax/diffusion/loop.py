"""The one denoise loop: it runs on the host and calls the compiled step (diffusion/step.py) for each step of a plan."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wan_jax.diffusion.conditioning import TEXT_ONLY, Conditioning
from wan_jax.diffusion.segments import Segment, StepInputs
from wan_jax.diffusion.solvers import StepState
from wan_jax.diffusion.state import Preview, SamplingState, Snapshot, fingerprint
from wan_jax.diffusion.step import Expert, PipelineState, compile_step, initial_carry
from wan_jax.errors import InputError
from wan_jax.parallel import stages
from wan_jax.runtime.events import Run, StepDone


def denoise(
    latents: jax.Array | SamplingState,
    segments: Sequence[Segment],
    get_expert: Callable[[str], Expert],
    run: Run,
    conditioning: Conditioning = TEXT_ONLY,
    preview: Preview | None = None,
    videos: str = "",
) -> jax.Array:
    """Turns noise into latents of videos.

    Args:
        latents: float32 [B, C, F, h, w] at the plan's first noise level, left intact; or the state to go on from.
        segments: the plan; see `plan_segments`.
        get_expert: gives the expert of a name. Called once per segment, after the loop has dropped the expert before
            it, so that the caller may swap weights.
        run: is told of each step, and may cancel before each.
        conditioning: the frames that are known beforehand.
        preview: what `StepDone.preview` shows of the predicted clean latents.
        videos: a digest of what the videos are made of; a state of others is refused.

    Returns:
        float32 [B, C, F, h, w], without noise.

    Raises:
        InputError: guidance without a negative prompt, or a state of another plan.
        Cancelled: what the loop had on the device is freed.
    """
    plan, state = fingerprint(segments, videos), start(latents, segments, conditioning)
    for segment in remaining(latents, segments, videos):
        # The call holds the only reference to the expert, so that it is gone before the next one is asked for.
        state = run_segment(segment, get_expert(segment.expert), state, run, plan, conditioning, preview)
    return jnp.asarray(state.latents)


def start(latents: jax.Array | SamplingState, segments: Sequence[Segment], conditioning: Conditioning) -> StepState:
    """The state before the first step that is left."""
    if isinstance(latents, SamplingState):
        return latents.arrays
    return segments[0].solver.init(conditioning.restore(latents))


def remaining(latents: jax.Array | SamplingState, segments: Sequence[Segment], videos: str) -> Sequence[Segment]:
    """The part of the plan that is left."""
    return latents.remaining(segments, videos) if isinstance(latents, SamplingState) else segments


def run_segment(
    segment: Segment,
    expert: Expert,
    state: StepState,
    run: Run,
    plan: str,
    conditioning: Conditioning = TEXT_ONLY,
    preview: Preview | None = None,
    videos: tuple[int, ...] | None = None,
) -> StepState:
    """Runs consecutive steps of one expert.

    Args:
        state: on the expert's devices, and donated; or on the host.
        plan: fingerprint of the whole plan.
        videos: what the rows of the state are called in events; None counts them from 0.
    """
    if not segment.is_guided:
        expert = replace(expert, uncond=None)
    elif expert.uncond is None:
        scale = segment.guidance[segment.guidance != 1][0]
        raise InputError(
            f"guidance {scale:g} of expert {segment.expert!r} needs a negative prompt; give one, or use guidance 1"
        )
    if isinstance(state.latents, np.ndarray):
        state = expert.placement.put_batch(state)
    if segment.starts_solver and segment.steps.start > 0:
        state = segment.solver.init(state.latents)
    videos = tuple(range(len(state.latents))) if videos is None else videos
    started = time.perf_counter()
    step = compile_step(expert, segment, state, conditioning)
    compile_seconds = time.perf_counter() - started
    run.add_seconds("compile", compile_seconds)
    arrays = nnx.state(expert.denoiser), expert.cond, expert.uncond
    carry = initial_carry(expert, state)
    try:
        started = time.perf_counter()
        for inputs, done in _calls(expert, segment, len(videos)):
            run.check()
            carry = step(*arrays, carry, conditioning, *inputs)
            if done is None:
                continue
            # Waiting makes the reported seconds true and lets Ctrl-C in; it costs far less than a step.
            jax.block_until_ready(carry)
            seconds = time.perf_counter() - started
            with Snapshot(done + 1, _state_of(carry), plan, expert.placement) as snapshot:
                shown = None if preview is None else partial(snapshot.show, preview, conditioning)
                run.emit(
                    StepDone(
                        step=done + 1,
                        total=segment.total,
                        expert=segment.expert,
                        seconds=seconds,
                        compile_seconds=compile_seconds,
                        videos=videos,
                        preview=shown,
                        state=snapshot.take,
                    )
                )
            started, compile_seconds = time.perf_counter(), 0.0
    except BaseException:
        # A traceback keeps this frame, and with it references to all that the run has on the device.
        jax.tree.map(lambda array: array.delete(), carry)
        del expert, arrays
        raise
    return _state_of(carry)


def _state_of(carry: StepState | PipelineState) -> StepState:
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
    evaluations = 1 if expert.uncond is None or spec.cfg > 1 else 2
    for planned in stages.ticks(len(segment.steps), videos // spec.data, spec.pipeline, evaluations):
        done = None if planned.done is None else segment.steps[planned.done]
        yield (segment.inputs(np.tile(planned.steps_of_videos, spec.data)), planned.tick), done
