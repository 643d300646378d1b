"""A report as one HTML page that needs nothing else: a template and its values in, text out.

Every value is escaped, for captions and file names are somebody else's. Pictures lie inside the page, which
costs a third more bytes than beside it and makes it one file to send.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from jobs.console import duration, size

PAGE_NAME = "report.html"


def render(template: str, **values: Any) -> str:
    """The page of one of the templates beside this module."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    environment.filters |= {
        "duration": duration,
        "percent": percent,
        "count": count,
        "number": number,
        "size": size,
        "ends": ends,
        "of": lambda number, noun: f"{number:,} {noun}{'' if number == 1 else 's'}",
    }
    return environment.get_template(template).render(values)


def inline(content: bytes, kind: str) -> str:
    """A picture as the `src` that holds it."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def inline_plots(plots: dict[str, str]) -> list[tuple[str, str]]:
    """(title, `src`) of SVG documents by title."""
    return [(title, inline(svg.encode(), "image/svg+xml")) for title, svg in plots.items()]


def ends(text: str, length: int = 80) -> str:
    """Such as `/videos/part-0...04/clip 17.mp4`: of a long name both ends, the last one longer."""
    tail = length * 2 // 3
    return text if len(text) <= length else f"{text[: length - tail]}...{text[-tail:]}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.{1 if value >= 0.01 else 2}f} %"


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def count(value: float) -> str:
    """Such as 950, 12.3 k, 4.56 M."""
    for unit in ("", " k", " M", " G"):
        if value < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g} T"
