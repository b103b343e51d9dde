"""Events, stages, notes and cancelling, without a model."""

import threading
import warnings

import jax.numpy as jnp
import pytest

from wan_jax.errors import Cancelled
from wan_jax.runtime.compiled import CompiledFunction
from wan_jax.runtime.events import CancelToken, Note, Run, StageDone, StageStarted, listeners

pytestmark = pytest.mark.quick


def test_a_stage_is_reported_and_timed():
    first, second = [], []
    run = Run(listeners(first.append, second.append))
    with run.stage("denoise", total=3):
        run.note("hello")
    started, note, done = first
    assert started == StageStarted("denoise", 3)
    assert note == Note("hello")
    assert done == StageDone("denoise", run.seconds["denoise"])
    assert second == first


def test_a_stage_that_fails_is_over():
    events = []
    run = Run(events.append)
    with pytest.raises(OSError, match="gone"), run.stage("decode"):
        raise OSError("gone")
    assert isinstance(events[-1], StageDone)


def test_compiling_is_counted_apart():
    run, double = Run(), CompiledFunction(lambda x: 2 * x)
    with run.stage("text"):
        assert run.call(double, jnp.ones(3)).tolist() == [2, 2, 2]
    compiled = run.seconds["compile"]
    assert compiled > 0
    run.call(double, jnp.ones(3))
    assert run.seconds["compile"] == compiled


def test_notes_are_warnings_of_the_caller_where_nobody_listens():
    with pytest.warns(UserWarning, match="stretched") as caught:
        Run().note("the image is stretched")
    assert caught[0].filename == __file__


def test_a_listener_takes_the_notes():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Run(lambda event: None).note("the image is stretched")


def test_cancelling_from_another_thread():
    token = CancelToken()
    run = Run(cancel=token)
    run.check()
    thread = threading.Thread(target=token.cancel)
    thread.start()
    thread.join()
    assert token.cancelled
    with pytest.raises(Cancelled):
        run.check()
    with pytest.raises(Cancelled), run.stage("denoise"):
        pytest.fail("a cancelled run starts no stage")
