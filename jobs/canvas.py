"""A picture to draw smooth shapes on: coordinates in picture heights in, one RGB image out.

Pillow draws at twice the size and the result is averaged down: its cheapest good antialiasing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from PIL import Image, ImageDraw

Rgb = tuple[int, int, int]
Color = Rgb | tuple[int, int, int, int]
Point = tuple[float, float]

SUPERSAMPLING = 2


class Canvas:
    """A picture `aspect` wide and 1 high, with a vertical gradient behind everything."""

    def __init__(self, width: int, height: int, *, top: Color, bottom: Color) -> None:
        size = (width * SUPERSAMPLING, height * SUPERSAMPLING)
        ramp = np.linspace(top, bottom, size[1]).round().astype(np.uint8)
        self.image = Image.fromarray(np.ascontiguousarray(np.broadcast_to(ramp[:, None], (*size[::-1], 3))))
        self.aspect = width / height
        self._unit = size[1]
        self._draw = ImageDraw.Draw(self.image, "RGBA")

    def picture(self) -> Image.Image:
        return self.image.reduce(SUPERSAMPLING)

    def disc(self, center: Point, radius: float, color: Color, *, squash: float = 1.0) -> None:
        x, y, rx, ry = (v * self._unit for v in (*center, radius, radius * squash))
        self._draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=color)

    def polygon(self, points: Iterable[Point], color: Color) -> None:
        self._draw.polygon([(x * self._unit, y * self._unit) for x, y in points], fill=color)

    def line(self, points: Iterable[Point], width: float, color: Color) -> None:
        scaled = [(x * self._unit, y * self._unit) for x, y in points]
        self._draw.line(scaled, fill=color, width=max(1, round(width * self._unit)), joint="curve")

    def box(self, left: float, top: float, right: float, bottom: float, color: Color) -> None:
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], color)

    def tower(self, x: float, rows: tuple[float, float], halves: tuple[float, float], color: Color) -> None:
        """A symmetric trapezoid around `x`: top and bottom row, half width at each."""
        (top, bottom), (a, b) = rows, halves
        self.polygon([(x - a, top), (x + a, top), (x + b, bottom), (x - b, bottom)], color)

    def sector(self, center: Point, radius: float, degrees: tuple[float, float], color: Color) -> None:
        x, y, r = (v * self._unit for v in (*center, radius))
        self._draw.pieslice((x - r, y - r, x + r, y + r), *degrees, fill=color)

    def glow(self, center: Point, radius: float, color: Rgb) -> None:
        """A soft halo: faint discs of falling size that add up."""
        for step in range(8):
            self.disc(center, radius * (1 - step / 8), (*color, 22))

    def ball(self, center: Point, radius: float, color: Rgb) -> None:
        """A sphere lit from the upper left."""
        for light in np.linspace(0, 1, 12):
            shift = radius * 0.35 * light
            r, g, b = (min(255, round(v * (0.55 + 0.45 * light) + 70 * light**3)) for v in color)
            self.disc((center[0] - shift, center[1] - shift), radius * (1 - 0.8 * light), (r, g, b))

    def ground(self, level: float, swell: float, waves: float, color: Color, *, shift: float = 0.0) -> None:
        """Hills or water: fills everything below a sum of two sines."""
        xs = np.linspace(0, self.aspect, 80)
        ys = level - swell * (
            0.6 * np.sin(waves * xs + shift) + 0.4 * np.sin(1.7 * waves * xs + 2 * shift + 1)
        )
        self.polygon([*zip(xs, ys, strict=True), (self.aspect, 1.0), (0.0, 1.0)], color)

    def cloud(self, center: Point, size: float) -> None:
        for dx, dy, r in ((-0.9, 0.1, 0.5), (-0.3, -0.2, 0.7), (0.4, -0.1, 0.6), (1.0, 0.12, 0.42)):
            self.disc((center[0] + dx * size, center[1] + dy * size), r * size, (255, 255, 255, 235))

    def stars(self, number: int, *, depth: float, alpha: int) -> None:
        """The same scattered stars at every call (steps of irrational numbers), down to row `depth`."""
        for k in range(number):
            place = (k * 0.6180339 % 1 * self.aspect, k * 0.4142135 % 1 * depth)
            self.disc(place, 0.003 + 0.001 * (k % 3), (255, 252, 230, alpha))


def placed(origin: Point, angle: float) -> Callable[[float, float], Point]:
    """Maps a thing's own coordinates to the canvas: turned by `angle` (radians, clockwise), then moved."""
    cos, sin = math.cos(angle), math.sin(angle)
    return lambda x, y: (origin[0] + x * cos - y * sin, origin[1] + x * sin + y * cos)


def mapped(place: Callable[[float, float], Point], points: Sequence[Point]) -> list[Point]:
    return [place(x, y) for x, y in points]
