"""Two videos at once, one at each expert, where each expert has devices of its own.

While the low-noise expert makes the last steps of one video, the high-noise expert makes the first ones of the next. So
all devices work and no weights ever move, but for the first video's high noise and the last one's low noise.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any

import jax

from wan_jax.diffusion.conditioning import TEXT_ONLY, Conditioning
from wan_jax.diffusion.loop import StepReport, run_segment
from wan_jax.diffusion.segments import Segment
from wan_jax.diffusion.step import Expert


def denoise_in_relay(
    videos: Sequence[jax.Array],
    segments: Sequence[Segment],
    get_expert: Callable[[str, int], Expert],
    on_step: Callable[[int, StepReport], None] | None = None,
    conditioning: Sequence[Conditioning] | None = None,
) -> list[jax.Array]:
    """Turns noise into latents, for each video as `loop.denoise` does.

    Args:
        videos: latents of each, float32 [B, C, F, h, w], on any devices; B is 1, or the size of a batch that stays
            together.
        segments: the plan, the same for every video; see `plan_segments`.
        get_expert: gives the expert of a name for a video, the denoiser being the same for all. Its `placement` says
            where it runs; see `Placement.by_expert`. Called in threads.
        on_step: called after each step of a video, in the thread of its expert.
        conditioning: of each video.

    Returns:
        The latents of each video, in order, on the devices of the last expert.
    """
    known = [TEXT_ONLY] * len(videos) if conditioning is None else list(conditioning)
    # A thread for each expert, which takes the videos in order.
    threads = {segment.expert: ThreadPoolExecutor(1, thread_name_prefix=segment.expert) for segment in segments}

    is_over = threading.Event()

    def run(segment: Segment, index: int, before: Future | None) -> Any:
        def after_step(report: StepReport) -> None:
            if is_over.is_set():
                raise CancelledError
            if on_step is not None:
                on_step(index, report)

        state = None if before is None else before.result()
        expert = get_expert(segment.expert, index)
        placement = expert.placement
        conditioned = placement.put(known[index])
        if state is None:
            state = segment.solver.init(conditioned.restore(placement.put_batch(videos[index])))
        return run_segment(segment, expert, placement.put_batch(state), conditioned, after_step)

    try:
        states = []
        for index in range(len(videos)):
            future: Future | None = None
            for segment in segments:
                future = threads[segment.expert].submit(run, segment, index, future)
            states.append(future)
        return [state.result().latents for state in states if state is not None]
    finally:
        is_over.set()  # an error or Ctrl-C ends the other expert's work after its step
        for thread in threads.values():
            thread.shutdown(cancel_futures=True)
