"""The images that a video starts from (and may end with): reading them, the video's size, resizing.

Rules and arithmetic are those of the official code (Wan-Video/Wan2.2: wan/image2video.py, wan/textimage2video.py,
wan/utils/utils.py; Wan2.1: wan/modules/clip.py), with its roundings: the same image gives the same size and pixels.
"""

import functools
import hashlib
import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from wan_jax.config import WanConfig
from wan_jax.errors import InputError
from wan_jax.fields import path_of

# What CLIP was trained to see: the mean and the deviation of red, green and blue in [0, 1].
CLIP_MEAN = np.array((0.48145466, 0.4578275, 0.40821073), np.float32)
CLIP_STD = np.array((0.26862954, 0.26130258, 0.27577711), np.float32)


@dataclass(frozen=True, eq=False)
class Picture:
    """An image that has been read.

    Attributes:
        pixels: uint8 [H, W, 3], red, green, blue.
        name: for the metadata: its path, or its size if it never was a file.
    """

    pixels: np.ndarray
    name: str

    @classmethod
    def read(cls, image: Any) -> "Picture":
        """Reads an image in one of the forms that `read_image` takes; one that has been read is returned as it is."""
        if isinstance(image, Picture):
            return image
        pixels = read_image(image)
        height, width, _ = pixels.shape
        is_file = isinstance(image, (str, os.PathLike))
        return cls(pixels, os.fspath(image) if is_file else f"{width}x{height} pixels")

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        height, width, _ = self.pixels.shape
        return width, height

    @functools.cached_property
    def digest(self) -> bytes:
        """Equal for equal pixels."""
        return hashlib.sha256(str(self.size).encode() + self.pixels.tobytes()).digest()

    def cover(self, size: tuple[int, int]) -> "Picture":
        """The same, cut to the shape of `size`; see `cover`."""
        return Picture(cover(self.pixels, size), self.name)


def is_stretched(config: WanConfig, picture: Picture, size: tuple[int, int]) -> bool:
    """Whether `fit` changes the picture's shape by more than the sizes of `output_size` do."""
    width, height = picture.size
    return config.conditioning != "first_frame" and abs(math.log(width / height * size[1] / size[0])) > 0.05


def frames_to_encode(
    config: WanConfig, first: Picture, last: Picture | None, size: tuple[int, int], count: int
) -> np.ndarray:
    """The video of `count` frames that the VAE encodes: float32 [F, H, W, 3]; grey where nothing is known."""
    if config.conditioning == "first_frame":
        return fit(config, first.pixels, size)[None]
    width, height = size
    frames = np.zeros((count, height, width, 3), np.float32)
    frames[0] = fit(config, first.pixels, size)
    if last is not None:
        frames[-1] = fit(config, last.pixels, size)
    return frames


def check_images(config: WanConfig, first: bool, last: bool) -> None:
    """Raises InputError unless the model can do with those of the two images that are given."""
    name, needs_last = config.name, config.denoiser.image_position_length is not None
    if last and not first:
        raise InputError("a last image needs a first one: give both")
    if first and config.conditioning == "text":
        raise InputError(f"{name} makes videos from text alone; leave the image out, or take an image-to-video model")
    if not first and config.conditioning == "image_latents":
        raise InputError(f"{name} makes videos from an image and a text; give an image")
    if last and (config.conditioning == "first_frame" or (config.image_encoder is not None and not needs_last)):
        raise InputError(f"{name} takes a first image alone; leave the last one out")
    if first and not last and needs_last:
        raise InputError(f"{name} makes videos between two images; give the last one too")


def read_image(image: Any) -> np.ndarray:
    """An image as uint8 [H, W, 3], red, green, blue.

    Args:
      image: a path, a PIL image, or an array: uint8, [H, W] (grey), [H, W, 3] or [H, W, 4]. Photographs are turned as
        their camera says (EXIF). Transparency is dropped, as in the official code.

    Raises:
      InputError: no such file, not an image, or an array of another kind.
    """
    if isinstance(image, (str, os.PathLike)):
        return _read_file(image)
    if not isinstance(image, Image.Image):
        try:
            pixels = np.asarray(image)
        except ValueError as error:
            raise InputError(f"an image cannot be read as an array ({error})") from None
        if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[-1] in (1, 3, 4))):
            raise InputError(
                f"an image is {pixels.dtype} of shape {pixels.shape}; give a path, a PIL image, or uint8 [H, W, 3]"
            )
        if not pixels.size:
            raise InputError(f"an image of shape {pixels.shape} has no pixels")
        image = Image.fromarray(pixels.squeeze(2) if pixels.shape[2:] == (1,) else pixels)
    return _to_rgb(image, "the image")


def _read_file(path: str | os.PathLike) -> np.ndarray:
    name = str(path_of("image", path))
    try:
        with Image.open(name) as image:
            return _to_rgb(image, f"image {name}")
    except FileNotFoundError:
        raise InputError(f"image {name} does not exist; give a picture, for example a PNG or JPEG file") from None
    except Image.DecompressionBombError:
        raise InputError(f"image {name} is too large; make it smaller, far fewer pixels are used") from None
    except (OSError, SyntaxError, ValueError) as error:  # PIL's for some damaged files, Python's for odd names
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"image {name} cannot be read ({reason}); give a PNG or JPEG file") from None


