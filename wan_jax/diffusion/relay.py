"""Two videos at once, one at each expert, where each expert has devices of its own.

While the low-noise expert makes the last steps of one video, the high-noise expert makes the first ones of the next. So
all devices work and no weights ever move, but for the first video's high noise and the last one's low noise.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp

from wan_jax.diffusion.conditioning import TEXT_ONLY, Conditioning
from wan_jax.diffusion.loop import remaining, run_segment, start
from wan_jax.diffusion.segments import Segment
from wan_jax.diffusion.solvers import StepState
from wan_jax.diffusion.state import Preview, SamplingState, fingerprint
from wan_jax.diffusion.step import Expert
from wan_jax.runtime.events import CancelToken, Event, Run, StepDone


def denoise_in_relay(
    batches: Sequence[jax.Array | SamplingState],
    segments: Sequence[Segment],
    get_expert: Callable[[str, int], Expert],
    run: Run,
    conditioning: Sequence[Conditioning] | None = None,
    preview: Preview | None = None,
    videos: Sequence[str] | None = None,
) -> list[jax.Array]:
    """Turns noise into latents, for each batch as `loop.denoise` does.

    Args:
        batches: latents of each, float32 [B, C, F, h, w], on any devices, or the state to go on from. B is the size of
            the mesh's "data" axis.
        segments: the plan, the same for every batch; see `plan_segments`.
        get_expert: gives the expert of a name for a batch, the denoiser being the same for all. Its `placement` says
            where it runs; see `Placement.by_expert`. Called in threads.
        run: is told of each step, in the thread of its expert, and may cancel after each.
        conditioning: of each batch.
        preview: see `denoise`.
        videos: of each batch; see `denoise`.

    Returns:
        The latents of each batch, in order, on the devices of the last expert.
    """
    digests = [""] * len(batches) if videos is None else videos
    plans = [fingerprint(segments, each) for each in digests]
    known = [TEXT_ONLY] * len(batches) if conditioning is None else list(conditioning)
    # A thread for each expert, which takes the batches in order.
    threads = {segment.expert: ThreadPoolExecutor(1, thread_name_prefix=segment.expert) for segment in segments}
    stop = CancelToken()

    def tell(event: Event) -> None:
        if isinstance(event, StepDone):
            run.add_seconds("compile", event.compile_seconds)
        run.emit(event)
        run.check()

    inner = Run(tell, stop)

    def work(segment: Segment, index: int, before: Future[StepState] | None) -> StepState:
        state = start(batches[index], segments, known[index]) if before is None else before.result()
        expert = get_expert(segment.expert, index)
        first = sum(map(_rows, batches[:index]))
        rows = tuple(range(first, first + _rows(batches[index])))
        try:
            state, conditioned = expert.placement.put_batch(state), expert.placement.put(known[index])
            return run_segment(segment, expert, state, inner, plans[index], conditioned, preview, rows)
        finally:
            del expert  # a traceback keeps this frame

    results: list[jax.Array] = []
    last: dict[int, Future[StepState] | None] = {}
    try:
        for index, batch in enumerate(batches):
            last[index] = None
            for segment in remaining(batch, segments, digests[index]):
                last[index] = threads[segment.expert].submit(work, segment, index, last[index])
        for index, batch in enumerate(batches):
            future = last[index]
            state = start(batch, segments, known[index]) if future is None else future.result()
            results.append(jnp.asarray(state.latents))
        return results
    finally:
        stop.cancel()  # an error or Ctrl-C ends the other expert's work before its next step
        for thread in threads.values():
            thread.shutdown(cancel_futures=True)
        last.clear()


def _rows(batch: jax.Array | SamplingState) -> int:
    return len(batch.arrays.latents if isinstance(batch, SamplingState) else batch)
