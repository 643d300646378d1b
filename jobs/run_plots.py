"""The curves of a run: records of its metrics in, one SVG per question out.

A curve of more steps than a screen has pixels is drawn as means of neighbouring steps over the span of their
values, so that a single spike still shows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from jobs.svg import BLUE, COLORS, RED, new_axes, svg
from trainer.metrics import DURATIONS, running_mean

Records = Sequence[Mapping[str, Any]]

_POINTS = 600
_STEPS = "optimizer step"


def run_plots(steps: Records, validations: Records, saves: Records) -> dict[str, str]:
    """SVG documents by title; those without anything to show are left out."""
    plots = {
        "Loss": _loss(steps, validations),
        "Loss by clip duration": _by_duration(steps),
        "Gradient norm": _curve(steps, "grad_norm", "before clipping", log=True),
        "Learning rate": _curve(steps, "lr", "", smooth=False),
        "Tokens per second": _curve(steps, "tokens_per_s", "all ranks", zero=True),
        "Model FLOPs utilization": _curve(
            steps, "mfu", "share of the devices' peak", percent=True, zero=True
        ),
        "Fill": _curve(steps, "fill", "share of the budget", percent=True),
        "Waiting for data": _curve(steps, "data_wait", "share of the step", percent=True, zero=True),
        "Memory": _curve(steps, "memory_gb", "GB, first rank", zero=True, smooth=False),
        "Saves": _saves(saves, steps),
    }
    return {title: svg for title, svg in plots.items() if svg}


def _loss(steps: Records, validations: Records) -> str:
    axes = new_axes(_STEPS, "loss")
    _draw(axes, _points(steps, "loss"), BLUE, label="training")
    shown = _points(validations, "loss")
    if shown:
        axes.plot(*zip(*shown, strict=True), "o-", color=RED, markersize=4, linewidth=1.2, label="validation")
    if probe := _points(validations, "shuffled_loss"):
        label = "validation, captions exchanged"
        axes.plot(*zip(*probe, strict=True), "o:", color=RED, alpha=0.6, markersize=3, label=label)
    axes.set_ylim(bottom=0)
    if shown:
        axes.legend(frameon=False)
    return _svg(axes, steps)


def _by_duration(steps: Records) -> str:
    found = {
        name: [(r["step"], r["loss_by_duration"][name]) for r in steps if name in r["loss_by_duration"]]
        for name in DURATIONS
    }
    found = {name: points for name, points in found.items() if points}
    if len(found) < 2:
        return ""
    axes = new_axes(_STEPS, "mean error of the clips")
    for (name, points), color in zip(found.items(), COLORS, strict=False):
        _draw(axes, points, color, label=name.replace("-", " to ").replace("s", " s"), span=False)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, ncols=2)
    return _svg(axes, steps)


def _curve(
    steps: Records,
    name: str,
    label: str,
    *,
    percent: bool = False,
    log: bool = False,
    zero: bool = False,
    smooth: bool = True,
) -> str:
    points = _points(steps, name)
    if not points or not any(value for _, value in points):
        return ""
    axes = new_axes(_STEPS, label)
    _draw(axes, points, BLUE, smooth=smooth)
    if log and min(value for _, value in points) > 0:
        axes.set_yscale("log")
    if zero:
        axes.set_ylim(0, 1.08 * max(value for _, value in points))
    if percent:
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")
    elif name == "tokens_per_s":
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    elif name == "lr":
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    return _svg(axes, steps)


def _saves(saves: Records, steps: Records) -> str:
    points = _points(saves, "blocked_s")
    if not points:
        return ""
    axes = new_axes(_STEPS, "seconds of standstill")
    axes.vlines([step for step, _ in points], 0, [value for _, value in points], color=BLUE, linewidth=1)
    axes.plot(*zip(*points, strict=True), "o", color=BLUE, markersize=4)
    axes.set_ylim(bottom=0)
    return _svg(axes, steps)


def _points(records: Records, name: str) -> list[tuple[int, float]]:
    """(step, value) where there is a finite one."""
    found = [(record["step"], record.get(name)) for record in records]
    return [(step, value) for step, value in found if value is not None and math.isfinite(value)]


def _draw(
    axes: Axes,
    points: Sequence[tuple[int, float]],
    color: str,
    *,
    label: str = "",
    span: bool = True,
    smooth: bool = True,
) -> None:
    """A line of means over the span of values; few points are shown themselves, under a running mean."""
    if not points:
        return
    width = -(-len(points) // _POINTS)
    groups = [points[i : i + width] for i in range(0, len(points), width)]
    steps = [group[-1][0] for group in groups]
    values = [[value for _, value in group] for group in groups]
    means = [sum(group) / len(group) for group in values]
    if not smooth:
        axes.plot(steps, means, color=color, linewidth=1.4, label=label or None)
        return
    if span and width > 1:
        low, high = [min(group) for group in values], [max(group) for group in values]
        axes.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)
    elif span:
        axes.plot(steps, means, ".", color=color, alpha=0.25, markersize=3)
    window = max(1, len(means) // 25)
    axes.plot(steps, running_mean(means, window), color=color, linewidth=1.6, label=label or None)


def _svg(axes: Axes, records: Records) -> str:
    """The document, over the steps of `records`, with a line where a stage ends."""
    axes.set_xlim(records[0]["step"] - 1, records[-1]["step"] + 1)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    for before, record in itertools.pairwise(records):
        if before["stage"] != record["stage"]:
            axes.axvline((before["step"] + record["step"]) / 2, color="0.6", linestyle="--", linewidth=0.8)
    return svg(axes)
