"""Small pictures of what latents will decode to, without decoding them.

A VAE's latents are nearly linear in the colours of the pixels that they stand for, so a linear filter of 3x3 latent
cells gives a picture of one pixel a cell at no cost. The filter is fitted to the VAE at hand: generated clips are
encoded, and the average colour of each cell is regressed on the latents around it by least squares.

The residual for nano, root mean square, is 43 levels of 255 on generated clips, and 41 on videos of its own world,
whose colours have a standard deviation of 90: where things are and how bright they are shows, hues hardly do, and a
filter fitted to that world alone shows them no better. (Its latents hold hues in ways that are not linear.)
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from wan_jax.config import VAEConfig

CLIPS, FRAMES, CELLS = 24, 9, 12  # clips, of 9 frames, 12 latent cells high and wide
RIDGE = 1e-4  # relative; on flat pictures neighbouring cells are equal


@dataclass(frozen=True)
class PreviewFilter:
    """A linear map from latents to colours.

    Attributes:
        kernel: float32 [3, 3, C, 3], in levels of 255; its second axis is the width.
        bias: float32 [3].
        residual: root mean square error on clips that were not fitted, in levels of 255.
    """

    kernel: np.ndarray
    bias: np.ndarray
    residual: float

    def __call__(self, latents: np.ndarray) -> np.ndarray:
        """Draws clean latents [C, F', h, w] as uint8 RGB [F', h, w, 3]: one pixel a cell."""
        picture = self.bias
        for y, x, cells in _neighbours(latents):
            picture = picture + np.tensordot(cells, self.kernel[y, x], (0, 0))
        return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def fit_preview(encode: Callable[[np.ndarray], np.ndarray], config: VAEConfig, *, clips: int = CLIPS) -> PreviewFilter:
    """Fits the filter of a VAE to generated clips; a quarter of them only measures the residual.

    Args:
        encode: uint8 frames [F, H, W, 3] -> normalised latents [C, F', h, w].
        config: the VAE's.
        clips: how many clips of a few small frames to encode, at least 4.
    """
    rng = np.random.default_rng(0)
    rows, colours = [], []
    for index in range(clips):
        frames = draw_clip(rng, FRAMES, CELLS * config.spatial_stride, textured=index % 4 == 3)
        latents = encode(frames)
        cells = np.stack([cells for _, _, cells in _neighbours(latents)])
        rows.append(cells.reshape(-1, latents[0].size).T.astype(np.float64))
        colours.append(cell_colours(frames, config).reshape(-1, 3))
    fitted = slice(0, clips - clips // 4)
    inputs, targets = np.concatenate(rows[fitted]), np.concatenate(colours[fitted])
    mean, middle = inputs.mean(0), targets.mean(0)
    centred = inputs - mean
    gram = centred.T @ centred
    gram += RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
    matrix = np.linalg.solve(gram, centred.T @ (targets - middle))
    bias = middle - mean @ matrix
    errors = np.concatenate(rows[fitted.stop :]) @ matrix + bias - np.concatenate(colours[fitted.stop :])
    kernel = matrix.reshape(3, 3, -1, 3).astype(np.float32)
    return PreviewFilter(kernel, bias.astype(np.float32), float(np.sqrt(np.mean(errors**2))))


def _neighbours(latents: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    """(y, x, latents shifted to that place of a 3x3 kernel); cells beyond the border repeat those at it."""
    padded = np.pad(np.asarray(latents, np.float32), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    height, width = latents.shape[-2:]
    for y in range(3):
        for x in range(3):
            yield y, x, padded[..., y : y + height, x : x + width]


def cell_colours(frames: np.ndarray, config: VAEConfig) -> np.ndarray:
    """The average colour of the pixels that each latent cell stands for: [F, H, W, 3] -> float64 [F', h, w, 3]."""
    side, time = config.spatial_stride, config.temporal_stride
    count, height, width, _ = frames.shape
    small = frames.reshape(count, height // side, side, width // side, side, 3).mean((2, 4))
    return np.concatenate([small[:1], small[1:].reshape(-1, time, *small.shape[1:]).mean(1)])


def draw_clip(rng: np.random.Generator, count: int, side: int, textured: bool) -> np.ndarray:
    """Coloured shapes that move over a flat ground, or over a gradient with noise of several scales.

    Returns:
        uint8 [count, side, side, 3].
    """
    y, x = np.mgrid[:side, :side] / side
    ground = np.full((side, side, 3), rng.choice([0.03, 0.25, 0.75, 0.97]))
    if textured:
        weights = rng.dirichlet(np.ones(5))
        textures = [rng.uniform(0, 1, (2**scale, 2**scale, 3)) for scale in range(1, 6)]
        ground = sum(weight * _stretched(texture, x, y) for weight, texture in zip(weights, textures, strict=True))
    frames = np.broadcast_to(ground, (count, side, side, 3)).copy()
    for _ in range(2):
        (centre_x, centre_y), velocity = rng.uniform(0.2, 0.8, 2), rng.uniform(-0.03, 0.03, 2)
        colour = rng.permutation([1.0, rng.uniform(0, 1), 0.1]) * rng.uniform(0.6, 1)
        radius, is_square = rng.uniform(0.08, 0.25), rng.integers(2)
        for index, frame in enumerate(frames):
            offsets = np.abs(x - centre_x - index * velocity[0]), np.abs(y - centre_y - index * velocity[1])
            frame[(np.maximum(*offsets) if is_square else np.hypot(*offsets)) < radius] = colour
    return np.rint(255 * frames).astype(np.uint8)


def _stretched(texture: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A square texture at coordinates in [0, 1), with linear interpolation; [n, n, 3] -> [*x.shape, 3]."""
    last = len(texture) - 1
    left, top = (x * last).astype(int), (y * last).astype(int)
    across, down = (x * last - left)[..., None], (y * last - top)[..., None]
    upper, lower = (texture[top + row, left] * (1 - across) + texture[top + row, left + 1] * across for row in (0, 1))
    return upper * (1 - down) + lower * down
