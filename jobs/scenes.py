"""Small animated scenes for the demo's clips: (seconds, width, height) in, one RGB picture out.

Shapes are large and soft on purpose: they must still be recognisable after the demo's low-pass video
encoder at 192 x 288 pixels. Coordinates are in picture heights, origin top left, so that one scene fits
every aspect ratio.
"""

from __future__ import annotations

import colorsys
import itertools
import math
from collections.abc import Callable

import numpy as np
from PIL import Image

from jobs.canvas import Canvas, Point, Rgb, mapped, placed

Scene = Callable[[float, int, int], Image.Image]

WHITE = (250, 250, 250)
INK = (48, 48, 58)
RED = (208, 54, 50)
YELLOW = (248, 206, 70)
TAU = 2 * math.pi


def bouncing_ball(t: float, width: int, height: int) -> Image.Image:
    c = Canvas(width, height, top=(92, 160, 222), bottom=(232, 240, 248))
    horizon, middle = 0.52, 0.5 * c.aspect
    c.box(0, horizon, c.aspect, 1, (238, 232, 218))
    rows = [*(0.5 / z for z in np.arange(1.0, 13.0, 0.5)), 0.0]
    for row, (near, far) in enumerate(itertools.pairwise(rows)):
        for column in range(-14 + row % 2, 14, 2):
            a, b = 0.72 * column, 0.72 * (column + 1)
            quad = [(a * near, near), (b * near, near), (b * far, far), (a * far, far)]
            c.polygon(mapped(placed((middle, horizon), 0), quad), (74, 96, 132))
    c.box(0, horizon - 0.004, c.aspect, horizon + 0.03, (190, 202, 220))
    x, bounce = middle + 0.3 * c.aspect * math.sin(1.1 * t - 1.2), abs(math.sin(2.6 * t))
    c.disc((x, 0.86), 0.13 * (1 - 0.35 * bounce), (30, 34, 50, 110), squash=0.28)
    c.ball((x, 0.72 - 0.46 * bounce), 0.14, (226, 62, 50))
    return c.picture()


def sailing_boat(t: float, width: int, height: int) -> Image.Image:
    c = Canvas(width, height, top=(104, 178, 232), bottom=(255, 226, 176))
    sun = (c.aspect * (0.15 + 0.14 * t), 0.3 - 0.12 * math.sin(0.6 * t))
    c.glow(sun, 0.26, (255, 236, 150))
    c.disc(sun, 0.085, (255, 226, 92))
    c.ground(0.66, 0.012, 9, (66, 140, 190), shift=1.5 * t)
    bob = (c.aspect * (0.3 + 0.1 * t), 0.72 + 0.014 * math.sin(2.4 * t))
    at = placed(bob, 0.07 * math.sin(2.4 * t + 1))
    c.line([at(0, 0), at(0, -0.52)], 0.014, (92, 62, 40))
    c.polygon([at(-0.02, -0.5), at(-0.02, -0.06), at(-0.27, -0.06)], WHITE)
    c.polygon([at(0.02, -0.46), at(0.02, -0.06), at(0.2, -0.06)], RED)
    c.polygon([at(-0.29, -0.03), at(0.3, -0.03), at(0.19, 0.1), at(-0.2, 0.1)], (120, 70, 44))
    c.ground(0.79, 0.018, 7, (44, 112, 168), shift=-2.1 * t)
    c.ground(0.9, 0.022, 5, (28, 84, 140), shift=2.6 * t)
    return c.picture()


