"""What several commands of `latentpress` have in common: options, and the way to the module behind each."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Annotated, Any

import typer

Set = Annotated[
    list[str],
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override one config key, such as units.rows=8; repeatable."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Config = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="TOML file, such as configs/preprocess/demo.toml.")
]


def one_thread_per_process() -> None:
    """Before numpy is imported: workers and decoder children fill the cores, BLAS threads only fight them."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def job(name: str) -> Any:
    """The module behind a subcommand."""
    return importlib.import_module(f"jobs.{name}")
