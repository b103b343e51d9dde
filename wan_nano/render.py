"""Draws scenes as videos in JAX, antialiased, so that training data is made where it is used and never ends.

What a scene leaves open (places, sizes, small differences of speed, which of the handwritten digits) is drawn from a
key. Lengths are in parts of the frame's shorter side, y points down, angles turn clockwise.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from wan_nano.scenes import (
    BACKGROUNDS,
    BOUNCES,
    CIRCLE_TURNS,
    COLOURS,
    DIRECTIONS,
    DISTANCE,
    KINDS,
    MOTIONS,
    ROTATION_TURNS,
    SHAPES,
    SIZE_RATIO,
    Scenes,
)

UNIT_FRAMES = 32  # the distances in scenes.py are for so many frames after the first
# Largest radius of an object, and the size of its circle and bounce: alone, and as one of two.
RADIUS = ((0.15, 0.21), (0.115, 0.145))
ORBIT_RADIUS = (0.20, 0.15)
BOUNCE_HEIGHT = (0.36, 0.26)
PLACEMENTS = 24  # tried for two objects; the one that keeps them farthest apart is taken
JITTER = 0.06  # of speeds
# A shape: x, y -> the signed distance to its edge, negative inside, in units of the object's radius.
Distance = Callable[[jax.Array, jax.Array], jax.Array]


class Paths(NamedTuple):
    """How the objects of one scene move."""

    centre: jax.Array  # [objects, F, 2]: x, y
    radius: jax.Array  # [objects, F]
    angle: jax.Array  # [objects, F], in radians


def draw_paths(key: jax.Array, scene: dict[str, jax.Array], frames: int, size: tuple[int, int]) -> Paths:
    """Places the objects of one scene and moves them; `size` is (width, height) in pixels."""
    key_place, *keys = jax.random.split(key, 3)
    pair = scene["count"] - 1
    extent = np.array(size, np.float32) / min(size)
    motions = [_motion(keys[index], scene["motion"][index], scene["speed"][index], pair, frames) for index in range(2)]

    def place(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Centres [2, F, 2] of one placement, and how far apart the objects stay, in sums of their radii."""
        centres = [
            _place(key, path, radius, extent)
            for key, (path, radius, _) in zip(jax.random.split(key), motions, strict=True)
        ]
        distance = jnp.linalg.norm(centres[0] - centres[1], axis=-1) / (motions[0][1] + motions[1][1])
        return jnp.stack(centres), distance.min()

    centres, distances = jax.vmap(place)(jax.random.split(key_place, PLACEMENTS))
    # Far enough is enough: always the farthest would press every pair into opposite corners.
    best = jnp.argmax(jnp.minimum(distances, 1.15))
    centre = jnp.where(pair == 1, centres[best], centres[0])
    return Paths(centre, jnp.stack([m[1] for m in motions]), jnp.stack([m[2] for m in motions]))