def steam_train(t: float, width: int, height: int) -> Image.Image:
    c = Canvas(width, height, top=(150, 206, 242), bottom=(236, 246, 240))
    c.ground(0.58, 0.09, 3.1, (146, 190, 138), shift=0.3 * t)
    c.ground(0.7, 0.05, 4.3, (106, 164, 96), shift=0.8 * t)
    c.box(0, 0.82, c.aspect, 1, (178, 152, 116))
    for tie in np.arange(0, c.aspect, 0.12):
        c.box(tie, 0.855, tie + 0.05, 0.885, (110, 82, 60))
    c.box(0, 0.84, c.aspect, 0.856, (90, 92, 100))
    x = 0.26 * t - 0.1
    for puff in range(7):
        age = (puff + 1.6 * t % 1) / 7
        smoke = (*WHITE, round(225 * (1 - age)))
        c.disc((x + 0.5 - 0.75 * age, 0.3 - 0.17 * age), 0.035 + 0.085 * age, smoke)
    for left, color in ((x - 0.62, (218, 158, 52)), (x - 0.2, (62, 116, 176))):
        c.box(left, 0.53, left + 0.37, 0.79, color)
        c.box(left - 0.02, 0.5, left + 0.39, 0.54, INK)
        for pane in (0.035, 0.145, 0.255):
            c.box(left + pane, 0.58, left + pane + 0.08, 0.68, WHITE)
        for wheel in (0.08, 0.29):
            _wheel(c, (left + wheel, 0.79), 0.052, 6 * t)
    c.box(x + 0.21, 0.44, x + 0.37, 0.77, RED)
    c.box(x + 0.18, 0.41, x + 0.4, 0.455, INK)
    c.box(x + 0.245, 0.5, x + 0.335, 0.6, WHITE)
    c.box(x + 0.37, 0.57, x + 0.66, 0.76, RED)
    c.disc((x + 0.66, 0.665), 0.095, (164, 36, 40))
    c.tower(x + 0.51, (0.4, 0.57), (0.05, 0.03), INK)
    c.polygon([(x + 0.64, 0.76), (x + 0.82, 0.83), (x + 0.64, 0.83)], INK)
    for wheel, radius in ((0.3, 0.075), (0.47, 0.06), (0.61, 0.06)):
        _wheel(c, (x + wheel, 0.845 - radius), radius, 6 * t)
    return c.picture()


def _wheel(c: Canvas, center: Point, radius: float, angle: float) -> None:
    c.disc(center, radius, INK)
    c.disc(center, radius * 0.72, (206, 206, 212))
    for spoke in range(3):
        at = placed(center, angle + spoke * TAU / 6)
        c.line([at(-radius, 0), at(radius, 0)], radius * 0.2, INK)


def wall_clock(t: float, width: int, height: int) -> Image.Image:
    c = Canvas(width, height, top=(196, 214, 200), bottom=(166, 188, 176))
    for stripe in np.arange(0, c.aspect, 0.2):
        c.box(stripe, 0, stripe + 0.1, 1, (206, 222, 208, 150))
    center = (c.aspect / 2, 0.4)
    pendulum = placed(center, 0.42 * math.sin(TAU / 2 * t))
    c.line([center, pendulum(0, 0.5)], 0.022, (158, 116, 48))
    c.ball(pendulum(0, 0.5), 0.075, (224, 178, 64))
    c.disc(center, 0.36, (112, 66, 38))
    c.disc(center, 0.315, (252, 248, 236))
    for hour in range(12):
        at, long = placed(center, hour * TAU / 12), hour % 3 == 0
        c.line([at(0, -0.292), at(0, -0.24 if long else -0.262)], 0.022 if long else 0.012, INK)
    minutes = 10 + 12 * t
    hands = (
        (minutes / 720 + 10 / 12, 0.16, 0.034, INK),
        (minutes / 60, 0.24, 0.022, INK),
        (t / 4, 0.27, 0.011, RED),
    )
    for turns, length, thickness, color in hands:
        c.line([center, placed(center, turns * TAU)(0, -length)], thickness, color)
    c.disc(center, 0.026, RED)
    return c.picture()


def color_wheel(t: float, width: int, height: int) -> Image.Image:
    c = Canvas(width, height, top=(52, 54, 72), bottom=(26, 28, 40))
    center = (c.aspect / 2, 0.53)
    for sector in range(12):
        r, g, b = (round(255 * v) for v in colorsys.hsv_to_rgb(sector / 12, 0.78, 0.96))
        start = 40 * t * (1 + 0.25 * t) + 30 * sector
        c.sector(center, 0.4, (start, start + 30.5), (r, g, b))
    c.disc(center, 0.12, WHITE)
    c.disc(center, 0.05, INK)
    c.polygon([(center[0] - 0.05, 0.05), (center[0] + 0.05, 0.05), (center[0], 0.17)], WHITE)
    return c.picture()


