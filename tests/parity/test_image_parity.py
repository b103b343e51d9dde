"""Resizing and normalising images against PyTorch."""

import numpy as np
import pytest
import torch

from wan_jax.media import image as images

SIZES = [  # from, to: width, height
    ((53, 37), (80, 48)),
    ((832, 480), (224, 224)),
    ((1921, 1080), (832, 464)),
    ((60, 100), (1280, 720)),
    ((7, 5), (7, 5)),
    ((1, 1), (16, 16)),
]


def pixels(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_bicubic_is_torchs(old, new):
    image = images.normalise(pixels(old[1], old[0]))
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(tensor, size=new[::-1], mode="bicubic")[0].permute(1, 2, 0)
    ours = images.bicubic(image, new)
    assert ours.dtype == np.float32
    # Some ten float32 roundings of values up to 2; positions computed in float64 alone would be 3e-4 away.
    np.testing.assert_allclose(ours, expected.numpy(), rtol=0, atol=4e-6)


def test_normalise_is_torchvisions():
    image = pixels(16, 16)
    expected = torch.from_numpy(image).float().div(255).sub_(0.5).div_(0.5)
    np.testing.assert_array_equal(images.normalise(image), expected.numpy())


def test_clip_input():
    image = pixels(100, 150)
    tensor = torch.from_numpy(images.normalise(image)).permute(2, 0, 1)[None]
    square = torch.nn.functional.interpolate(tensor, size=(224, 224), mode="bicubic").mul_(0.5).add_(0.5)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    expected = ((square - mean) / std)[0].permute(1, 2, 0).numpy()
    # As for bicubic; the division by 0.26 makes the roundings larger.
    np.testing.assert_allclose(images.clip_input(image, 224), expected, rtol=0, atol=8e-6)
