"""Measures what a video of the procedural world shows: colours by segmentation, kinds by a classifier, motion by track.

Nothing here knows what the prompt asked for, but for the number of objects and their colours, which say where to look.
Lengths are in parts of the frame's shorter side, as in scenes.py.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from wan_nano.classifier import CROP, Classifier
from wan_nano.render import UNIT_FRAMES
from wan_nano.scenes import (
    BOUNCES,
    CIRCLE_TURNS,
    COLOURS,
    DIRECTIONS,
    DISTANCE,
    KINDS,
    ROTATION_TURNS,
    SIZE_RATIO,
    SPEEDS,
)

PALETTE = np.array(list(COLOURS.values()), np.float32)  # [colours, 3]
FOREGROUND = 0.14  # distance in RGB from the background
OPAQUE = 0.35  # a pixel is an object's where this much of it is covered
FAR = 0.33  # distance in RGB at which a pixel is of no colour of the palette
SMALLEST = 0.0016  # area of the least object, in parts of the squared shorter side
STRAY = 0.12  # another colour with this part of the largest object's area is an object too
ANGLES = 72  # of the polar profiles by which rotation is seen
STILL = 0.09  # a centroid that stays within this does not move; that of what turns may move a little
GROWTH = 1.17  # ratio of sizes at which an object grows


@dataclass(frozen=True)
class ObjectReport:
    """What one object does."""

    colour: str
    kind: str
    motion: str
    speed: str | None  # None where it does not move
    shape_persistence: float  # part of the frames looked at in which the classifier says `kind`
    jitter: float  # mean second difference of place and size from frame to frame, in pixels of a 96-pixel frame


@dataclass(frozen=True)
class VideoReport:
    """What a video shows. `objects` has one entry for each colour that was found, the largest first."""

    objects: tuple[ObjectReport, ...]
    background: float  # grey level in [0, 1]
    flicker: float  # mean change of the background's level from frame to frame, in levels of 255

    def find(self, colour: str) -> ObjectReport | None:
        return next((found for found in self.objects if found.colour == colour), None)


def measure(frames: np.ndarray, classifier: Classifier) -> VideoReport:
    """Measures uint8 [F, H, W, 3]."""
    video = frames.astype(np.float32) / 255
    background = np.median(video.reshape(len(video), -1, 3), axis=1)  # [F, 3]
    coverage = segment(video, background)
    shorter = min(frames.shape[1:3])
    areas = np.median(coverage.sum(axis=(2, 3)), axis=1) / shorter**2  # [colours]
    order = np.argsort(-areas)
    present = [index for index in order if areas[index] >= max(SMALLEST, STRAY * areas[order[0]])]
    level = background.mean(axis=1)
    flicker = float(np.abs(np.diff(level)).mean() * 255) if len(level) > 1 else 0.0
    objects = tuple(_report(list(COLOURS)[index], coverage[index], shorter, classifier) for index in present)
    return VideoReport(objects, float(level.mean()), flicker)


def segment(video: np.ndarray, background: np.ndarray) -> np.ndarray:
    """How much of every pixel each colour covers: [colours, F, H, W].

    A pixel at an edge is a mixture of object and background: it lies on the line between the two colours. It belongs to
    the colour whose line is nearest.
    """
    offset = video - background[:, None, None]
    direction = PALETTE[:, None] - background[None]  # [colours, F, 3]
    length = np.square(direction).sum(-1)
    part = np.einsum("f h w c, k f c -> k f h w", offset, direction) / length[..., None, None]
    part = np.clip(part, 0, 1)
    squared = (
        np.square(offset).sum(-1)[None]
        - 2 * part * np.einsum("f h w c, k f c -> k f h w", offset, direction)
        + part**2 * length[..., None, None]
    )
    nearest = squared.argmin(axis=0)
    foreground = (np.square(offset).sum(-1) > FOREGROUND**2) & (squared.min(axis=0) < FAR**2)
    nearest_is_own = (np.arange(len(PALETTE))[:, None, None, None] == nearest) & foreground
    return np.where(nearest_is_own & (part > OPAQUE), part, 0)


def _report(colour: str, coverage: np.ndarray, shorter: int, classifier: Classifier) -> ObjectReport:
    """One colour's coverage [F, H, W]."""
    coverage = _largest_parts(coverage)
    track = Track.of(coverage, shorter)
    motion, speed = track.motion()
    # What turns is upright in its first frames.
    look = range(2) if motion == "rotate" else sorted({int(x) for x in np.linspace(0, len(coverage) - 1, 9)})
    seen = [crop(coverage[index]) for index in look if coverage[index].sum() > 4]
    if not seen:
        return ObjectReport(colour, "none", motion, speed, 0.0, track.jitter)
    scores = classifier(np.stack(seen))
    kind = int(scores.mean(axis=0).argmax())
    persistence = float((scores.argmax(axis=1) == kind).mean())
    return ObjectReport(colour, KINDS[kind], motion, speed, persistence, track.jitter)


