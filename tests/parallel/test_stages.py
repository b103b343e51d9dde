"""Pipelines: when which video is at which stage, and that sampling in turns gives what one device gives."""

import numpy as np
import pytest

from tests.parallel.test_strategies import CONFIG, run
from wan_jax.parallel.stages import turns


@pytest.mark.parametrize(
    ("videos", "stages", "evaluations", "waiting"),
    # Turns of a stage without work in 6 steps: those before the first video arrives and after the last one left; and
    # in each round, where the videos are too few.
    [(2, 2, 2, 1), (4, 4, 1, 3), (2, 4, 2, 3 + 5), (1, 2, 2, 1 + 5), (5, 3, 1, 2)],
)
def test_turns(videos: int, stages: int, evaluations: int, waiting: int) -> None:
    steps, work = 6, videos * evaluations
    run = list(turns(steps, videos, stages, evaluations))
    assert len(run) == steps * work + waiting
    entered, finished, last_positive = {}, {}, None
    for time, turn in enumerate(run):
        key = turn.videos[0], turn.steps[0], turn.is_positive[0]
        entered.setdefault(key, time)
        for stage in range(1, stages):
            if time >= stage:  # what was at one stage is at the next one a turn later
                before = run[time - 1]
                assert turn.videos[stage] == before.videos[stage - 1]
                assert turn.steps[stage] == before.steps[stage - 1]
        if turn.finishes:
            assert turn.is_positive[-1] == (evaluations == 1)
            if evaluations == 2:
                assert last_positive == (turn.videos[-1], turn.steps[-1])  # its velocity is the one kept
            finished[turn.videos[-1], turn.steps[-1]] = time
        last_positive = (turn.videos[-1], turn.steps[-1]) if turn.is_positive[-1] else None
    assert len(finished) == steps * videos
    for video, step, is_positive in entered:
        if step and entered[video, step, is_positive]:
            assert entered[video, step, is_positive] > finished[video, step - 1]
    assert [turn.done for turn in run if turn.done is not None] == list(range(steps))


@pytest.mark.parametrize("strategy", ["pipeline2", "pipeline4", "data2-pipeline2"])
def test_one_video_or_several_give_the_latents_of_one_device(strategy: str) -> None:
    for batch in (2,) if "data" in strategy else (1, 3):
        alone = run(CONFIG, None, batch=batch)
        assert np.abs(run(CONFIG, strategy, batch=batch) - alone).max() < 1e-5 * np.abs(alone).max()
