"""The loop: resuming after a kill, what is kept, what is written, what is refused."""

import dataclasses
import itertools
import json
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training import killed_run
from wan_jax.errors import InputError
from wan_jax.training.checkpoints import Checkpoints
from wan_jax.training.config import OptimizerConfig, TrainerConfig
from wan_jax.training.metrics import read_metrics
from wan_jax.training.trainer import Every


def steps_on_disk(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


def test_a_killed_run_resumes_to_the_same_losses(tmp_path):
    command = [sys.executable, "-m", "tests.training.killed_run"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for fatal in ("6", "8"):  # at 8 the checkpoint of step 8 has just been asked for
        process = subprocess.run([*command, str(killed), "14", fatal], check=False)
        assert process.returncode == -signal.SIGKILL
    killed_run.trainer(killed, 14).run()
    killed_run.trainer(whole, 14).run()
    rows, expected = read_metrics(killed), read_metrics(whole)
    assert [row["step"] for row in rows] == [row["step"] for row in expected] == list(range(1, 15))
    for row, other in zip(rows, expected, strict=True):
        for name in ("loss", "gradient_norm", "largest", "learning_rate"):
            assert abs(row[name] - other[name]) <= 1e-6 * abs(other[name])


def test_what_is_restored_is_what_was_saved(tmp_path):
    first = killed_run.trainer(tmp_path, 6)
    first.run()
    second = killed_run.trainer(tmp_path, 6)
    assert second.step == 6
    assert jax.tree.structure(second.state) == jax.tree.structure(first.state)
    for restored, saved in zip(jax.tree.leaves(second.state), jax.tree.leaves(first.state), strict=True):
        np.testing.assert_array_equal(restored, saved)
    second.run()  # nothing is left to do
    assert len(read_metrics(tmp_path)) == 6


def test_checkpoints_are_kept_by_policy(tmp_path):
    killed_run.trainer(tmp_path, 11, save_every=2, keep_last=2, keep_every=4).run()
    assert steps_on_disk(tmp_path) == [4, 8, 10, 11]


def test_other_parameters_are_refused(tmp_path):
    killed_run.trainer(tmp_path, 3).run()
    with pytest.raises(InputError, match="another model"):
        killed_run.trainer(tmp_path, 3, ema_decay=None)


def test_half_a_line_is_dropped(tmp_path):
    killed_run.trainer(tmp_path, 4).run()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    killed_run.trainer(tmp_path, 6).run()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_intervals_and_speed(tmp_path):
    seen = []

    def measure(step, state):
        seen.append((step, int(state.step)))
        return {"quality": 0.5}

    lines = []
    arguments = {
        "intervals": [Every(2, measure)],
        "flops": lambda batch: 1e3 * batch["x"].size,
        "peak_flops": 1e12,
        "show": lines.append,
    }
    killed_run.trainer(tmp_path, 5, arguments=arguments).run()
    assert seen == [(2, 2), (4, 4), (5, 5)]
    rows = {row["step"]: row for row in read_metrics(tmp_path)}
    assert [step for step, row in rows.items() if "quality" in row] == [2, 4, 5]
    assert rows[3]["mfu"] == pytest.approx(1e3 * 12 * rows[3]["steps_per_second"] / 1e12)
    assert lines[-1].startswith("step 5/5  loss ")
    assert "MFU" in lines[-1]
    assert lines[-1].endswith("0:00 left")


def test_a_run_of_seconds(tmp_path):
    """It makes one step at least, its schedule follows the clock, and a later call goes on with other lengths."""
    first = killed_run.trainer(tmp_path, 1, seconds=1e-3, later_seconds=1e4)
    assert first.fraction < 0.01
    first.run()
    assert first.step == 1
    assert steps_on_disk(tmp_path) == [1]
    second = killed_run.trainer(tmp_path, 1, seconds=0.5, save_every=1)
    second.run()
    rows = read_metrics(tmp_path)
    assert second.step > 1
    assert [row["step"] for row in rows] == list(range(1, second.step + 1))
    assert second.fraction == 1
    assert rows[-1]["learning_rate"] < rows[5]["learning_rate"]


def test_where_the_schedule_of_a_run_of_seconds_begins(tmp_path):
    trainer = killed_run.trainer(tmp_path, 1, seconds=50.0, later_seconds=50.0, start_fraction=0.5)
    assert trainer.fraction == pytest.approx(0.5, abs=0.05)


def test_two_trainers_take_turns_with_one_compiled_step(tmp_path):
    """Each gets what it would get alone."""
    first = killed_run.trainer(tmp_path / "first", 4)
    second = killed_run.trainer(tmp_path / "second", 4, seed=1, arguments={"same_step": first})
    assert list(itertools.zip_longest(first.steps(), second.steps())) == [(n, n) for n in range(1, 5)]
    alone = killed_run.trainer(tmp_path / "alone", 4, seed=1)
    alone.run()
    assert read_metrics(tmp_path / "second")[-1]["loss"] == read_metrics(tmp_path / "alone")[-1]["loss"]
    assert read_metrics(tmp_path / "first")[-1]["loss"] != read_metrics(tmp_path / "alone")[-1]["loss"]


def test_batches_made_on_the_device(tmp_path):
    def make(step):
        return jax.tree.map(jnp.asarray, killed_run.make_batch(step))

    made, read = (
        killed_run.trainer(tmp_path / "made", 3, make, accumulation=2),
        killed_run.trainer(tmp_path / "read", 3, accumulation=2),
    )
    made.compile(killed_run.make_batch(0))
    for ours, expected in zip(jax.tree.leaves(made.run()), jax.tree.leaves(read.run()), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_figures_every_few_steps(tmp_path):
    killed_run.trainer(tmp_path, 8, metrics_every=3, log_every=100, save_every=100).run()
    assert [row["step"] for row in read_metrics(tmp_path)] == [3, 6, 8]


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(tmp_path):
    def make(step):
        batch = killed_run.make_batch(step)
        return batch if step < 6 else {"x": batch["x"] * np.inf, "y": batch["y"]}

    with pytest.raises(InputError, match=r"step 7.*not finite"):
        killed_run.trainer(tmp_path, 9, make).run()
    assert steps_on_disk(tmp_path) == [4]


def test_a_batch_that_does_not_divide(tmp_path):
    with pytest.raises(InputError, match="batch of 4"):
        killed_run.trainer(tmp_path, 3, accumulation=3).run()


def test_config_errors():
    with pytest.raises(InputError, match="save_every 0"):
        TrainerConfig(save_every=0)


def test_unfinished_checkpoints_are_not_read(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2, keep_every=None)
    checkpoints.save(3, {"a": jnp.ones(2)}, {"next": 3})
    checkpoints.close()
    (tmp_path / "4.orbax-checkpoint-tmp").mkdir()
    again = Checkpoints(tmp_path, keep_last=2, keep_every=None)
    assert again.latest == 3
    state, metadata = again.load(3, {"a": jnp.zeros(2)})
    np.testing.assert_array_equal(state["a"], [1, 1])
    assert metadata == {"next": 3}
    again.close()


def test_optimizer_without_ema_or_warm_up(tmp_path):
    optimizer = OptimizerConfig(warmup_steps=0, schedule="constant", learning_rate=0.5)
    trainer = killed_run.trainer(tmp_path, 2, ema_decay=None, optimizer=optimizer)
    trainer.run()
    assert trainer.state.ema is None
    assert trainer.averaged is trainer.state.parameters
    assert [row["learning_rate"] for row in read_metrics(tmp_path)] == [0.5, 0.5]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1
    assert dataclasses.is_dataclass(trainer.state)