def _largest_parts(coverage: np.ndarray) -> np.ndarray:
    """Drops specks: what lies farther from the object's median place than twice its typical extent."""
    cleaned = coverage.copy()
    for frame in cleaned:
        rows, columns = np.nonzero(frame)
        if len(rows) < 4:
            continue
        centre = np.array([np.median(rows), np.median(columns)])
        distance = np.hypot(rows - centre[0], columns - centre[1])
        far = distance > max(3 * np.median(distance), 6)
        frame[rows[far], columns[far]] = 0
    return cleaned


def crop(coverage: np.ndarray) -> np.ndarray:
    """The object of one frame [H, W], in the middle of [CROP, CROP] and three quarters of it in size."""
    rows, columns = np.nonzero(coverage)
    weights = []
    side = max(np.ptp(rows), np.ptp(columns)) + 1
    for axis, size in ((rows, coverage.shape[0]), (columns, coverage.shape[1])):
        centre = (axis.min() + axis.max()) / 2
        position = centre + (np.arange(CROP) - (CROP - 1) / 2) * side / (0.75 * CROP)
        width = max(1.0, side / (0.75 * CROP))  # a wider hat where pixels are put together
        weight = np.clip(1 - np.abs(position[:, None] - np.arange(size)) / width, 0, None)
        weights.append(weight / width)
    return np.clip(weights[0] @ coverage @ weights[1].T, 0, 1).astype(np.float32)


@dataclass(frozen=True)
class Track:
    """An object over time."""

    centre: np.ndarray  # [F, 2]: x, y
    size: np.ndarray  # [F]: root of the area
    profiles: np.ndarray  # [F, ANGLES]: mass by angle around the centre

    @classmethod
    def of(cls, coverage: np.ndarray, shorter: int) -> "Track":
        _, height, width = coverage.shape
        mass = np.maximum(coverage.sum(axis=(1, 2)), 1e-6)
        x, y = np.arange(width) + 0.5, np.arange(height) + 0.5
        centre = np.stack([coverage.sum(axis=1) @ x, coverage.sum(axis=2) @ y], axis=1) / mass[:, None]
        profiles = np.stack([_polar_profile(frame, place) for frame, place in zip(coverage, centre, strict=True)])
        return cls(centre / shorter, np.sqrt(mass) / shorter, profiles)

    @property
    def jitter(self) -> float:
        """Mean absolute second difference of place and size, in pixels of a 96-pixel frame."""
        if len(self.size) < 3:
            return 0.0
        series = np.concatenate([self.centre, self.size[:, None]], axis=1)
        return float(96 * np.abs(np.diff(series, 2, axis=0)).mean())

    def motion(self) -> tuple[str, str | None]:
        """The name of the motion and of its speed."""
        frames = len(self.size)
        if frames < 5:
            return "stay", None
        units = min((frames - 1) / UNIT_FRAMES, 1.0)  # of the distances in scenes.py
        ends = 3 if frames > 8 else 1
        ratio = self.size[-ends:].mean() / self.size[:ends].mean()
        ratio = ratio ** ((frames - 1) / (frames - ends))
        steps = np.diff(_smooth(self.centre), axis=0)
        net = self.centre[-1] - self.centre[0]
        distance, path = float(np.hypot(*net)), float(np.hypot(*steps.T).sum())
        spread = np.ptp(self.centre, axis=0)
        growth = ratio ** (1 / units)
        if distance > 0.06 and distance > 0.8 * path:
            names = list(DIRECTIONS)
            best = int(np.argmax([np.dot(net, direction) for direction in DIRECTIONS.values()]))
            return names[best], nearest_speed(distance / units, DISTANCE)
        if spread.max() < 0.10 and not 1 / GROWTH < growth < GROWTH:
            return ("grow" if growth > 1 else "shrink"), nearest_speed(max(growth, 1 / growth), SIZE_RATIO, ratio=True)
        if spread.max() < STILL:
            turns = self.turns() / units
            return ("rotate", nearest_speed(abs(turns), ROTATION_TURNS)) if abs(turns) > 0.1 else ("stay", None)
        if spread[0] < 0.35 * spread[1]:
            hops = _hops(self.centre[:, 1]) * UNIT_FRAMES / (frames - 1)
            return "bounce", nearest_speed(hops, BOUNCES)
        middle, _ = fit_circle(self.centre)
        angles = np.unwrap(np.arctan2(*(self.centre - middle).T[::-1]))
        turns = abs(angles[-1] - angles[0]) / (2 * np.pi) * UNIT_FRAMES / (frames - 1)
        return "circle", nearest_speed(turns, CIRCLE_TURNS)

    def turns(self) -> float:
        """Turns of the object around its centre, clockwise positive: the sum of what fits best between frames."""
        spectra = np.fft.rfft(self.profiles - self.profiles.mean(axis=1, keepdims=True), axis=1)
        total = 0.0
        gap = 2
        for first, second in itertools.pairwise(spectra[::gap]):
            power = np.abs(first) * np.abs(second)
            fit = np.fft.irfft(second * np.conj(first), ANGLES)
            if power.sum() < 1e-9:
                continue
            shift = int(fit.argmax())
            before, at, after = fit[shift - 1], fit[shift], fit[(shift + 1) % ANGLES]
            curve = before - 2 * at + after
            shift_fine = shift + (0.5 * (before - after) / curve if curve < 0 else 0.0)
            total += (shift_fine + ANGLES / 2) % ANGLES - ANGLES / 2
        return total / ANGLES


