"""Draws a dataset that needs no files: ten classes of shapes and patterns, each image made when it is read.

It is for trying things out without photos. What a network reaches on it says nothing about photos, so
the set is called synthetic wherever it is named.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from mgq.data.augmentation import Stream, generator
from mgq.data.pixel_decoders import Pixels
from mgq.errors import InputError

_Mask = npt.NDArray[np.uint8]
_Field = npt.NDArray[np.float32]

SYNTHETIC_NAME = "synthetic pictures"
_LEAST_SIZE = 16


@dataclass(frozen=True, eq=False)
class SyntheticImages:
    """``count`` drawings, uint8 (size, size, 3) in BGR order, the classes in turn: a ``Dataset``.

    Picture ``i`` depends on ``seed``, ``split`` and ``i`` alone. Place, size, rotation, proportions, colours, light,
    background and noise vary. The splits draw from separate random numbers, so that no picture is in both.

    Raises InputError for a size below 16, fewer than one picture, or another split.
    """

    count: int
    seed: int = 0
    size: int = 64
    split: Literal["train", "val"] = "train"
    labels: npt.NDArray[np.int64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InputError(f"{self.count} synthetic pictures are not possible: give at least 1")
        if self.size < _LEAST_SIZE:
            raise InputError(f"synthetic pictures of {self.size} pixels are too small: give at least {_LEAST_SIZE}")
        if self.split not in _STREAMS:
            raise InputError(f"the synthetic pictures have no split {self.split!r}: give train or val")
        labels = np.arange(self.count) % len(_DRAWN)
        labels.flags.writeable = False
        object.__setattr__(self, "labels", labels)

    @property
    def name(self) -> str:
        return SYNTHETIC_NAME

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(_DRAWN)

    def __len__(self) -> int:
        return self.count

    def image(self, index: int) -> Pixels:
        """Drawing number ``index``, 0 <= ``index`` < count. Raises IndexError for another."""
        if not 0 <= index < self.count:
            raise IndexError(index)
        rng = generator(self.seed, _STREAMS[self.split], 0, index)
        chance = rng.random(_CHANCES).tolist()
        draw = tuple(_DRAWN.values())[index % len(_DRAWN)]
        scene = _Scene(self.size, chance)
        ink = np.zeros((self.size, self.size), np.uint8)
        draw(ink, scene)
        return _noisy(_paint(ink, scene), chance[_NOISE], rng)


_STREAMS = {"train": Stream.TRAIN_IMAGE, "val": Stream.VAL_IMAGE}


# ---- what varies ----

# Where each random number is used; those of a shape come first.
_SHAPE, _COLOUR, _LIGHT, _CLUTTER, _NOISE = 0, 8, 16, 20, 40
_CHANCES = 41


class _Scene(NamedTuple):
    """The side of a picture in pixels, and its random numbers in 0..1."""

    size: int
    chance: list[float]

    def draw_between(self, which: int, low: float, high: float) -> float:
        return low + self.chance[which] * (high - low)

    @property
    def radius(self) -> float:
        return self.draw_between(_SHAPE, 0.24, 0.42) * self.size

    @property
    def centre(self) -> tuple[float, float]:
        """Where a shape of that radius lies within the picture, or nearly."""
        margin = 0.9 * self.radius / self.size
        x, y = (self.draw_between(_SHAPE + i, margin, 1 - margin) * self.size for i in (1, 2))
        return x, y

    @property
    def angle(self) -> float:
        return self.draw_between(_SHAPE + 3, 0, 2 * math.pi)

    def proportion(self, low: float, high: float) -> float:
        """What makes one star or cross differ from the next."""
        return self.draw_between(_SHAPE + 4, low, high)

    @property
    def period(self) -> float:
        """The length in pixels after which a pattern repeats."""
        return self.draw_between(_SHAPE, 0.16, 0.32) * self.size


# ---- shapes and patterns, drawn in white on black ----

_BITS = 4  # of a pixel's fraction, in coordinates


def _points(points: Sequence[tuple[float, float]] | npt.NDArray[np.float64]) -> npt.NDArray[np.int32]:
    return np.asarray(np.rint(np.asarray(points) * (1 << _BITS)), np.int32)


def _polygon(ink: _Mask, scene: _Scene, points: Sequence[tuple[float, float]]) -> None:
    """A polygon about the centre, given in radii, turned."""
    (x0, y0), r, c, s = scene.centre, scene.radius, math.cos(scene.angle), math.sin(scene.angle)
    turned = [(x0 + r * (c * x - s * y), y0 + r * (s * x + c * y)) for x, y in points]
    cv2.fillPoly(ink, [_points(turned)], (255,), cv2.LINE_AA, _BITS)


def _spot(ink: _Mask, centre: tuple[float, float], radius: float, colour: int = 255) -> None:
    ((x, y),) = _points([centre]).tolist()
    cv2.circle(ink, (x, y), round(radius * (1 << _BITS)), (colour,), -1, cv2.LINE_AA, _BITS)


def _circle_points(count: int, radii: Sequence[float]) -> list[tuple[float, float]]:
    """Points in equal angles about the origin, at ``radii`` in turn."""
    angles = [2 * math.pi * i / count for i in range(count)]
    return [(radii[i % len(radii)] * math.cos(a), radii[i % len(radii)] * math.sin(a)) for i, a in enumerate(angles)]


def _disc(ink: _Mask, scene: _Scene) -> None:
    _spot(ink, scene.centre, scene.radius)


def _ring(ink: _Mask, scene: _Scene) -> None:
    _spot(ink, scene.centre, scene.radius)
    _spot(ink, scene.centre, scene.radius * scene.proportion(0.5, 0.72), 0)


def _square(ink: _Mask, scene: _Scene) -> None:
    _polygon(ink, scene, _circle_points(4, [1.1]))


def _triangle(ink: _Mask, scene: _Scene) -> None:
    _polygon(ink, scene, _circle_points(3, [1.15]))


def _star(ink: _Mask, scene: _Scene) -> None:
    _polygon(ink, scene, _circle_points(10, [1.15, scene.proportion(0.42, 0.55)]))


def _cross(ink: _Mask, scene: _Scene) -> None:
    arm = scene.proportion(0.24, 0.38)
    corners = [(1.1, -arm), (1.1, arm), (arm, arm)]
    _polygon(ink, scene, [(c * x - s * y, s * x + c * y) for c, s in _QUARTERS for x, y in corners])


_QUARTERS = ((1, 0), (0, 1), (-1, 0), (0, -1))


def _grid(scene: _Scene) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The corners in and near the picture of a turned grid, in pixels and in cells, both (corners, 2)."""
    reach = math.ceil(0.75 * scene.size / scene.period) + 1
    places = np.stack(np.meshgrid(*[np.arange(-reach, reach + 1.0)] * 2), -1).reshape(-1, 2)
    middle = scene.size * np.array([scene.draw_between(_SHAPE + i, 0.35, 0.65) for i in (1, 2)])
    corners = places @ _turn(scene) + middle
    seen = (np.abs(corners - scene.size / 2) < scene.size / 2 + scene.period).all(1)
    return corners[seen], places[seen]