def lighthouse(t: float, width: int, height: int) -> Image.Image:
    c = Canvas(width, height, top=(14, 20, 52), bottom=(70, 84, 132))
    c.stars(40, depth=0.55, alpha=210)
    c.disc((c.aspect * 0.2, 0.12), 0.06, (246, 240, 208))
    x, lamp = c.aspect * 0.56, 0.355
    for angle in (1.5 * t, 1.5 * t + TAU / 2):
        end = (x + 1.1 * math.cos(angle), lamp + 0.05 + 0.06 * math.sin(angle))
        c.polygon([(x, lamp), (end[0], end[1] - 0.13), (end[0], end[1] + 0.13)], (255, 244, 170, 120))
    c.tower(x, (0.4, 0.85), (0.07, 0.115), (240, 238, 232))
    for band in (0.46, 0.6, 0.74):
        half = 0.07 + (band - 0.4) * 0.1
        c.tower(x, (band, band + 0.07), (half, half + 0.007), RED)
    c.box(x - 0.055, 0.32, x + 0.055, 0.4, (255, 240, 160))
    c.glow((x, lamp), 0.1, (255, 246, 190))
    c.tower(x, (0.26, 0.325), (0, 0.075), RED)
    c.box(x - 0.09, 0.395, x + 0.09, 0.412, INK)
    c.polygon([(x - 0.3, 0.9), (x - 0.16, 0.82), (x + 0.17, 0.81), (x + 0.34, 0.92)], (66, 62, 70))
    c.ground(0.88, 0.008, 16, (30, 52, 104), shift=1.4 * t)
    c.ground(0.94, 0.01, 12, (20, 38, 84), shift=-1.8 * t)
    return c.picture()


def kite(t: float, width: int, height: int) -> Image.Image:
    c = Canvas(width, height, top=(64, 146, 226), bottom=(206, 232, 250))
    for x, y, size in ((0.25, 0.2, 0.1), (0.8, 0.42, 0.07), (1.35, 0.12, 0.06)):
        c.cloud(((x + size * t) % (c.aspect + 0.3) - 0.1, y), size)
    c.ground(0.88, 0.04, 2.6, (98, 176, 78), shift=0.6)
    center = (c.aspect * (0.55 + 0.14 * math.sin(0.9 * t)), 0.34 + 0.09 * math.sin(1.7 * t))
    at = placed(center, 0.35 * math.cos(0.9 * t) + 0.12)
    x, hand, knot = c.aspect * 0.22 - 0.05, (c.aspect * 0.22, 0.76), at(0, 0.05)
    sag = [(s, 0.12 * s * (1 - s)) for s in np.linspace(0, 1, 20)]
    dx, dy = knot[0] - hand[0], knot[1] - hand[1]
    c.line([(hand[0] + dx * s, hand[1] + dy * s + drop) for s, drop in sag], 0.006, WHITE)
    orange = (232, 92, 60)
    for side, top, bottom in ((-0.16, YELLOW, orange), (0.16, orange, YELLOW)):
        c.polygon([at(0, -0.2), at(side, 0), at(0, 0)], top)
        c.polygon([at(0, 0.28), at(side, 0), at(0, 0)], bottom)
    tail = [at(0.05 * math.sin(5 * t + 9 * s) * s, 0.28 + 0.34 * s) for s in np.linspace(0, 1, 16)]
    c.line(tail, 0.01, (150, 60, 120))
    for bow in tail[3::4]:
        c.disc(bow, 0.022, (214, 70, 140))
    c.disc((x, 0.745), 0.034, (238, 196, 160))
    c.line([(x, 0.79), hand], 0.022, (238, 196, 160))
    c.tower(x, (0.775, 0.89), (0.04, 0.05), RED)
    for leg in (-0.027, 0.027):
        c.line([(x + leg, 0.88), (x + leg, 0.97)], 0.024, (50, 62, 110))
    return c.picture()


