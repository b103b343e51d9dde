"""Latents of one video, as files and as arrays."""

import os
from typing import Any

import numpy as np

from wan_jax.errors import InputError
from wan_jax.fields import path_of


def read_latents(latents: Any) -> np.ndarray:
    """Latents of one video, float32 [C, F', h, w], from an array or a .npy file.

    Raises:
        InputError: no such file, an array of another kind, or numbers that are not finite.
    """
    where = "initial latents"
    if isinstance(latents, (str, os.PathLike)):
        path = path_of("latents file", latents)
        where = f"latents file {path}"
        if not path.is_file():
            raise InputError(f"{where} does not exist; give a .npy file of float32 [C, F', h, w]")
        try:
            latents = np.load(path, mmap_mode="r", allow_pickle=False)  # reads no more than there is
            latents.dtype  # noqa: B018 (an archive of arrays has none)
        except (ValueError, EOFError, OSError, AttributeError, MemoryError, OverflowError):
            raise InputError(f"{where} is not a .npy array; give float32 [C, F', h, w]") from None
        if latents.dtype != np.float32 or latents.ndim != 4:
            raise InputError(f"{where} holds {latents.dtype} of shape {latents.shape}; give float32 [C, F', h, w]")
    try:
        latents = np.array(latents, np.float32)  # a copy, which stays as it was checked
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{where} {latents!r:.60}: give float32 [C, F', h, w]") from None
    if not np.isfinite(latents).all():
        raise InputError(f"{where} {'holds' if 'file' in where else 'hold'} NaN or infinity; give finite numbers")
    return latents
