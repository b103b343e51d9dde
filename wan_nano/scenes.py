"""What the nano model's videos may show, and how training scenes are drawn: the one table of the procedural world.

A scene has one or two objects on a plain background. An object is a shape or a handwritten digit in one of eight
colours, with a motion and a speed. Some combinations of object, colour and motion are held out: training never draws
them, evaluation asks for them.
"""

from dataclasses import dataclass, fields

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "moon")
DIGITS = tuple("0123456789")
KINDS = SHAPES + DIGITS
COLOURS = {  # RGB in [0, 1], far from each other and from the greys of the backgrounds
    "red": (0.88, 0.10, 0.12),
    "orange": (1.00, 0.55, 0.05),
    "yellow": (0.95, 0.90, 0.10),
    "green": (0.10, 0.65, 0.20),
    "cyan": (0.10, 0.80, 0.90),
    "blue": (0.12, 0.22, 0.92),
    "purple": (0.55, 0.12, 0.75),
    "pink": (1.00, 0.50, 0.78),
}
BACKGROUNDS = {"white": 0.97, "light gray": 0.75, "dark gray": 0.25, "black": 0.03}  # grey levels in [0, 1]
DIRECTIONS = {  # unit vectors (x to the right, y down)
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
    "up left": (-(0.5**0.5), -(0.5**0.5)),
    "up right": (0.5**0.5, -(0.5**0.5)),
    "down left": (-(0.5**0.5), 0.5**0.5),
    "down right": (0.5**0.5, 0.5**0.5),
}
MOTIONS = (*DIRECTIONS, "circle", "bounce", "grow", "shrink", "rotate", "stay")
SPEEDS = ("slow", "normal", "fast")  # a caption that names no speed means normal
# How far a motion goes in 32 frames at each speed, and the unit: lengths are in parts of the frame's shorter side.
DISTANCE = (0.22, 0.40, 0.62)
CIRCLE_TURNS = (0.5, 0.9, 1.4)
BOUNCES = (1.0, 2.0, 3.0)
SIZE_RATIO = (1.35, 1.75, 2.4)
ROTATION_TURNS = (0.25, 0.5, 1.0)

# Rotation cannot be seen on these, or makes one digit of another.
NEVER_ROTATE = ("circle", "ring", "6", "9")
HELD_OUT_PARTS = 10  # one in ten combinations


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes: indices into the tables above. The second object of a scene that has one is a dummy."""

    count: np.ndarray  # [N] int32: 1 or 2 objects
    kind: np.ndarray  # [N, 2] int32, likewise the next three
    colour: np.ndarray
    motion: np.ndarray
    speed: np.ndarray
    background: np.ndarray  # [N] int32

    def __len__(self) -> int:
        return len(self.count)

    def __getitem__(self, index: slice | np.ndarray) -> "Scenes":
        return Scenes(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    def as_dict(self) -> dict[str, np.ndarray]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def held_out(kind: np.ndarray, colour: np.ndarray, motion: np.ndarray) -> np.ndarray:
    """Whether training never shows these combinations (arrays of indices of any one shape)."""
    number = np.atleast_1d((np.asarray(kind, np.uint32) * len(COLOURS) + colour) * len(MOTIONS) + motion)
    for factor, shift in ((0x85EBCA6B, 13), (0xC2B2AE35, 16)):  # MurmurHash3's finaliser
        number = (number.astype(np.uint32) ^ (number >> 16).astype(np.uint32)) * np.uint32(factor)
        number ^= number >> np.uint32(shift)
    return (number % HELD_OUT_PARTS == 0).reshape(np.shape(kind))


def possible(kind: np.ndarray, motion: np.ndarray) -> np.ndarray:
    """Whether this object can be seen to move like this."""
    never = np.array([KINDS.index(name) for name in NEVER_ROTATE])
    return ~((np.asarray(motion) == MOTIONS.index("rotate")) & np.isin(kind, never))


def draw_scenes(seed: int, number: int, *, pairs: float = 0.5, want_held_out: bool = False) -> Scenes:
    """Draws `number` scenes; the same seed gives the same ones.

    Args:
      pairs: how many of them have two objects, as a part of 1. The two never have the same colour.
      want_held_out: whether every object is of a held-out combination, or none is.
    """
    generator = np.random.default_rng((seed, int(want_held_out)))

    def objects() -> np.ndarray:
        """[number, 3]: kind, colour, motion."""
        drawn = np.zeros((0, 3), np.int64)
        while len(drawn) < number:
            draws = generator.integers(0, (len(KINDS), len(COLOURS), len(MOTIONS)), (2 * number + 64, 3))
            kind, colour, motion = draws.T
            allowed = possible(kind, motion) & (held_out(kind, colour, motion) == want_held_out)
            drawn = np.concatenate([drawn, draws[allowed]])
        return drawn[:number]

    first, second = objects(), objects()
    while (same := first[:, 1] == second[:, 1]).any():
        second[same] = objects()[same]
    both = np.stack([first, second], axis=1)
    speed = generator.integers(0, len(SPEEDS), (number, 2))
    speed[both[..., 2] == MOTIONS.index("stay")] = SPEEDS.index("normal")
    arrays = {
        "count": 1 + (generator.random(number) < pairs),
        **{name: both[..., index] for index, name in enumerate(("kind", "colour", "motion"))},
        "speed": speed,
        "background": generator.integers(0, len(BACKGROUNDS), number),
    }
    return Scenes(**{name: array.astype(np.int32) for name, array in arrays.items()})