def _to_rgb(image: Image.Image, name: str) -> np.ndarray:
    if image.mode in ("I", "F"):
        raise InputError(f"{name} has {image.mode} pixels of 32 bits; save it with 8 bits a channel")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # PIL would clip 16 bits, not scale them
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return np.array(image.convert("RGB"))


def output_size(config: WanConfig, image_size: tuple[int, int]) -> tuple[int, int]:
    """The (width, height) of a video that starts from an image of `image_size`: its shape, with the preset's area.

    Raises InputError where the image is too narrow for that.
    """
    width, height = image_size
    area = math.prod(config.sampling.size)
    multiple_height, multiple_width = config.size_multiple
    if config.conditioning == "first_frame":
        size = _nearest_ratio_size(width, height, multiple_width, multiple_height, area)
    else:
        # In float64 and in this order: rounding decides. 832x480 gives 832x464, because the root of 480 squared comes
        # out just below 480.
        ratio = height / width
        size = (
            int(math.sqrt(area / ratio) // multiple_width * multiple_width),
            int(math.sqrt(area * ratio) // multiple_height * multiple_height),
        )
    if not all(size):
        raise InputError(f"an image of {width}x{height} is too narrow; cut it to the shape of a video")
    return size


def _nearest_ratio_size(
    width: int, height: int, multiple_width: int, multiple_height: int, area: int
) -> tuple[int, int]:
    """Of two sizes, the width rounded down first or the height first, the one nearer in shape (best_output_size)."""
    ratio = width / height
    ideal_width = (area * ratio) ** 0.5
    ideal_height = area / ideal_width
    width_1 = int(ideal_width // multiple_width * multiple_width)
    height_2 = int(ideal_height // multiple_height * multiple_height)
    if not width_1 or not height_2:
        return 0, 0
    height_1 = int(area / width_1 // multiple_height * multiple_height)
    width_2 = int(area / height_2 // multiple_width * multiple_width)

    def distance(width: int, height: int) -> float:
        return max(ratio / (width / height), (width / height) / ratio)

    if not height_1 or distance(width_1, height_1) >= distance(width_2, height_2):
        return width_2, height_2
    return width_1, height_1


def fit(config: WanConfig, pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An image, uint8 [h, w, 3], as a frame of a video of `size` (width, height): float32 [H, W, 3] in [-1, 1].

    Models that continue a first frame get it cut to the video's shape; the others get the whole image, stretched by
    as much as the shapes differ.
    """
    if config.conditioning == "first_frame":
        return normalise(cover(pixels, size))
    return bicubic(normalise(pixels), size)


def normalise(pixels: np.ndarray) -> np.ndarray:
    """uint8 -> float32 in [-1, 1]."""
    return (pixels.astype(np.float32) / 255 - np.float32(0.5)) / np.float32(0.5)


def cover(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [h, w, 3] -> [H, W, 3]: scaled (Lanczos, antialiased) until it covers `size`, then cut to its centre."""
    height, width, _ = pixels.shape
    if (width, height) == size:
        return pixels
    scale = max(size[0] / width, size[1] / height)
    scaled = round(width * scale), round(height * scale)
    image = Image.fromarray(pixels).resize(scaled, Image.Resampling.LANCZOS)
    left, top = (scaled[0] - size[0]) // 2, (scaled[1] - size[1]) // 2
    return np.asarray(image.crop((left, top, left + size[0], top + size[1])))


def stretch(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [h, w, 3] -> [H, W, 3], whole, in the shape of `size` (Lanczos, antialiased)."""
    if pixels.shape[1::-1] == size:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


def clip_input(pixels: np.ndarray, size: int) -> np.ndarray:
    """An image as CLIP sees it: uint8 [h, w, 3] -> float32 [size, size, 3]. It is stretched to a square, not cut."""
    image = bicubic(normalise(pixels), (size, size))
    return (image * np.float32(0.5) + np.float32(0.5) - CLIP_MEAN) / CLIP_STD


def bicubic(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes float32 [h, w, C] to [H, W, C], for `size` (W, H), as torch.nn.functional.interpolate(mode="bicubic").

    That is the cubic convolution of Keys (1981) with a = -0.75, pixel centres at half coordinates, borders repeated,
    and no smoothing when the result is smaller. Positions are rounded as PyTorch's: it shows in large images.
    """
    for axis, length in ((1, size[0]), (0, size[1])):
        indices, weights = _cubic_taps(image.shape[axis], length)
        shape = [1, 1, 1]
        shape[axis] = length
        image = sum(
            image.take(index, axis=axis) * weight.reshape(shape) for index, weight in zip(indices, weights, strict=True)
        )
    return image


def _cubic_taps(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """For each of `new` pixels in a row, which four of the `old` ones it comes from, and their weights: [4, new]."""
    scale = np.float32(old) / np.float32(new)
    # A float32 scale, but one rounding after it: PyTorch is compiled to multiply and subtract in one instruction.
    position = (np.float64(scale) * (np.arange(new) + 0.5) - 0.5).astype(np.float32)
    left = np.floor(position)
    t = position - left
    a = np.float32(-0.75)

    def near(x: np.ndarray) -> np.ndarray:  # for distances up to 1
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x: np.ndarray) -> np.ndarray:  # from 1 to 2
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    weights = np.stack([far(t + 1), near(t), near(1 - t), far(2 - t)])
    indices = left.astype(np.int64) + np.arange(-1, 3)[:, None]
    return indices.clip(0, old - 1), weights
