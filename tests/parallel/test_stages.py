"""Pipelines: when which video is at which stage, and that sampling in ticks gives what one device gives."""

import numpy as np
import pytest

from tests.parallel.test_strategies import CONFIG, run
from wan_jax.parallel.stages import ticks


@pytest.mark.parametrize(
    ("videos", "stages", "evaluations", "waiting"),
    # Ticks of a stage without work in 6 steps: those before the first video arrives and after the last one left; and
    # in each round, where the videos are too few.
    [(2, 2, 2, 1), (4, 4, 1, 3), (2, 4, 2, 3 + 5), (1, 2, 2, 1 + 5), (5, 3, 1, 2)],
)
def test_ticks(videos: int, stages: int, evaluations: int, waiting: int) -> None:
    steps, work = 6, videos * evaluations
    run = list(ticks(steps, videos, stages, evaluations))
    assert len(run) == steps * work + waiting
    entered, finished, last_conditional = {}, {}, None
    for time, planned in enumerate(run):
        key = planned.tick.videos[0], planned.steps[0], planned.tick.is_conditional[0]
        entered.setdefault(key, time)
        for stage in range(1, stages):
            if time >= stage:  # what was at one stage is at the next one a tick later
                before = run[time - 1]
                assert planned.tick.videos[stage] == before.tick.videos[stage - 1]
                assert planned.steps[stage] == before.steps[stage - 1]
        if planned.tick.finishes:
            assert planned.tick.is_conditional[-1] == (evaluations == 1)
            if evaluations == 2:
                assert last_conditional == (planned.tick.videos[-1], planned.steps[-1])  # its velocity is the one kept
            finished[planned.tick.videos[-1], planned.steps[-1]] = time
        last_conditional = (planned.tick.videos[-1], planned.steps[-1]) if planned.tick.is_conditional[-1] else None
    assert len(finished) == steps * videos
    for video, step, is_conditional in entered:
        if step and entered[video, step, is_conditional]:
            assert entered[video, step, is_conditional] > finished[video, step - 1]
    assert [planned.done for planned in run if planned.done is not None] == list(range(steps))


@pytest.mark.parametrize("strategy", ["pipeline2", "pipeline4", "data2-pipeline2"])
def test_one_video_or_several_give_the_latents_of_one_device(strategy: str) -> None:
    for batch in (2,) if "data" in strategy else (1, 3):
        alone = run(CONFIG, "single", batch=batch)
        assert np.abs(run(CONFIG, strategy, batch=batch) - alone).max() < 1e-5 * np.abs(alone).max()
