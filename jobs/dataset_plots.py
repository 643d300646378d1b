"""The plots of a dataset's report: numbers of its clips in, one SVG per question out, where they differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from jobs.histogram import Histogram
from jobs.index_numbers import SHARE_BARS, IndexNumbers, Share
from jobs.svg import BLUE, RED, new_axes, svg
from schemas.config import BucketConfig

_BARS = 48
_FEW_TIMES = 8
"""Greatest over least value up to which an axis has ticks as if it were linear."""


def dataset_plots(
    index: IndexNumbers, *, sizes: Sequence[Sequence[int]], buckets: Sequence[BucketConfig]
) -> dict[str, str]:
    """SVG documents by title. `sizes`: (width, height, clips) of source pictures."""
    spreads, shares = index.spreads, index.shares
    plots = {
        "Duration": _bars(spreads["seconds"], "seconds of its source a clip stands for"),
        "Source rate": _bars(spreads["source_fps"], "pictures per second"),
        "Stride": _bars(spreads["stride"], "pictures of the source for one frame"),
        "Source sizes and buckets": _sizes(sizes, buckets),
        "Coverage": _shares(shares["coverage"], "share of its source that a clip stands for, where not all"),
        "Frames made up": _shares(
            shares["made_up"], "share of a clip's frames, blended or repeated, where any"
        ),
        "Captions": _bars(spreads["caption_chars"], "characters", what="rows"),
        "Video tokens": _bars(spreads["tokens"], "tokens of a clip, at a 2 x 2 patch"),
        "Frames": _bars(spreads["frames"], "frames of a clip"),
        "Activity": _bars(spreads["busiest"], "activity of a clip's busiest frame, mean = 1"),
    }
    return {title: document for title, document in plots.items() if document}


def _bars(values: Histogram, label: str, *, what: str = "clips") -> str:
    edges, counts = values.bars(_BARS)
    if sum(count > 0 for count in counts) < 2:
        return ""
    axes = new_axes(label, what)
    axes.set_xscale("log")
    axes.stairs(counts, edges, fill=True, color=BLUE)
    low, high = edges[0], edges[-1]
    axes.set_xlim(low, high)
    if high / low > _FEW_TIMES:
        exponents = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
        marks = (1,) if len(exponents) > 5 else (1, 2, 5)
        ticks = [mark * 10.0**exponent for exponent in exponents for mark in marks]
    else:
        ticks = list(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high))
    axes.set_xticks([tick for tick in ticks if low <= tick <= high], minor=False)
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    return _counted(axes)


def _shares(values: Share, label: str) -> str:
    """Without those as usual, which would be far above the others; the page has their number."""
    counts = values.counts.copy()
    counts[-values.usual] -= values.as_usual
    if not counts.any():
        return ""
    axes = new_axes(label, "clips")
    axes.stairs(counts, np.linspace(0, 1, SHARE_BARS + 1), fill=True, color=BLUE)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    return _counted(axes)


def _counted(axes: Axes) -> str:
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    return svg(axes)


def _sizes(sizes: Sequence[Sequence[int]], buckets: Sequence[BucketConfig]) -> str:
    """Discs as large as there are clips of a size; crosses are buckets."""
    if not sizes:
        return ""
    width, height, clips = np.array(sizes, float).T
    axes = new_axes("width", "height, pixels")
    axes.scatter(width, height, 12 + 240 * clips / clips.max(), color=BLUE, alpha=0.5, linewidths=0)
    marks: Any = {"marker": "x", "s": 36, "color": RED, "linewidths": 1.6, "label": "buckets", "zorder": 3}
    axes.scatter([bucket.width for bucket in buckets], [bucket.height for bucket in buckets], **marks)
    axes.set_xlim(0, 1.1 * width.max())
    axes.set_ylim(0, 1.15 * height.max())
    axes.legend(frameon=False, loc="upper left")
    return svg(axes)
