"""A run's checkpoints: written while training goes on, kept by policy, whole or absent."""

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from wan_jax.errors import InputError


class Checkpoints:
    """The checkpoints of one run, by step.

    Each holds the state's arrays by name, and beside them a dict for JSON (where the data stood). One that a killed run
    left unfinished has another name, is never read, and is removed by the next run.

    Args:
      folder: made if need be.
      keep_last: how many of the last ones stay.
      keep_every: every one whose step is a multiple of this stays too; None: none.
    """

    def __init__(self, folder: Path, *, keep_last: int, keep_every: int | None):
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports every save in several lines
        policies = ocp.training.preservation_policies
        keep: list[Any] = [policies.LatestN(keep_last)]
        if keep_every is not None:
            keep.append(policies.EveryNSteps(keep_every))
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder.resolve()
        self._checkpointer = ocp.training.Checkpointer(
            self._folder, preservation_policy=policies.AnyPreservationPolicy(keep), cleanup_tmp_directories=True
        )

    @property
    def latest(self) -> int | None:
        """The last complete step; None before the first."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    @property
    def steps(self) -> list[int]:
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    def save(self, step: int, state: Any, metadata: dict[str, Any]) -> None:
        """Begins to save: returns when the arrays are copied to the host; files are written by a thread."""
        self.wait()
        # Forced: whether to save is the caller's to decide.
        self._checkpointer.save_async(step, named_leaves(state), custom_metadata=metadata, force=True)

    def load(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """State and metadata of a step; `like` is a state of the same run, or its shapes, with places for the result.

        Raises InputError where the checkpoint has other parameters.
        """
        abstract = {
            name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
            for name, array in named_leaves(like).items()
        }
        metadata = self._checkpointer.metadata(step)
        stored: Any = metadata.metadata
        custom: Any = metadata.custom_metadata
        if stored is None or not custom:
            raise ValueError("its metadata are lost")
        names = stored.keys() ^ abstract.keys()
        names |= {name for name in stored.keys() & abstract.keys() if stored[name].shape != abstract[name].shape}
        if names:
            raise InputError(
                f"{self._folder}: the checkpoint of step {step} is of another model or optimizer ({min(names)} "
                "differs); choose another folder or the options that it was made with"
            )
        leaves: Any = self._checkpointer.load(step, abstract)
        return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in abstract]), custom

    def load_latest(self, like: Any, note: Callable[[str], None]) -> tuple[int, Any, dict[str, Any]] | None:
        """Step, state and metadata of the last checkpoint that can be read; None before the first.

        Damaged ones after it are moved beside the folder, so that the run can write them anew, and `note` is told.
        Raises InputError where all are damaged; see also `load`.
        """
        steps = sorted(self.steps, reverse=True)
        for step in steps:
            try:
                return step, *self.load(step, like)
            except InputError:
                raise
            except Exception as error:  # whatever Orbax, TensorStore or JSON say of it
                moved = Path(tempfile.mkdtemp(prefix=f"damaged-{step}-", dir=self._folder.parent))
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                (self._folder / str(step)).rename(moved / str(step))
                self._checkpointer.reload()
                note(f"the checkpoint of step {step} is damaged and now in {moved} ({reason})")
        if steps:
            raise InputError(f"{self._folder}: all checkpoints are damaged; choose another folder to begin anew")
        return None

    def wait(self) -> None:
        """Until what is being saved is on disk."""
        self._checkpointer.wait()

    def close(self) -> None:
        self.wait()
        self._checkpointer.close()


def named_leaves(state: Any) -> dict[str, Any]:
    """A tree's arrays by their paths: what is stored depends on no class of ours or of optax."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
