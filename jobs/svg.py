"""A small plot as an SVG document: how those of all reports look."""

from __future__ import annotations

import io

from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, RED, GREEN = "#2f6db0", "#c4552d", "#3d8a5a"
COLORS = (BLUE, RED, GREEN, "#8a63b0", "#b08a2f", "#5f6b78")


def new_axes(across: str, up: str) -> Axes:
    """Of a new figure, with these labels."""
    figure = Figure(figsize=(5.6, 2.7), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    return axes


def svg(axes: Axes) -> str:
    """The document of the figure."""
    text = io.StringIO()
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
