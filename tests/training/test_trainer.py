"""The loop: resuming after a kill, what is kept, what is written, what is refused."""

import dataclasses
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
    for ours, theirs in zip(jax.tree.leaves(second.state), jax.tree.leaves(first.state), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    second.run()  # nothing is left to do
    assert len(read_metrics(tmp_path)) == 6


def test_checkpoints_are_kept_by_policy(tmp_path):
    killed_run.trainer(tmp_path, 11, save_every=2, keep_last=2, keep_every=4).run()
    assert steps_on_disk(tmp_path) == [4, 8, 10, 11]


def test_other_parameters_are_refused(tmp_path):
    killed_run.trainer(tmp_path, 3).run()
    with pytest.raises(InputError, match="another model or optimizer"):
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

    trainer = killed_run.trainer(tmp_path, 5)
    trainer._intervals = [Every(2, measure)]
    trainer._flops, trainer._peak_flops = lambda batch: 1e3 * batch["x"].size, 1e12
    trainer._show = (lines := []).append
    trainer.run()
    assert seen == [(2, 2), (4, 4), (5, 5)]
    rows = {row["step"]: row for row in read_metrics(tmp_path)}
    assert [step for step, row in rows.items() if "quality" in row] == [2, 4, 5]
    assert rows[3]["mfu"] == pytest.approx(1e3 * 12 * rows[3]["steps_per_second"] / 1e12)
    assert lines[-1].startswith("step 5/5  loss ")
    assert "MFU" in lines[-1]
    assert lines[-1].endswith("0:00 left")


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(tmp_path):
    def make(step):
        batch = killed_run.make_batch(step)
        return batch if step < 6 else {"x": batch["x"] * np.inf, "y": batch["y"]}

    with pytest.raises(InputError, match="step 7: the loss is not finite"):
        killed_run.trainer(tmp_path, 9, make).run()
    assert steps_on_disk(tmp_path) == [4]


def test_a_batch_that_does_not_divide(tmp_path):
    with pytest.raises(InputError, match="a batch of 4 does not split into 3 microbatches"):
        killed_run.trainer(tmp_path, 3, accumulation=3).run()


def test_config_errors():
    with pytest.raises(InputError, match="save_every 0: must be at least 1"):
        TrainerConfig(save_every=0)


def test_unfinished_checkpoints_are_not_read(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2, keep_every=None)
    checkpoints.save(3, {"a": jnp.ones(2)}, {"next": 3})
    checkpoints.close()
    (tmp_path / "4.orbax-checkpoint-tmp").mkdir()
    again = Checkpoints(tmp_path, keep_last=2, keep_every=None)
    assert again.latest == 3
    state, data = again.load(3, {"a": jnp.zeros(2)})
    np.testing.assert_array_equal(state["a"], [1, 1])
    assert data == {"next": 3}
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
