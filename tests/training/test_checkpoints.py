"""A run goes on from the last checkpoint that can be read."""

import jax.numpy as jnp
import numpy as np
import pytest

from wan_jax.errors import InputError
from wan_jax.training.checkpoints import Checkpoints

STATE = {"a": jnp.arange(100.0), "b": {"c": jnp.ones((30, 40))}}


@pytest.fixture
def folder(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=3, keep_every=None)
    for step in (1, 2):
        checkpoints.save(step, {"a": STATE["a"] * step, "b": STATE["b"]}, {"data": step})
    checkpoints.close()
    return tmp_path / "checkpoints"


def open_again(folder):
    return Checkpoints(folder, keep_last=3, keep_every=None)


def damage_half(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def damage_bytes(file):
    file.write_bytes(np.random.default_rng(0).integers(0, 256, file.stat().st_size, np.uint8).tobytes())


@pytest.mark.parametrize("damage", [damage_half, damage_bytes, lambda file: file.write_bytes(b"")])
@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "state/_METADATA", "state/manifest.ocdbt", "state/d/*"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(folder, damage, name):
    (file, *_) = (folder / "2").glob(name)
    damage(file)
    notes = []
    checkpoints = open_again(folder)
    step, state, metadata = checkpoints.load_latest(STATE, notes.append)
    assert (step, metadata, float(state["a"][5])) == (1, {"data": 1}, 5.0)
    (note,) = notes
    assert "step 2 is damaged" in note
    checkpoints.save(2, STATE, {"data": 2})  # its name is free again
    checkpoints.close()
    assert len(list(folder.parent.glob("damaged-2-*/2"))) == 1
    assert open_again(folder).load_latest(STATE, notes.append)[0] == 2


def test_all_are_damaged_or_of_another_model(folder):
    with pytest.raises(InputError, match="of another model"):
        open_again(folder).load_latest({"a": STATE["a"]}, print)
    assert (folder / "2").exists()
    for step in ("1", "2"):
        damage_half(folder / step / "_CHECKPOINT_METADATA")
    with pytest.raises(InputError, match="all checkpoints are damaged"):
        open_again(folder).load_latest(STATE, print)
    assert open_again(folder).load_latest(STATE, print) is None