def _turn(scene: _Scene) -> npt.NDArray[np.float64]:
    """What takes cells of a grid to pixels, from the right."""
    c, s = scene.period * math.cos(scene.angle), scene.period * math.sin(scene.angle)
    return np.array([(c, s), (-s, c)])


def _polygons(ink: _Mask, corners: npt.NDArray[np.float64]) -> None:
    """Polygons (polygons, corners, 2) in pixels that do not overlap."""
    cv2.fillPoly(ink, list(_points(corners)), (255,), cv2.LINE_AA, _BITS)


def _stripes(ink: _Mask, scene: _Scene) -> None:
    width = scene.period * scene.proportion(0.4, 0.6)
    c, s = math.cos(scene.angle), math.sin(scene.angle)
    far, phase = scene.size, scene.draw_between(_SHAPE + 1, 0, scene.period)
    count = math.ceil(far / scene.period)
    starts = np.arange(-count, count + 1) * scene.period + phase
    x = starts[:, None] + np.array([0, 0, width, width])
    y = np.broadcast_to([-far, far, far, -far], x.shape)
    _polygons(ink, far / 2 + np.stack([c * x - s * y, s * x + c * y], -1))


def _checkerboard(ink: _Mask, scene: _Scene) -> None:
    corners, places = _grid(scene)
    _polygons(ink, corners[places.sum(1) % 2 == 0][:, None] + _CELL @ _turn(scene))


_CELL = np.array([(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)])


