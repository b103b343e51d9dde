"""A run between two of its steps, on the host: to pause, to go on in another process, to keep as a file."""

import hashlib
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from wan_jax.diffusion.conditioning import Conditioning
from wan_jax.diffusion.segments import Segment
from wan_jax.diffusion.solvers import StepState
from wan_jax.errors import InputError
from wan_jax.parallel.placement import Placement

# Latents [B, C, F, h, w] -> a small uint8 picture of each latent frame, [B, F, height, width, 3].
Preview = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class SamplingState:
    """What the denoise loop goes on from: the result is the same to the bit as if it had never stopped.

    Attributes:
        step: number of steps that are done.
        arrays: the solver's state, float32 NumPy arrays [B, C, F, h, w].
        plan: fingerprint of the plan that the steps belong to; see `fingerprint`.
    """

    step: int
    arrays: StepState
    plan: str

    def save(self, path: str | os.PathLike) -> None:
        """Writes a NumPy archive (.npz)."""
        arrays: dict[str, Any] = {"latents": self.arrays.latents, "denoised": self.arrays.denoised}
        arrays |= {f"history_{index}": array for index, array in enumerate(self.arrays.history)}
        with open(path, "wb") as file:
            np.savez(file, step=self.step, plan=self.plan, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "SamplingState":
        """Reads what `save` wrote. Raises InputError for any other file."""
        try:
            with np.load(path, allow_pickle=False) as file:
                history = tuple(file[f"history_{index}"] for index in range(len(file.files) - 4))
                state = cls(int(file["step"]), StepState(file["latents"], file["denoised"], history), str(file["plan"]))
            kinds = {(array.ndim, array.shape, array.dtype) for array in jax.tree.leaves(state.arrays)}
            if state.step < 1 or kinds != {(5, state.arrays.latents.shape, np.dtype(np.float32))}:
                raise ValueError("its arrays are not those of a run")
            return state
        except (OSError, EOFError, KeyError, TypeError, ValueError, AttributeError, zipfile.BadZipFile) as error:
            raise InputError(f"{os.fspath(path)} holds no sampling state: {error}") from error

    def remaining(self, segments: Sequence[Segment], videos: str = "") -> list[Segment]:
        """What is left of a plan. Raises InputError for another plan, or other videos, than the state's."""
        if fingerprint(segments, videos) != self.plan:
            fields = "prompt, seed, image, steps, solver, schedule or guidance"
            raise InputError(f"the sampling state belongs to a run with another {fields}")
        return [segment.after(self.step) for segment in segments if segment.steps.stop > self.step]


def fingerprint(segments: Sequence[Segment], videos: str = "") -> str:
    """A digest of all that a plan does to latents, and of what the caller says of the `videos`."""
    digest = hashlib.sha256(videos.encode())
    for segment in segments:
        digest.update(repr((segment.expert, segment.steps, segment.solver, segment.starts_solver)).encode())
        for array in jax.tree.leaves((segment.timesteps, segment.coefficients, segment.guidance)):
            digest.update(np.asarray(array).tobytes())
    return digest.hexdigest()


class Snapshot:
    """What a `StepDone` offers of the state on the device, within a `with` block: the next step takes its memory."""

    def __init__(self, step: int, state: StepState, plan: str, placement: Placement):
        self._step = step
        self._state: StepState | None = state
        self._plan = plan
        self._placement = placement

    def __enter__(self) -> "Snapshot":
        return self

    def __exit__(self, *error: object) -> None:
        self._state = None

    def take(self) -> SamplingState:
        """Copies the state to the host; where there are several processes, each of them must call it."""
        return SamplingState(self._step, jax.tree.map(self._gather, self._on_device()), self._plan)

    def show(self, preview: Preview, conditioning: Conditioning) -> np.ndarray:
        """The predicted clean video as a small picture of each latent frame."""
        return preview(self._gather(conditioning.restore(self._on_device().denoised)))

    def _gather(self, array: jax.Array) -> np.ndarray:
        return np.array(self._placement.gather(array))  # a copy: on a CPU the array is a view of the device's memory

    def _on_device(self) -> StepState:
        if self._state is None:
            raise RuntimeError(f"the state after step {self._step} is gone; ask for it while its event is handled")
        return self._state