def fish_tank(t: float, width: int, height: int) -> Image.Image:
    c = Canvas(width, height, top=(86, 198, 220), bottom=(14, 72, 132))
    c.ground(0.9, 0.02, 4, (222, 196, 140), shift=0.4)
    for plant in range(6):
        x, tall = c.aspect * (0.06 + 0.18 * plant), 0.25 + 0.06 * (plant % 3)
        sway = [(0.035 * math.sin(1.8 * t + 5 * s + plant) * s, -tall * s) for s in np.linspace(0, 1, 14)]
        c.line(mapped(placed((x, 0.95), 0), sway), 0.026, (48, 140, 84))
    for bubble in range(12):
        rise = (bubble * 0.37 + 0.22 * t) % 1
        x = c.aspect * (bubble * 0.618 % 1) + 0.012 * math.sin(6 * rise)
        c.disc((x, 0.95 - rise), 0.009 + 0.008 * (bubble % 3), (226, 246, 252, 150))
    shoal = (
        (0.3, 0.15, 0.24, (246, 138, 40)),
        (0.56, 0.11, -0.2, (250, 220, 70)),
        (0.74, 0.085, 0.3, (232, 84, 120)),
    )
    for k, (y, size, speed, color) in enumerate(shoal):
        x, way = (0.5 + 0.4 * k + speed * t) % (c.aspect + 0.5) - 0.25, math.copysign(size, speed)
        y, flap = y + 0.025 * math.sin(2 * t + k), 0.35 * math.sin(9 * t + k)
        tail = [(-0.85, 0.0), (-1.6, -0.6 - flap), (-1.6, 0.6 - flap)]
        c.polygon([(x + way * u, y + size * v) for u, v in tail], color)
        c.polygon([(x + way * u, y + size * v) for u, v in ((-0.4, -0.4), (0.2, -0.95), (0.4, -0.4))], color)
        c.disc((x, y), size, color, squash=0.58)
        c.disc((x - 0.1 * way, y), size * 0.2, (255, 250, 240, 210), squash=2.4)
        c.disc((x + 0.62 * way, y - size * 0.12), size * 0.14, WHITE)
        c.disc((x + 0.66 * way, y - size * 0.12), size * 0.075, INK)
    return c.picture()


def windmill(t: float, width: int, height: int) -> Image.Image:
    c = Canvas(width, height, top=(140, 200, 240), bottom=(244, 240, 214))
    c.cloud((0.25 + 0.06 * t, 0.2), 0.09)
    c.ground(0.76, 0.03, 3, (150, 190, 90), shift=1.0)
    for row, k in itertools.product(range(4), range(math.ceil(c.aspect / 0.075))):
        tulip = (RED, YELLOW, (206, 96, 170))[(k + row) % 3]
        c.disc((k * 0.075 + 0.035 * (row % 2), 0.83 + 0.05 * row), 0.014, tulip)
    hub, dark = (c.aspect * 0.56, 0.4), (92, 58, 50)
    c.tower(hub[0], (0.4, 0.8), (0.09, 0.15), (160, 92, 66))
    c.tower(hub[0], (0.28, 0.42), (0, 0.115), dark)
    c.box(hub[0] - 0.035, 0.68, hub[0] + 0.035, 0.8, dark)
    for blade in range(4):
        at = placed(hub, 1.3 * t + blade * TAU / 4)
        c.polygon([at(0.05, 0), at(0.34, 0), at(0.34, 0.085), at(0.05, 0.085)], WHITE)
        c.line([hub, at(0.35, 0)], 0.016, dark)
    c.disc(hub, 0.026, dark)
    return c.picture()


def hot_air_balloon(t: float, width: int, height: int) -> Image.Image:
    c = Canvas(width, height, top=(96, 170, 232), bottom=(252, 222, 196))
    for peak in range(5):
        x, top = c.aspect * (0.02 + 0.25 * peak), 0.5 + 0.04 * (peak * 7 % 3)
        c.tower(x, (top, 0.9), (0, 0.34), (118, 130, 168))
        c.tower(x, (top, top + 0.082), (0, 0.07), WHITE)
    c.ground(0.86, 0.03, 3.4, (96, 150, 92), shift=2.0)
    for start, base, size, speed, colors in (
        (0.3, 0.62, 0.21, 0.055, (RED, YELLOW)),
        (0.78, 0.46, 0.12, 0.038, ((66, 120, 200), WHITE)),
    ):
        x, y = c.aspect * (start + 0.035 * t), base - speed * t
        turn = np.linspace(TAU / 2, TAU * 1.5, 48)
        ys = y + size * np.sin(turn) * np.where(turn > TAU, 1.28, 1.0)
        for gore in range(5):
            xs = x + size * (1 - 0.24 * gore) * np.cos(turn)
            c.polygon(zip(xs, ys, strict=True), colors[gore % 2])
        for rope in (-0.18 * size, 0.18 * size):
            c.line([(x + rope, y + size * 1.2), (x + rope, y + size * 1.6)], 0.007, INK)
        c.box(x - 0.24 * size, y + size * 1.55, x + 0.24 * size, y + size * 1.85, (138, 92, 56))
    return c.picture()


