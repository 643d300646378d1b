"""Small animated scenes for the demo's clips: (seconds, width, height) in, one RGB picture out.

Shapes are large and soft on purpose: they must still be recognisable after the demo's low-pass video
encoder at 192 x 288 pixels. Coordinates are in picture heights, origin top left, so that one scene fits
every aspect ratio.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable

import numpy as np
from PIL import Image

from jobs.canvas import Canvas, Point

Scene = Callable[[float, int, int], Image.Image]


def bouncing_ball(t: float, width: int, height: int) -> Image.Image:
    c = Canvas(width, height, top=(92, 160, 222), bottom=(232, 240, 248))
    horizon, eye = 0.52, 0.5 * c.aspect
    c.box(0, horizon, c.aspect, 1, (238, 232, 218))
    depths = [horizon + 0.5 / z for z in np.arange(1.0, 13.0, 0.5)] + [horizon]
    for row, (near, far) in enumerate(zip(depths, depths[1:], strict=False)):
        for column in range(-14, 14):
            if (row + column) % 2:
                xs = [(column + k) * 0.36 for k in (0, 1)]
                n, f = (near - horizon) * 2, (far - horizon) * 2
                c.polygon(
                    [
                        (eye + xs[0] * n, near),
                        (eye + xs[1] * n, near),
                        (eye + xs[1] * f, far),
                        (eye + xs[0] * f, far),
                    ],
                    (74, 96, 132),
                )
    c.polygon(
        [(0, horizon - 0.004), (c.aspect, horizon - 0.004), (c.aspect, horizon + 0.03), (0, horizon + 0.03)],
        (190, 202, 220),
    )
    x = eye + 0.52 * c.aspect * 0.75 * math.sin(1.1 * t - 1.2)
    bounce = abs(math.sin(2.6 * t))
    c.disc((x, 0.86), 0.13 * (1 - 0.35 * bounce), (30, 34, 50, 110), squash=0.28)
    c.ball((x, 0.72 - 0.46 * bounce), 0.14, (226, 62, 50))
    return c.picture()


def sailing_boat(t: float, width: int, height: int) -> Image.Image:
    c = Canvas(width, height, top=(104, 178, 232), bottom=(255, 226, 176))
    sun = (c.aspect * (0.15 + 0.14 * t), 0.3 - 0.12 * math.sin(0.6 * t))
    c.glow(sun, 0.26, (255, 236, 150))
    c.disc(sun, 0.085, (255, 226, 92))
    c.hills(0.66, 0.012, 9, (66, 140, 190), shift=1.5 * t)
    x, y = c.aspect * (0.3 + 0.1 * t), 0.72 + 0.014 * math.sin(2.4 * t)
    tilt = 0.07 * math.sin(2.4 * t + 1)

    def at(dx: float, dy: float) -> Point:
        return x + dx * math.cos(tilt) - dy * math.sin(tilt), y + dx * math.sin(tilt) + dy * math.cos(tilt)

    c.line([at(0, 0), at(0, -0.52)], 0.014, (92, 62, 40))
    c.polygon([at(-0.02, -0.5), at(-0.02, -0.06), at(-0.27, -0.06)], (252, 250, 244))
    c.polygon([at(0.02, -0.46), at(0.02, -0.06), at(0.2, -0.06)], (226, 78, 62))
    c.polygon([at(-0.29, -0.03), at(0.3, -0.03), at(0.19, 0.1), at(-0.2, 0.1)], (120, 70, 44))
    c.hills(0.79, 0.018, 7, (44, 112, 168), shift=-2.1 * t)
    c.hills(0.9, 0.022, 5, (28, 84, 140), shift=2.6 * t)
    return c.picture()


def steam_train(t: float, width: int, height: int) -> Image.Image:
    c = Canvas(width, height, top=(150, 206, 242), bottom=(236, 246, 240))
    c.hills(0.58, 0.09, 3.1, (146, 190, 138), shift=0.3 * t)
    c.hills(0.7, 0.05, 4.3, (106, 164, 96), shift=0.8 * t)
    c.box(0, 0.82, c.aspect, 1, (178, 152, 116))
    for k in range(-1, round(c.aspect / 0.12) + 2):
        tie = k * 0.12 - (0.3 * t) % 0.12
        c.box(tie, 0.855, tie + 0.05, 0.885, (110, 82, 60))
    c.box(0, 0.84, c.aspect, 0.856, (90, 92, 100))
    x = -0.1 + 0.26 * t
    for puff in range(7):
        age = (puff + (1.6 * t) % 1) / 7
        c.disc(
            (x + 0.5 - 0.75 * age, 0.3 - 0.17 * age),
            0.035 + 0.085 * age,
            (250, 250, 250, round(225 * (1 - age))),
        )
    for car, color in ((-0.62, (218, 158, 52)), (-0.2, (62, 116, 176))):
        c.box(x + car, 0.53, x + car + 0.37, 0.77, color)
        c.box(x + car - 0.02, 0.5, x + car + 0.39, 0.54, (70, 70, 82))
        for pane in range(3):
            c.box(x + car + 0.035 + 0.11 * pane, 0.58, x + car + 0.115 + 0.11 * pane, 0.67, (236, 246, 250))
        for wheel in (0.08, 0.29):
            _wheel(c, (x + car + wheel, 0.79), 0.052, 6 * t)
    c.box(x + 0.21, 0.44, x + 0.37, 0.77, (186, 44, 48))
    c.box(x + 0.18, 0.41, x + 0.4, 0.455, (60, 58, 66))
    c.box(x + 0.245, 0.5, x + 0.335, 0.6, (236, 246, 250))
    c.box(x + 0.37, 0.57, x + 0.66, 0.76, (186, 44, 48))
    c.disc((x + 0.66, 0.665), 0.095, (150, 32, 38))
    c.polygon([(x + 0.48, 0.57), (x + 0.46, 0.4), (x + 0.56, 0.4), (x + 0.54, 0.57)], (52, 52, 60))
    c.polygon([(x + 0.64, 0.76), (x + 0.82, 0.83), (x + 0.64, 0.83)], (70, 70, 82))
    for wheel, radius in ((0.3, 0.075), (0.47, 0.06), (0.61, 0.06)):
        _wheel(c, (x + wheel, 0.845 - radius), radius, 6 * t)
    return c.picture()


def _wheel(c: Canvas, center: Point, radius: float, angle: float) -> None:
    c.disc(center, radius, (48, 48, 56))
    c.disc(center, radius * 0.72, (206, 206, 212))
    for spoke in range(3):
        dx, dy = (radius * f(angle + spoke * math.pi / 3) for f in (math.cos, math.sin))
        c.line(
            [(center[0] - dx, center[1] - dy), (center[0] + dx, center[1] + dy)], radius * 0.2, (48, 48, 56)
        )


def wall_clock(t: float, width: int, height: int) -> Image.Image:
    c = Canvas(width, height, top=(196, 214, 200), bottom=(166, 188, 176))
    for stripe in range(0, 12, 2):
        c.box(stripe * 0.1, 0, stripe * 0.1 + 0.1, 1, (206, 222, 208, 150))
    center = (c.aspect / 2, 0.4)
    swing = 0.42 * math.sin(math.pi * t)
    bob = (center[0] + 0.5 * math.sin(swing), center[1] + 0.5 * math.cos(swing))
    c.line([center, bob], 0.022, (158, 116, 48))
    c.ball(bob, 0.075, (224, 178, 64))
    c.disc(center, 0.36, (112, 66, 38))
    c.disc(center, 0.315, (252, 248, 236))
    for hour in range(12):
        dx, dy = math.sin(hour * math.pi / 6), math.cos(hour * math.pi / 6)
        inner = 0.24 if hour % 3 == 0 else 0.262
        tick = [(center[0] + r * dx, center[1] - r * dy) for r in (inner, 0.292)]
        c.line(tick, 0.022 if hour % 3 == 0 else 0.012, (50, 46, 44))
    minutes = 10 + 12 * t
    for turns, length, thick, color in (
        (minutes / 720 + 10 / 12, 0.16, 0.034, (40, 40, 52)),
        (minutes / 60, 0.24, 0.022, (40, 40, 52)),
        (t / 4, 0.27, 0.011, (206, 52, 44)),
    ):
        dx, dy = math.sin(2 * math.pi * turns), math.cos(2 * math.pi * turns)
        c.line([center, (center[0] + length * dx, center[1] - length * dy)], thick, color)
    c.disc(center, 0.026, (206, 52, 44))
    return c.picture()


def color_wheel(t: float, width: int, height: int) -> Image.Image:
    c = Canvas(width, height, top=(52, 54, 72), bottom=(26, 28, 40))
    center = (c.aspect / 2, 0.53)
    c.disc((center[0] + 0.015, center[1] + 0.02), 0.41, (0, 0, 0, 90))
    for sector in range(12):
        r, g, b = (round(255 * v) for v in colorsys.hsv_to_rgb(sector / 12, 0.78, 0.96))
        start = 40 * t * (1 + 0.25 * t) + 30 * sector
        c.slice(center, 0.4, (start, start + 30.5), (r, g, b))
    c.disc(center, 0.12, (246, 246, 248))
    c.disc(center, 0.05, (52, 54, 72))
    c.polygon([(center[0] - 0.05, 0.05), (center[0] + 0.05, 0.05), (center[0], 0.17)], (250, 250, 252))
    return c.picture()


def lighthouse(t: float, width: int, height: int) -> Image.Image:
    c = Canvas(width, height, top=(14, 20, 52), bottom=(70, 84, 132))
    for star in range(40):
        x, y = (star * 0.6180339) % 1 * c.aspect, (star * 0.4142135) % 1 * 0.55
        c.disc((x, y), 0.003 + 0.002 * (star % 3), (255, 252, 226, 150 + 35 * (star % 4)))
    c.disc((c.aspect * 0.2, 0.12), 0.06, (246, 240, 208))
    lamp = (c.aspect * 0.56, 0.355)
    for turn in (0.0, math.pi):
        angle = 1.5 * t + turn
        reach, rise = 1.1 * math.cos(angle), 0.05 + 0.06 * math.sin(angle)
        end = (lamp[0] + reach, lamp[1] + rise)
        c.polygon([lamp, (end[0], end[1] - 0.13), (end[0], end[1] + 0.13)], (255, 244, 170, 120))
    c.polygon(
        [(lamp[0] - 0.07, 0.4), (lamp[0] + 0.07, 0.4), (lamp[0] + 0.115, 0.85), (lamp[0] - 0.115, 0.85)],
        (240, 238, 232),
    )
    for band in (0.46, 0.6, 0.74):
        w0, w1 = (0.07 + (y - 0.4) * 0.1 for y in (band, band + 0.07))
        c.polygon(
            [
                (lamp[0] - w0, band),
                (lamp[0] + w0, band),
                (lamp[0] + w1, band + 0.07),
                (lamp[0] - w1, band + 0.07),
            ],
            (206, 54, 50),
        )
    c.box(lamp[0] - 0.055, 0.32, lamp[0] + 0.055, 0.4, (255, 240, 160))
    c.glow(lamp, 0.1, (255, 246, 190))
    c.polygon([(lamp[0] - 0.075, 0.325), (lamp[0], 0.26), (lamp[0] + 0.075, 0.325)], (160, 38, 40))
    c.box(lamp[0] - 0.09, 0.395, lamp[0] + 0.09, 0.412, (60, 62, 76))
    c.polygon(
        [(lamp[0] - 0.3, 0.9), (lamp[0] - 0.16, 0.82), (lamp[0] + 0.17, 0.81), (lamp[0] + 0.34, 0.92)],
        (66, 62, 70),
    )
    c.hills(0.88, 0.008, 16, (30, 52, 104), shift=1.4 * t)
    c.hills(0.94, 0.01, 12, (20, 38, 84), shift=-1.8 * t)
    return c.picture()


def kite(t: float, width: int, height: int) -> Image.Image:
    c = Canvas(width, height, top=(64, 146, 226), bottom=(206, 232, 250))
    for k, (y, size, speed) in enumerate(((0.2, 0.1, 0.1), (0.42, 0.07, 0.06), (0.12, 0.06, 0.08))):
        c.cloud(((0.25 + 0.55 * k + speed * t) % (c.aspect + 0.3) - 0.1, y), size)
    c.hills(0.88, 0.04, 2.6, (98, 176, 78), shift=0.6)
    x, y = c.aspect * (0.55 + 0.14 * math.sin(0.9 * t)), 0.34 + 0.09 * math.sin(1.7 * t)
    lean = 0.35 * math.cos(0.9 * t) + 0.12

    def at(dx: float, dy: float) -> Point:
        return x + dx * math.cos(lean) - dy * math.sin(lean), y + dx * math.sin(lean) + dy * math.cos(lean)

    hand, knot = (c.aspect * 0.22, 0.76), at(0, 0.05)
    sag = [
        (hand[0] + (knot[0] - hand[0]) * s, hand[1] + (knot[1] - hand[1]) * s + 0.12 * s * (1 - s))
        for s in np.linspace(0, 1, 20)
    ]
    c.line(sag, 0.006, (250, 250, 250))
    yellow, orange = (246, 206, 60), (232, 92, 60)
    for left, top, bottom in ((-0.16, yellow, orange), (0.16, orange, yellow)):
        c.polygon([at(0, -0.2), at(left, 0), at(0, 0)], top)
        c.polygon([at(0, 0.28), at(left, 0), at(0, 0)], bottom)
    tail = [at(0.05 * math.sin(5 * t + 9 * s) * s, 0.28 + 0.34 * s) for s in np.linspace(0, 1, 16)]
    c.line(tail, 0.01, (150, 60, 120))
    for bow in tail[3::4]:
        c.disc(bow, 0.022, (214, 70, 140))
    c.disc((hand[0] - 0.05, 0.745), 0.034, (238, 196, 160))
    c.line([(hand[0] - 0.05, 0.79), hand], 0.022, (238, 196, 160))
    c.polygon(
        [(hand[0] - 0.09, 0.775), (hand[0] - 0.01, 0.775), (hand[0], 0.89), (hand[0] - 0.1, 0.89)],
        (200, 56, 70),
    )
    c.line([(hand[0] - 0.075, 0.88), (hand[0] - 0.08, 0.97)], 0.024, (50, 62, 110))
    c.line([(hand[0] - 0.025, 0.88), (hand[0] - 0.02, 0.97)], 0.024, (50, 62, 110))
    return c.picture()


def fish_tank(t: float, width: int, height: int) -> Image.Image:
    c = Canvas(width, height, top=(86, 198, 220), bottom=(14, 72, 132))
    c.hills(0.9, 0.02, 4, (222, 196, 140), shift=0.4)
    for plant in range(6):
        x = c.aspect * (0.06 + 0.18 * plant)
        stem = [
            (x + 0.035 * math.sin(1.8 * t + 5 * s + plant) * s, 0.95 - (0.25 + 0.06 * (plant % 3)) * s)
            for s in np.linspace(0, 1, 14)
        ]
        c.line(stem, 0.026, (48, 140, 84))
    for bubble in range(12):
        rise = (bubble * 0.37 + 0.22 * t) % 1
        c.disc(
            (c.aspect * ((bubble * 0.618) % 1) + 0.012 * math.sin(6 * rise), 0.95 - rise),
            0.009 + 0.008 * (bubble % 3),
            (226, 246, 252, 150),
        )
    for k, (y, size, speed, color) in enumerate(
        (
            (0.3, 0.15, 0.24, (246, 138, 40)),
            (0.56, 0.11, -0.2, (250, 220, 70)),
            (0.74, 0.085, 0.3, (232, 84, 120)),
        )
    ):
        way = 1 if speed > 0 else -1
        x = (0.5 + 0.4 * k + speed * t) % (c.aspect + 0.5) - 0.25
        y += 0.025 * math.sin(2 * t + k)
        flap = 0.35 * math.sin(9 * t + k)
        tail = (x - way * size * 0.85, y)
        c.polygon(
            [
                tail,
                (x - way * size * 1.6, y - size * (0.6 + flap)),
                (x - way * size * 1.6, y + size * (0.6 - flap)),
            ],
            color,
        )
        c.polygon(
            [
                (x - way * size * 0.4, y - size * 0.4),
                (x + way * size * 0.2, y - size * 0.95),
                (x + way * size * 0.4, y - size * 0.4),
            ],
            color,
        )
        c.disc((x, y), size, color, squash=0.58)
        c.disc((x - way * size * 0.1, y), size * 0.2, (255, 250, 240, 210), squash=2.4)
        c.disc((x + way * size * 0.62, y - size * 0.12), size * 0.14, (255, 255, 255))
        c.disc((x + way * size * 0.66, y - size * 0.12), size * 0.075, (20, 20, 30))
    return c.picture()


def windmill(t: float, width: int, height: int) -> Image.Image:
    c = Canvas(width, height, top=(140, 200, 240), bottom=(244, 240, 214))
    c.cloud((0.25 + 0.06 * t, 0.2), 0.09)
    c.hills(0.76, 0.03, 3, (150, 190, 90), shift=1.0)
    for row in range(4):
        for k in range(22):
            c.disc(
                (k * 0.075 + 0.035 * (row % 2), 0.83 + 0.05 * row),
                0.014,
                ((226, 66, 72), (250, 206, 70), (206, 96, 170))[(k + row) % 3],
            )
    hub = (c.aspect * 0.56, 0.4)
    c.polygon(
        [(hub[0] - 0.09, 0.4), (hub[0] + 0.09, 0.4), (hub[0] + 0.15, 0.8), (hub[0] - 0.15, 0.8)],
        (160, 92, 66),
    )
    c.polygon([(hub[0] - 0.115, 0.42), (hub[0], 0.28), (hub[0] + 0.115, 0.42)], (92, 58, 50))
    c.box(hub[0] - 0.035, 0.68, hub[0] + 0.035, 0.8, (76, 50, 44))
    for blade in range(4):
        a = 1.3 * t + blade * math.pi / 2
        along, across = (math.cos(a), math.sin(a)), (-math.sin(a), math.cos(a))
        corners = [(0.05, 0.0), (0.34, 0.0), (0.34, 0.085), (0.05, 0.085)]
        c.polygon(
            [
                (hub[0] + u * along[0] + v * across[0], hub[1] + u * along[1] + v * across[1])
                for u, v in corners
            ],
            (250, 246, 236),
        )
        c.line([hub, (hub[0] + 0.35 * along[0], hub[1] + 0.35 * along[1])], 0.016, (92, 58, 50))
    c.disc(hub, 0.026, (70, 46, 42))
    return c.picture()


def hot_air_balloon(t: float, width: int, height: int) -> Image.Image:
    c = Canvas(width, height, top=(96, 170, 232), bottom=(252, 222, 196))
    for peak in range(5):
        x = c.aspect * (0.02 + 0.25 * peak)
        top = 0.5 + 0.08 * ((peak * 7) % 3) / 2
        c.polygon([(x - 0.34, 0.9), (x, top), (x + 0.34, 0.9)], (118, 130, 168))
        c.polygon(
            [
                (x - 0.07, top + 0.082),
                (x, top),
                (x + 0.07, top + 0.082),
                (x + 0.02, top + 0.06),
                (x - 0.03, top + 0.09),
            ],
            (248, 248, 252),
        )
    c.hills(0.86, 0.03, 3.4, (96, 150, 92), shift=2.0)
    for k, (start, size) in enumerate(((0.3, 0.21), (0.78, 0.12))):
        x, y = (
            c.aspect * (start + 0.035 * t) + 0.02 * math.sin(t + k),
            0.62 - 0.055 * t * (1 - 0.3 * k) - 0.16 * k,
        )
        colors = ((222, 66, 58), (250, 206, 76)) if k == 0 else ((66, 120, 200), (244, 244, 244))
        c.polygon(
            [
                (x - size * 0.72, y + size * 0.6),
                (x + size * 0.72, y + size * 0.6),
                (x + size * 0.22, y + size * 1.28),
                (x - size * 0.22, y + size * 1.28),
            ],
            colors[0],
        )
        for gore in range(5):
            turn = np.linspace(math.pi, 3 * math.pi, 48)
            drop = np.where(turn > 2 * math.pi, 1.28, 1.0)
            xs, ys = x + size * (1 - 0.24 * gore) * np.cos(turn), y + size * drop * np.sin(turn)
            c.polygon(list(zip(xs, ys, strict=True)), colors[gore % 2])
        for rope in (-0.18, 0.18):
            c.line(
                [(x + rope * size, y + size * 1.2), (x + rope * size, y + size * 1.6)], 0.007, (90, 70, 56)
            )
        c.box(x - 0.24 * size, y + size * 1.55, x + 0.24 * size, y + size * 1.85, (138, 92, 56))
    return c.picture()


def rocket(t: float, width: int, height: int) -> Image.Image:
    lift = max(0.0, t - 0.6) ** 2 * 0.055
    night = min(1.0, lift / 0.5)
    c = Canvas(
        width,
        height,
        top=(round(70 - 50 * night), round(120 - 90 * night), round(200 - 130 * night)),
        bottom=(round(240 - 150 * night), round(190 - 90 * night), round(150 + 10 * night)),
    )
    for star in range(30):
        c.disc(
            ((star * 0.6180339) % 1 * c.aspect, (star * 0.4142135) % 1 * 0.7),
            0.004,
            (255, 255, 240, round(230 * night)),
        )
    x, y = c.aspect / 2, 0.56 - lift
    for puff in range(9):
        age = (puff / 9 + 0.7 * t) % 1
        side = (-1) ** puff * (0.05 + 0.22 * age)
        c.disc((x + side, 0.86 - 0.03 * age), 0.05 + 0.07 * age, (236, 232, 230, round(220 * (1 - age))))
    c.box(0, 0.88, c.aspect, 1, (88, 96, 88))
    c.box(x - 0.22, 0.86, x + 0.22, 0.89, (120, 122, 130))
    flame = 0.13 + 0.035 * math.sin(31 * t) + 0.06 * min(1.0, t)
    for scale, color in ((1.0, (250, 120, 40)), (0.7, (255, 196, 60)), (0.4, (255, 250, 210))):
        c.polygon(
            [
                (x - 0.055 * scale, y + 0.24),
                (x + 0.055 * scale, y + 0.24),
                (x, y + 0.24 + flame * scale * 1.4),
            ],
            color,
        )
    for way in (-1, 1):
        c.polygon(
            [(x + way * 0.075, y + 0.1), (x + way * 0.16, y + 0.26), (x + way * 0.06, y + 0.23)],
            (206, 52, 52),
        )
    c.box(x - 0.08, y - 0.14, x + 0.08, y + 0.24, (240, 242, 246))
    c.box(x + 0.03, y - 0.14, x + 0.08, y + 0.24, (206, 212, 222))
    nose = [(x + 0.08 * math.cos(a), y - 0.14 - 0.2 * math.sin(a)) for a in np.linspace(0, math.pi, 24)]
    c.polygon(nose, (206, 52, 52))
    c.disc((x, y - 0.04), 0.046, (70, 84, 110))
    c.disc((x, y - 0.04), 0.033, (140, 206, 240))
    c.box(x - 0.08, y + 0.12, x + 0.08, y + 0.15, (60, 90, 160))
    return c.picture()


def sunrise(t: float, width: int, height: int) -> Image.Image:
    day = min(1.0, t)
    c = Canvas(
        width,
        height,
        top=(round(46 + 60 * day), round(44 + 110 * day), round(104 + 110 * day)),
        bottom=(255, round(140 + 70 * day), round(96 + 70 * day)),
    )
    sun = (c.aspect * 0.5, 0.72 - 0.42 * day)
    c.glow(sun, 0.36, (255, 214, 120))
    c.disc(sun, 0.12, (255, 232, 140))
    c.polygon(
        [
            (0, 0.62),
            (c.aspect * 0.22, 0.36),
            (c.aspect * 0.42, 0.62),
            (c.aspect * 0.72, 0.42),
            (c.aspect, 0.66),
            (c.aspect, 1),
            (0, 1),
        ],
        (88, 70, 112),
    )
    c.hills(0.76, 0.05, 3, (60, 62, 92), shift=0.5)
    c.hills(0.9, 0.03, 5, (36, 48, 62), shift=1.5)
    for k in range(3):
        x, y = c.aspect * (0.2 + 0.1 * k + 0.14 * day), 0.24 + 0.05 * (k % 2)
        wing = 0.03 * math.sin(16 * t + k)
        c.line([(x - 0.05, y - wing), (x, y), (x + 0.05, y - wing)], 0.009, (44, 38, 66))
    return c.picture()