def nearest_speed(value: float, values: Sequence[float], *, ratio: bool = False) -> str:
    """The speed whose value is nearest in proportion (of the logarithms, for ratios of sizes)."""
    table = np.log(values) if ratio else np.asarray(values)
    value = np.log(value) if ratio else value
    return SPEEDS[int(np.abs(np.log(np.maximum(value, 1e-3)) - np.log(table)).argmin())]


def fit_circle(points: np.ndarray) -> tuple[np.ndarray, float]:
    """Centre and radius of the circle nearest to points [N, 2] (least squares after Kasa 1976)."""
    matrix = np.concatenate([2 * points, np.ones((len(points), 1))], axis=1)
    solution, *_ = np.linalg.lstsq(matrix, np.square(points).sum(axis=1), rcond=None)
    centre = solution[:2]
    return centre, float(np.sqrt(max(solution[2] + centre @ centre, 0)))


def _smooth(points: np.ndarray) -> np.ndarray:
    """Averages of three frames, so that jitter does not count as path."""
    padded = np.pad(points, ((1, 1), (0, 0)), mode="edge")
    return (padded[:-2] + padded[1:-1] + padded[2:]) / 3


def _hops(height: np.ndarray) -> float:
    """How often a height [F] goes up and down: half of its monotone runs, those over a third of its span."""
    least = np.ptp(height) / 3
    runs, turning_point, direction = 0, height[0], 0.0
    for value in height[1:]:
        moved = value - turning_point
        if direction * moved > 0:  # farther the same way
            turning_point = value
        elif abs(moved) > least:  # the other way, or for the first time
            runs, direction, turning_point = runs + 1, np.sign(moved), value
    return runs / 2


def _polar_profile(frame: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Mass by angle around a centre (x, y in pixels), clockwise from the right, smoothed."""
    rows, columns = np.nonzero(frame)
    if len(rows) == 0:
        return np.zeros(ANGLES)
    across, down = columns + 0.5 - centre[0], rows + 0.5 - centre[1]
    place = np.arctan2(down, across) / (2 * np.pi) * ANGLES
    radius = np.hypot(across, down)
    weight = frame[rows, columns] * radius
    low = np.floor(place).astype(int)
    profile = np.bincount(low % ANGLES, weight * (1 - (place - low)), ANGLES)
    profile += np.bincount((low + 1) % ANGLES, weight * (place - low), ANGLES)
    kernel = np.exp(-0.5 * (np.arange(-4, 5) / 1.5) ** 2)
    padded = np.concatenate([profile[-4:], profile, profile[:4]])
    return np.convolve(padded, kernel / kernel.sum(), mode="valid") / max(radius.mean(), 1e-6) / len(rows)