def _dots(ink: _Mask, scene: _Scene) -> None:
    corners, _ = _grid(scene)
    radius = scene.period * scene.proportion(0.26, 0.36)
    _polygons(ink, corners[:, None] + radius * np.array(_circle_points(12 + scene.size // 16, [1])))


def _glow(ink: _Mask, scene: _Scene) -> None:
    """A spot without an edge, longer than it is wide."""
    y, x = (np.arange(scene.size, dtype=np.float32) - at for at in scene.centre[::-1])
    c, s = math.cos(scene.angle) / scene.radius, math.sin(scene.angle) / scene.radius
    u = np.add.outer(s * y, c * x)
    v = np.add.outer(c * y, -s * x) * scene.proportion(1.1, 1.6)
    ink[...] = 255 * np.exp(-1.8 * (u * u + v * v))


_DRAWN: dict[str, Callable[[_Mask, _Scene], None]] = {
    "disc": _disc,
    "ring": _ring,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "stripes": _stripes,
    "checkerboard": _checkerboard,
    "dots": _dots,
    "glow": _glow,
}


# ---- colours ----


def _paint(ink: _Mask, scene: _Scene) -> _Field:
    """The drawing in one colour on another, both under a light from one side, above a shadow and pale clutter."""
    front, back = _colours(scene)
    light = _light(scene)
    cover = ink.astype(np.float32) / 255
    shade = light * (1 - 0.45 * _shadow(ink, scene))
    clutter = _clutter(scene) * scene.draw_between(_COLOUR + 6, -40, 40)
    # By planes, which NumPy is many times faster at than at pixels of three.
    planes = [(b + clutter) * shade * (1 - cover) + (2 - light) * cover * f for f, b in zip(front, back, strict=True)]
    return np.asarray(cv2.merge(planes), np.float32)


def _colours(scene: _Scene) -> tuple[list[float], list[float]]:
    """Front and back, BGR in 0..255: of any two hues, but the front clearly lighter than the back."""
    tones = (
        (scene.chance[_COLOUR], scene.draw_between(_COLOUR + 1, 0.1, 0.65), scene.draw_between(_COLOUR + 2, 0.82, 1.0)),
        (
            scene.chance[_COLOUR + 3],
            scene.draw_between(_COLOUR + 4, 0.3, 0.85),
            scene.draw_between(_COLOUR + 5, 0.2, 0.5),
        ),
    )
    light, dark = ([255 * part for part in reversed(colorsys.hsv_to_rgb(*tone))] for tone in tones)
    return light, dark


def _light(scene: _Scene) -> _Field:
    """A factor of about 0.8 to 1.2 that grows from one side of the picture to the other."""
    angle, strength = scene.draw_between(_LIGHT, 0, 2 * math.pi), scene.draw_between(_LIGHT + 1, 0.05, 0.3)
    ramp = np.linspace(-strength, strength, scene.size, dtype=np.float32)
    return np.add.outer(1 + math.sin(angle) * ramp, math.cos(angle) * ramp)


def _shadow(ink: _Mask, scene: _Scene) -> _Field:
    """The drawing blurred and moved to the lower right, 0..1."""
    by = max(1, round(scene.size * scene.draw_between(_LIGHT + 2, 0.01, 0.05)))
    moved = np.zeros(ink.shape, np.float32)
    moved[by:, by:] = _blur(ink, 1 / 16)[:-by, :-by]
    return moved


def _clutter(scene: _Scene) -> _Field:
    """Up to four blurred spots in the background, 0..1."""
    spots = np.zeros((scene.size, scene.size), np.uint8)
    for number in range(int(scene.draw_between(_CLUTTER, 0, 5))):
        x, y, radius = scene.chance[_CLUTTER + 1 + 3 * number : _CLUTTER + 4 + 3 * number]
        _spot(spots, (x * scene.size, y * scene.size), (0.04 + 0.14 * radius) * scene.size)
    return _blur(spots, 1 / 12)


def _blur(ink: _Mask, share: float) -> _Field:
    """The mean over squares of that share of the picture's side, 0..1."""
    return cv2.blur(ink, (round(share * len(ink)) | 1,) * 2).astype(np.float32) / 255


def _noisy(painted: _Field, strength: float, rng: np.random.Generator) -> Pixels:
    """``painted`` with even noise of up to 20 steps of 255 either way."""
    noise = np.frombuffer(rng.bytes(painted.size), np.uint8).reshape(painted.shape)
    amount = strength * 20 / 127.5
    return np.asarray(cv2.addWeighted(painted, 1, noise, amount, -127.5 * amount, dtype=cv2.CV_8U), np.uint8)
