"""Handwritten digits as smooth textures: scikit-learn's 1,797 images of 8x8 (UCI, Alpaydin and Kaynak 1998)."""

from pathlib import Path

import numpy as np

from wan_jax.errors import InputError

TEXTURE = 32  # pixels of a texture's side
TEST_PART = 6  # every sixth image is never trained on


def load_digits(path: str | Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The images [N, 8, 8] float32 in [0, 1] and the digits [N] int32.

    Args:
      path: an .npz with "images" and "digits" (see `save_digits`); None takes them from scikit-learn.

    Raises:
      InputError: scikit-learn is not installed, or the file is not there.
    """
    if path is not None:
        if not Path(path).is_file():
            raise InputError(f"digits file {path} does not exist; make it with wan_nano.digits.save_digits")
        with np.load(path) as file:
            return file["images"].astype(np.float32) / 16, file["digits"].astype(np.int32)
    try:
        from sklearn.datasets import load_digits as bundled
    except ModuleNotFoundError:
        raise InputError("handwritten digits come with scikit-learn; install wan_jax[nano]") from None
    data = bundled()
    return (data.images / 16).astype(np.float32), data.target.astype(np.int32)


def save_digits(path: str | Path) -> None:
    """Writes scikit-learn's digits as an .npz, for machines without scikit-learn."""
    images, digits = load_digits()
    np.savez_compressed(path, images=np.round(images * 16).astype(np.uint8), digits=digits.astype(np.uint8))


def digit_textures(images: np.ndarray) -> np.ndarray:
    """[N, 8, 8] -> [N, 32, 32], by cubic interpolation, with a margin of one of the eight pixels all around."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    weights = _cubic_weights(padded.shape[1], TEXTURE)
    return np.clip(np.einsum("yi,nij,xj->nyx", weights, padded, weights), 0, 1).astype(np.float32)


def digit_atlas(path: str | Path | None = None, *, test: bool = False) -> np.ndarray:
    """Textures by digit: [10, M, 32, 32] float32, M of each of those for training, or of those kept for the test."""
    images, digits = load_digits(path)
    is_test = np.arange(len(images)) % TEST_PART == 0
    textures, digits = digit_textures(images[is_test == test]), digits[is_test == test]
    fewest = min(int((digits == digit).sum()) for digit in range(10))
    return np.stack([textures[digits == digit][:fewest] for digit in range(10)])


def _cubic_weights(size: int, new_size: int) -> np.ndarray:
    """[new_size, size]: Catmull-Rom interpolation between pixel centres."""
    position = (np.arange(new_size) + 0.5) * size / new_size - 0.5
    distance = np.abs(position[:, None] - np.arange(size))
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    weights = np.where(distance <= 1, near, np.where(distance < 2, far, 0))
    return weights / weights.sum(axis=1, keepdims=True)