def _motion(
    key: jax.Array, motion: jax.Array, speed: jax.Array, pair: jax.Array, frames: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One object's path [F, 2] from its own origin, its radius [F] and its angle [F]."""
    key_radius, key_speed, key_phase = jax.random.split(key, 3)
    time = jnp.arange(frames) / UNIT_FRAMES  # 1 at the end of 33 frames
    # In longer videos nothing goes farther than in one of 33 frames: the frame has no more room.
    slower = min(1.0, UNIT_FRAMES / max(frames - 1, 1))
    jitter = jax.random.uniform(key_speed, (), minval=1 - JITTER, maxval=1 + JITTER)
    radius = jax.random.uniform(key_radius, (), minval=0.0, maxval=1.0)
    low, high = jnp.asarray(RADIUS)[pair]
    radius = low + (high - low) * radius
    still = jnp.zeros((frames, 2))

    directions = jnp.asarray(list(DIRECTIONS.values()), jnp.float32)
    direction = directions[jnp.minimum(motion, len(DIRECTIONS) - 1)]
    straight = direction * (jnp.asarray(DISTANCE)[speed] * jitter * slower * time)[:, None]
    phase = jax.random.uniform(key_phase, (), maxval=2 * math.pi)
    turn = phase + 2 * math.pi * jnp.asarray(CIRCLE_TURNS)[speed] * jitter * time
    orbit = jnp.asarray(ORBIT_RADIUS)[pair] * jnp.stack([jnp.sin(turn), -jnp.cos(turn)], axis=-1)
    hops = jnp.abs(jnp.sin(math.pi * jnp.asarray(BOUNCES)[speed] * time))
    bounce = jnp.stack([jnp.zeros(frames), -jnp.asarray(BOUNCE_HEIGHT)[pair] * hops], axis=-1)

    def is_motion(name: str) -> jax.Array:
        return motion == MOTIONS.index(name)

    path = jnp.where(motion < len(DIRECTIONS), straight, still)
    path = jnp.where(is_motion("circle"), orbit, path)
    path = jnp.where(is_motion("bounce"), bounce, path)
    # Growing and shrinking go between a small radius and a large one.
    growth = jnp.exp(jnp.log(jnp.asarray(SIZE_RATIO)[speed]) * jnp.minimum(jitter * slower * time, 1.1))
    largest = high * 1.1
    radii = jnp.where(is_motion("grow"), largest * growth / growth[-1], radius)
    radii = jnp.where(is_motion("shrink"), largest / growth, radii)
    turns = 2 * math.pi * jnp.asarray(ROTATION_TURNS)[speed] * jitter * time
    return path, radii, jnp.where(is_motion("rotate"), turns, 0.0)


def _place(key: jax.Array, path: jax.Array, radius: jax.Array, extent: np.ndarray) -> jax.Array:
    """The path [F, 2] moved to where all of it fits into the frame; one that does not fit is centred."""
    margin = 1.05 * radius[:, None] + 0.01
    low = jnp.max(margin - path, axis=0)
    high = jnp.min(extent - margin - path, axis=0)
    place = jnp.where(low < high, jax.random.uniform(key, (2,)) * (high - low) + low, (low + high) / 2)
    return path + place


def render(
    keys: jax.Array,
    scenes: dict[str, jax.Array],
    atlas: jax.Array,
    *,
    frames: int,
    size: tuple[int, int],
    window: tuple[int, int, int] | None = None,
) -> jax.Array:
    """Scenes -> videos.

    Args:
      keys: [B] random keys; a video's decides everything that its scene leaves open.
      scenes: `Scenes.as_dict()` as arrays with a leading batch axis.
      atlas: textures of the digits, see digits.py.
      frames, size: length, and (width, height) in pixels.
      window: (frames, width, height) of a part at a random place of each video; only that is drawn.

    Returns:
      [B, F, H, W, 3] float32 in [-1, 1].
    """
    return jax.vmap(lambda key, scene: _render_one(key, scene, atlas, frames, size, window))(keys, scenes)


@partial(jax.jit, static_argnames=("frames", "size", "window"))
def render_batch(
    seed: int,
    scenes: dict[str, jax.Array],
    atlas: jax.Array,
    *,
    frames: int,
    size: tuple[int, int],
    window: tuple[int, int, int] | None = None,
) -> jax.Array:
    """`render`, compiled by itself: within another program XLA would draw again wherever a pixel is read."""
    keys = jax.random.split(jax.random.key(seed), len(scenes["count"]))
    return render(keys, scenes, atlas, frames=frames, size=size, window=window)


@partial(jax.jit, static_argnames=("frames", "size", "shape"))
def _render_uint8(
    seed: int,
    scenes: dict[str, jax.Array],
    atlas: jax.Array,
    frames: int,
    size: tuple[int, int],
    shape: Distance | None,
) -> jax.Array:
    def one(number: jax.Array, scene: dict[str, jax.Array]) -> jax.Array:
        video = _render_one(jax.random.fold_in(jax.random.key(seed), number), scene, atlas, frames, size, None, shape)
        return jnp.round((video + 1) * 127.5).astype(jnp.uint8)

    # One after the other: XLA's CPU backend is no faster on a batch, and memory stays small.
    return lax.map(lambda xs: one(*xs), (jnp.arange(len(scenes["count"])), scenes))


def render_scenes(
    seed: int,
    scenes: Scenes,
    atlas: np.ndarray,
    *,
    frames: int = 33,
    size: tuple[int, int] = (96, 96),
    shape: Distance | None = None,
) -> np.ndarray:
    """The videos of scenes, uint8 [N, F, H, W, 3]: what a caller outside of training wants.

    `shape` is drawn for the first object instead of the shape that the scene names: a function of x and y, such as
    those in DISTANCES.
    """
    return np.asarray(_render_uint8(seed, scenes.as_dict(), jnp.asarray(atlas), frames, size, shape))


def _render_one(
    key: jax.Array,
    scene: dict[str, jax.Array],
    atlas: jax.Array,
    frames: int,
    size: tuple[int, int],
    window: tuple[int, int, int] | None,
    first_shape: Distance | None = None,
) -> jax.Array:
    key_paths, key_digits, key_window = jax.random.split(key, 3)
    paths = draw_paths(key_paths, scene, frames, size)
    shorter = min(size)
    shape = (frames, *size)
    start = jnp.zeros(3, jnp.int32)
    if window is not None:
        room = np.array(shape) - np.array(window)
        start = jax.random.randint(key_window, (3,), 0, room + 1)
        paths = Paths(*(lax.dynamic_slice_in_dim(path, start[0], window[0], axis=1) for path in paths))
        shape = window
    length, width, height = shape
    x = (start[1] + jnp.arange(width) + 0.5)[None, None, :] / shorter
    y = (start[2] + jnp.arange(height) + 0.5)[None, :, None] / shorter
    image = jnp.asarray(list(BACKGROUNDS.values()), jnp.float32)[scene["background"]]
    image = jnp.broadcast_to(image, (length, height, width, 3))
    palette = jnp.asarray(list(COLOURS.values()), jnp.float32)
    numbers = jax.random.randint(key_digits, (2,), 0, atlas.shape[1])
    # The object that is named first is drawn last: in front.
    for index in (1, 0):
        radius = paths.radius[index][:, None, None]
        cos, sin = (f(paths.angle[index])[:, None, None] for f in (jnp.cos, jnp.sin))
        across = (x - paths.centre[index, :, 0, None, None]) / radius
        down = (y - paths.centre[index, :, 1, None, None]) / radius
        across, down = cos * across + sin * down, cos * down - sin * across
        kind = scene["kind"][index]
        digit = jnp.maximum(kind - len(SHAPES), 0)
        draw = partial(shape_distance, kind) if index == 1 or first_shape is None else first_shape
        opacity = jnp.where(
            kind < len(SHAPES),
            jnp.clip(0.5 - draw(across, down) * radius * shorter, 0, 1),
            digit_opacity(atlas[digit, numbers[index]], across, down),
        )
        if index == 1:
            opacity = opacity * (scene["count"] == 2)
        image = image + opacity[..., None] * (palette[scene["colour"][index]] - image)
    return 2 * image - 1


def shape_distance(kind: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """Signed distance, negative inside, to the shape of this index, which fills the circle of radius 1."""
    return lax.select_n(
        jnp.broadcast_to(jnp.minimum(kind, len(SHAPES) - 1), jnp.broadcast_shapes(x.shape, y.shape)),
        *(DISTANCES[name](x, y) for name in SHAPES),
    )


def _circle(x, y):
    return jnp.hypot(x, y) - 0.92


def _square(x, y):
    return jnp.maximum(jnp.abs(x), jnp.abs(y)) - 0.8


def _triangle(x, y):
    """Equilateral, pointing up; its centroid is a little below the centre."""
    y = y - 0.2
    return jnp.maximum(y, 0.75**0.5 * jnp.abs(x) - 0.5 * y) - 0.58


def _star(x, y):
    """Five points, one up: in a tenth of the turn it is one straight edge."""
    outer, inner, tenth = 1.1, 0.45, math.pi / 5
    y = y - 0.05
    angle = jnp.mod(jnp.arctan2(x, -y), 2 * tenth)
    angle = jnp.minimum(angle, 2 * tenth - angle)
    radius = jnp.hypot(x, y)
    start, end = np.array([outer, 0.0]), inner * np.array([math.cos(tenth), math.sin(tenth)])
    along = end - start
    normal = np.array([along[1], -along[0]]) / np.hypot(*along)
    return normal[0] * (radius * jnp.cos(angle) - start[0]) + normal[1] * radius * jnp.sin(angle)


def _cross(x, y):
    x, y = jnp.abs(x), jnp.abs(y)
    return jnp.minimum(jnp.maximum(x - 0.95, y - 0.32), jnp.maximum(x - 0.32, y - 0.95))


def _ring(x, y):
    return jnp.abs(jnp.hypot(x, y) - 0.70) - 0.23


def _heart(x, y):
    """After Inigo Quilez, 2-D distance functions."""
    scale = 0.58
    x, y = jnp.abs(x) * scale, -y * scale + 0.55
    upper = jnp.hypot(x - 0.25, y - 0.75) - 2**0.5 / 4
    middle = 0.5 * jnp.maximum(x + y, 0.0)
    square = jnp.minimum(x**2 + (y - 1) ** 2, (x - middle) ** 2 + (y - middle) ** 2)
    lower = jnp.sqrt(square + 1e-12) * jnp.sign(x - y)
    return jnp.where(x + y > 1, upper, lower) / scale


def _moon(x, y):
    """A crescent, open to the right."""
    x = x - 0.15
    return jnp.maximum(jnp.hypot(x, y) - 0.95, 0.78 - jnp.hypot(x - 0.5, y))


DISTANCES = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "heart": _heart,
    "moon": _moon,
}
assert tuple(DISTANCES) == SHAPES
assert len(KINDS) == len(SHAPES) + 10


def digit_opacity(texture: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """Bilinear samples of a texture [n, n] that covers (-1.1, 1.1) squared, made firm; nothing outside of it."""
    n = texture.shape[0]
    column, row = ((axis / 1.1 + 1) / 2 * n - 0.5 for axis in (x, y))
    column, row = jnp.clip(column, 0, n - 1.001), jnp.clip(row, 0, n - 1.001)
    left, top = jnp.floor(column).astype(jnp.int32), jnp.floor(row).astype(jnp.int32)
    to_right, to_bottom = column - left, row - top
    upper = texture[top, left] * (1 - to_right) + texture[top, left + 1] * to_right
    lower = texture[top + 1, left] * (1 - to_right) + texture[top + 1, left + 1] * to_right
    value = upper * (1 - to_bottom) + lower * to_bottom
    return jnp.clip((value - 0.25) / 0.3, 0, 1)


@partial(jax.jit, static_argnames="side")
def draw_opacities(key: jax.Array, kinds: jax.Array, atlas: jax.Array, side: int = 56) -> jax.Array:
    """Objects alone, of all sizes that videos of 96 pixels show, a little turned: kinds [N] -> [N, side, side]."""
    grid = jnp.arange(side) + 0.5 - side / 2

    def one(key: jax.Array, kind: jax.Array) -> jax.Array:
        uniform = jax.random.uniform(key, (4,))
        radius = 5.5 * (22 / 5.5) ** uniform[0]
        angle = 0.5 * (uniform[1] - 0.5)
        x, y = (grid[None] - uniform[2] + 0.5) / radius, (grid[:, None] - uniform[3] + 0.5) / radius
        x, y = jnp.cos(angle) * x + jnp.sin(angle) * y, jnp.cos(angle) * y - jnp.sin(angle) * x
        number = jax.random.randint(jax.random.fold_in(key, 1), (), 0, atlas.shape[1])
        shape = jnp.clip(0.5 - shape_distance(kind, x, y) * radius, 0, 1)
        digit = digit_opacity(atlas[jnp.maximum(kind - len(SHAPES), 0), number], x, y)
        return jnp.where(kind < len(SHAPES), shape, digit)

    return jax.vmap(one)(jax.random.split(key, len(kinds)), kinds)