def rocket(t: float, width: int, height: int) -> Image.Image:
    lift = 0.055 * max(0.0, t - 0.6) ** 2
    night = min(1.0, 2 * lift)
    top = _mix((70, 120, 200), (20, 30, 70), night)
    c = Canvas(width, height, top=top, bottom=_mix((240, 190, 150), (90, 100, 160), night))
    c.stars(30, depth=0.7, alpha=round(230 * night))
    x, y = c.aspect / 2, 0.56 - lift
    for puff in range(9):
        age = (puff / 9 + 0.7 * t) % 1
        side = (-1) ** puff * (0.05 + 0.22 * age)
        c.disc((x + side, 0.86 - 0.03 * age), 0.05 + 0.07 * age, (236, 232, 230, round(220 * (1 - age))))
    c.box(0, 0.88, c.aspect, 1, (88, 96, 88))
    c.box(x - 0.22, 0.86, x + 0.22, 0.89, (120, 122, 130))
    flame = 0.2 + 0.05 * math.sin(31 * t) + 0.08 * min(1.0, t)
    for scale, color in ((1.0, (250, 120, 40)), (0.7, YELLOW), (0.4, (255, 250, 210))):
        c.tower(x, (y + 0.24, y + 0.24 + flame * scale), (0.055 * scale, 0), color)
    for way in (-1, 1):
        c.polygon([(x + way * 0.075, y + 0.1), (x + way * 0.16, y + 0.26), (x + way * 0.06, y + 0.23)], RED)
    c.box(x - 0.08, y - 0.14, x + 0.08, y + 0.24, WHITE)
    c.box(x + 0.03, y - 0.14, x + 0.08, y + 0.24, (206, 212, 222))
    nose = np.linspace(0, TAU / 2, 24)
    c.polygon(zip(x + 0.08 * np.cos(nose), y - 0.14 - 0.2 * np.sin(nose), strict=True), RED)
    c.disc((x, y - 0.04), 0.046, (70, 84, 110))
    c.disc((x, y - 0.04), 0.033, (140, 206, 240))
    c.box(x - 0.08, y + 0.12, x + 0.08, y + 0.15, (60, 90, 160))
    return c.picture()


def sunrise(t: float, width: int, height: int) -> Image.Image:
    top = _mix((46, 44, 104), (106, 154, 214), t)
    c = Canvas(width, height, top=top, bottom=_mix((255, 140, 96), (255, 210, 166), t))
    sun = (c.aspect * 0.5, 0.72 - 0.42 * t)
    c.glow(sun, 0.36, (255, 214, 120))
    c.disc(sun, 0.12, (255, 232, 140))
    c.tower(c.aspect * 0.22, (0.36, 0.8), (0, 0.6), (88, 70, 112))
    c.tower(c.aspect * 0.78, (0.42, 0.8), (0, 0.7), (98, 78, 118))
    c.ground(0.76, 0.05, 3, (60, 62, 92), shift=0.5)
    c.ground(0.9, 0.03, 5, (36, 48, 62), shift=1.5)
    for k in range(3):
        at = placed((c.aspect * (0.2 + 0.1 * k + 0.14 * t), 0.24 + 0.05 * (k % 2)), 0)
        wing = 0.03 * math.sin(16 * t + k)
        c.line([at(-0.05, -wing), at(0, 0), at(0.05, -wing)], 0.009, INK)
    return c.picture()


def _mix(start: Rgb, end: Rgb, share: float) -> Rgb:
    r, g, b = (round(a + (z - a) * share) for a, z in zip(start, end, strict=True))
    return r, g, b
