"""How commands speak: tables and lines for a person, one JSON document for a program."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

console = Console(highlight=False, markup=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)


def print_json(value: Any) -> None:
    """One document on standard output; nothing else is printed there with --json."""
    json.dump(value, sys.stdout, indent=1, default=str)
    print()


def table(*headers: str) -> Table:
    """A plain aligned table; numbers' columns are named with a leading `>`."""
    result = Table(box=None, pad_edge=False, header_style="bold", show_header=any(headers))
    for header in headers:
        result.add_column(header.lstrip(">"), justify="right" if header.startswith(">") else "left")
    return result


def count_table(name: str, counts: dict[str, int]) -> Table:
    """Two columns, most frequent first."""
    result = table(name, ">clips")
    for key, count in sorted(counts.items(), key=lambda item: -item[1]):
        result.add_row(key, str(count))
    return result


def duration(seconds: float) -> str:
    """`48 s`, `12 min`, `3.4 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def size(nbytes: float) -> str:
    """Decimal bytes, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"
