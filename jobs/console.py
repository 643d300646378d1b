"""How commands speak: tables and lines for a person, one JSON document for a program."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

console = Console(highlight=False, markup=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)

PACE_EVERY_S = 5.0


def print_json(value: Any, lists: Mapping[str, Iterable[Any]] | None = None) -> None:
    """One document on standard output; nothing else is printed there with --json.

    `lists`: further keys of a `value` that is an object, whose items are written as they come.
    """
    text = json.dumps(value, indent=1, default=str)
    if lists:
        text = text.removesuffix("\n}")
    sys.stdout.write(text)
    for name, items in (lists or {}).items():
        sys.stdout.write(f",\n {json.dumps(name)}: [")
        for number, item in enumerate(items):
            sys.stdout.write(f"{',' if number else ''}\n  {json.dumps(item, default=str)}")
        sys.stdout.write("\n ]")
    print("\n}" if lists else "")


class Pace:
    """A plain line on standard error every few seconds of a long pass."""

    def __init__(self, noun: str) -> None:
        self._noun = noun
        self._started = self._shown = time.monotonic()

    def tick(self, done: int, note: str) -> None:
        """`done` of them so far."""
        now = time.monotonic()
        if now - self._shown >= PACE_EVERY_S:
            self._shown = now
            rate = done / (now - self._started)
            print(f"{done} {self._noun}, {rate:.1f}/s, {note}", file=sys.stderr, flush=True)


def table(*headers: str) -> Table:
    """A plain aligned table; numbers' columns are named with a leading `>`."""
    result = Table(box=None, pad_edge=False, header_style="bold", show_header=any(headers))
    for header in headers:
        result.add_column(header.lstrip(">"), justify="right" if header.startswith(">") else "left")
    return result


def count_table(name: str, counts: Mapping[str, int], *, unit: str = "clips") -> Table:
    """Two columns, most frequent first."""
    result = table(name, f">{unit}")
    for key, count in sorted(counts.items(), key=lambda item: -item[1]):
        result.add_row(key, str(count))
    return result


def duration(seconds: float) -> str:
    """`48 s`, `12 min`, `3.4 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def count_of(number: int, noun: str) -> str:
    """Such as "1 unit" and "2 units"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def size(nbytes: float) -> str:
    """Decimal bytes, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"
