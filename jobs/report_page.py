"""A report as one HTML page that needs nothing else: a template and its values in, text out.

Every value is escaped, for captions and file names are somebody else's. Pictures lie inside the page, which
costs a third more bytes than beside it and makes it one file to send.
"""

from __future__ import annotations

import base64
import os
import shlex
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from jobs.console import duration, size
from pipeline.commit import replace
from schemas.errors import ConfigError
from schemas.store import is_remote

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
        "quote": shlex.quote,
        "of": lambda number, noun: f"{number:,} {noun}{'' if number == 1 else 's'}",
    }
    return environment.get_template(template).render(values)


def require_writable(page: Path) -> None:
    """ConfigError where `page` can plainly not be written: said before hours of samples are drawn."""
    if is_remote(page):  # a store tells when it is asked to store
        return
    if page.is_dir():
        raise ConfigError(f"{page} is a folder: name a file with -o, such as {page / PAGE_NAME}")
    folder = next(parent for parent in page.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise ConfigError(f"{page} cannot be written: {folder} is no folder; name another file with -o")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{page} cannot be written: the folder {folder} is read-only here; name another file with -o"
        )


def write_page(page: Path, text: str) -> None:
    """Write a page whole; ConfigError where it cannot be."""
    try:
        replace(page, spelled(text).encode())
    except OSError as error:
        why = error.strerror or str(error) or type(error).__name__
        raise ConfigError(f"{page} cannot be written: {why}; name another file with -o") from error


def spelled(text: str) -> str:
    """`text` with the bytes of names that are no Unicode, which no page or terminal takes, spelled out."""
    return text.encode(errors="backslashreplace").decode()


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
