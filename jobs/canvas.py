"""A picture to draw smooth shapes on: coordinates in picture heights in, one RGB image out.

Pillow draws at twice the size and the result is averaged down, which is the cheapest good antialiasing it has.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

Color = tuple[int, int, int] | tuple[int, int, int, int]
Point = tuple[float, float]

SUPERSAMPLING = 2


class Canvas:
    """A picture `aspect` wide and 1 high, with a vertical gradient behind everything."""

    def __init__(self, width: int, height: int, *, top: Color, bottom: Color) -> None:
        size = (width * SUPERSAMPLING, height * SUPERSAMPLING)
        ramp = np.linspace(top[:3], bottom[:3], size[1]).round().astype(np.uint8)
        self.image = Image.fromarray(np.ascontiguousarray(np.broadcast_to(ramp[:, None], (*size[::-1], 3))))
        self.aspect = width / height
        self._unit = size[1]
        self._draw = ImageDraw.Draw(self.image, "RGBA")

    def disc(self, center: Point, radius: float, color: Color, *, squash: float = 1.0) -> None:
        x, y, rx, ry = (v * self._unit for v in (*center, radius, radius * squash))
        self._draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=color)

    def polygon(self, points: Sequence[Point], color: Color) -> None:
        self._draw.polygon([(x * self._unit, y * self._unit) for x, y in points], fill=color)

    def line(self, points: Sequence[Point], width: float, color: Color) -> None:
        scaled = [(x * self._unit, y * self._unit) for x, y in points]
        self._draw.line(scaled, fill=color, width=max(1, round(width * self._unit)), joint="curve")

    def box(self, left: float, top: float, right: float, bottom: float, color: Color) -> None:
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], color)

    def slice(self, center: Point, radius: float, degrees: tuple[float, float], color: Color) -> None:
        x, y, r = (v * self._unit for v in (*center, radius))
        self._draw.pieslice((x - r, y - r, x + r, y + r), *degrees, fill=color)

    def glow(self, center: Point, radius: float, color: Color) -> None:
        """A soft halo: discs of falling size that add up."""
        for step in range(8):
            self.disc(center, radius * (1 - step / 8), (*color[:3], 22))

    def ball(self, center: Point, radius: float, color: Color) -> None:
        """A shaded sphere lit from the upper left."""
        for step in range(12):
            light = step / 11
            shade = tuple(round(c * (0.55 + 0.45 * light) + 70 * light**3) for c in color[:3])
            shift = radius * 0.35 * light
            self.disc(
                (center[0] - shift, center[1] - shift),
                radius * (1 - 0.8 * light),
                (min(shade[0], 255), min(shade[1], 255), min(shade[2], 255)),
            )

    def hills(self, base: float, height: float, waves: float, color: Color, *, shift: float = 0.0) -> None:
        """Rolling ground that fills everything below a sum of two sines."""
        xs = np.linspace(0, self.aspect, 80)
        ys = base - height * (
            0.6 * np.sin(waves * xs + shift) + 0.4 * np.sin(1.7 * waves * xs + 2 * shift + 1)
        )
        self.polygon([*zip(xs, ys, strict=True), (self.aspect, 1.0), (0.0, 1.0)], color)

    def cloud(self, center: Point, size: float) -> None:
        for dx, dy, r in ((-0.9, 0.1, 0.5), (-0.3, -0.2, 0.7), (0.4, -0.1, 0.6), (1.0, 0.12, 0.42)):
            self.disc((center[0] + dx * size, center[1] + dy * size), r * size, (255, 255, 255, 235))

    def picture(self) -> Image.Image:
        return self.image.reduce(SUPERSAMPLING)
