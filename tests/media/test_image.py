"""Reading images, the video's size, and resizing as the official code does it."""

import dataclasses
import math

import numpy as np
import pytest
from PIL import Image

from wan_jax.config import WanConfig
from wan_jax.errors import InputError
from wan_jax.media import image as images
from wan_jax.presets import get_preset

pytestmark = pytest.mark.quick

I2V, TI2V = get_preset("i2v-a14b"), get_preset("ti2v-5b")


def with_area(config: WanConfig, width: int, height: int) -> WanConfig:
    return dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, size=(width, height)))


I2V_480P = with_area(I2V, 832, 480)


def pixels(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


# Reading


def test_a_file_an_image_and_an_array_are_the_same(tmp_path):
    expected = pixels(5, 7)
    Image.fromarray(expected).save(tmp_path / "a.png")
    for image in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(expected), expected):
        np.testing.assert_array_equal(images.read_image(image), expected)


def test_grey_palette_and_transparent_images():
    grey = pixels(4, 6, 1)
    for image in (grey, grey[..., 0], Image.fromarray(grey[..., 0])):
        np.testing.assert_array_equal(images.read_image(image), np.repeat(grey, 3, axis=2))
    transparent = pixels(4, 6, 4)
    np.testing.assert_array_equal(images.read_image(transparent), transparent[..., :3])
    palette = Image.fromarray(grey[..., 0]).convert("P")
    np.testing.assert_array_equal(images.read_image(palette), np.repeat(grey, 3, axis=2))


def test_16_bits_are_scaled(tmp_path):
    deep = np.arange(24, dtype=np.uint16).reshape(4, 6) * 2700
    Image.fromarray(deep).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(images.read_image(tmp_path / "deep.png")[..., 0], deep >> 8)


def test_photographs_are_turned_as_the_camera_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn right
    upright = pixels(4, 6)
    Image.fromarray(np.rot90(upright)).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(images.read_image(tmp_path / "a.png"), upright)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("none.png", "image none.png does not exist"),
        ("text.png", "image text.png cannot be read .*give a PNG or JPEG file"),
        ("cut.png", "image cut.png cannot be read"),
        (".", "image . cannot be read"),
        (np.zeros((4, 6, 3), np.float32), r"an image is float32 of shape \(4, 6, 3\); give a path"),
        (np.zeros((2, 4, 6, 3), np.uint8), r"an image is uint8 of shape \(2, 4, 6, 3\)"),
        (np.zeros((3, 4, 6), np.uint8), r"an image is uint8 of shape \(3, 4, 6\)"),
        (np.zeros((0, 6, 3), np.uint8), "has no pixels"),
        (Image.new("F", (4, 4)), "32 bits; save it with 8 bits"),
        (7, r"an image is int64 of shape \(\)"),
    ],
    ids=lambda value: None if isinstance(value, np.ndarray | Image.Image) else str(value),
)
def test_what_is_no_image(image, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("a red circle")
    Image.fromarray(pixels(40, 40)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:300])
    with pytest.raises(InputError, match=message) as error:
        images.read_image(image)
    assert "\n" not in str(error.value)


def test_names(tmp_path):
    Image.fromarray(pixels(4, 6)).save(tmp_path / "first.png")
    assert images.Picture.read(tmp_path / "first.png").name == str(tmp_path / "first.png")
    picture = images.Picture.read(pixels(4, 6))
    assert picture.name == "6x4 pixels"
    assert images.Picture.read(picture) is picture


# Sizes, (width, height)


@pytest.mark.parametrize(
    ("config", "image", "size"),
    [
        (I2V_480P, (832, 480), (832, 464)),  # not 480: the root comes out just below it
        (I2V, (1280, 720), (1280, 720)),
        (I2V, (1024, 1024), (960, 960)),
        (I2V_480P, (1024, 1024), (624, 624)),
        (I2V_480P, (1280, 720), (832, 464)),
        (I2V, (400, 600), (768, 1168)),
        (TI2V, (1280, 720), (1248, 704)),
        (TI2V, (1024, 1024), (960, 928)),
        (TI2V, (720, 1280), (704, 1248)),
        (get_preset("flf2v-14b-720p"), (400, 600), (768, 1168)),
    ],
)
def test_official_sizes(config, image, size):
    assert images.output_size(config, image) == size


def test_sizes_follow_the_official_arithmetic():
    generator = np.random.default_rng(0)
    for width, height in generator.integers(200, 4000, (300, 2)).tolist():
        ratio = height / width
        lat_h, lat_w = (round(np.sqrt(squared) // 8 // 2 * 2) for squared in (921600 * ratio, 921600 / ratio))
        assert images.output_size(I2V, (width, height)) == (8 * lat_w, 8 * lat_h)

        size = images.output_size(TI2V, (width, height))
        assert size[0] % 32 == size[1] % 32 == 0
        assert math.prod(size) <= 1280 * 704
        # Rounding down takes less than 32 pixels from one side.
        assert abs(math.log(size[0] / size[1] / (width / height))) < 32 / min(size)


@pytest.mark.parametrize("config", [I2V, TI2V])
@pytest.mark.parametrize("size", [(30000, 5), (5, 30000)])
def test_too_narrow(config, size):
    with pytest.raises(InputError, match=f"an image of {size[0]}x{size[1]} is too narrow"):
        images.output_size(config, size)


# Resizing


@pytest.mark.parametrize("old", [(1280, 720), (500, 900), (1248, 704), (64, 48)])
def test_cover(old):
    """As the official ti2v code: scaled by the larger ratio, cut in the middle."""
    new = (1248, 704)
    image = Image.fromarray(pixels(old[1], old[0]))
    scale = max(new[0] / old[0], new[1] / old[1])
    scaled = image.resize((round(old[0] * scale), round(old[1] * scale)), Image.LANCZOS)
    left, top = (scaled.width - new[0]) // 2, (scaled.height - new[1]) // 2
    expected = np.asarray(scaled.crop((left, top, left + new[0], top + new[1])))
    np.testing.assert_array_equal(images.cover(np.asarray(image), new), expected)


def test_fit_is_what_each_model_was_trained_with():
    image = pixels(50, 90)
    np.testing.assert_array_equal(images.fit(I2V, image, (64, 48)), images.bicubic(images.normalise(image), (64, 48)))
    np.testing.assert_array_equal(images.fit(TI2V, image, (64, 32)), images.normalise(images.cover(image, (64, 32))))
    for config in (I2V, TI2V):  # nothing happens to an image that fits
        # The weights of bicubic interpolation add to 1 up to float32 rounding.
        np.testing.assert_allclose(images.fit(config, image, (90, 50)), images.normalise(image), atol=1e-6)


def test_stretching_is_noticed():
    picture = images.Picture.read(pixels(480, 832))
    assert not images.is_stretched(I2V, picture, images.output_size(I2V, picture.size))
    assert not images.is_stretched(I2V, picture, (1280, 720))
    assert images.is_stretched(I2V, picture, (720, 1280))
    assert images.is_stretched(I2V, picture, (480, 480))
    assert not images.is_stretched(TI2V, picture, (480, 480))  # it is cut
