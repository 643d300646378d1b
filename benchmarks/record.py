"""Where numbers go: one JSON line per run in benchmarks/results, with the machine and the commit."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def append_result(name: str, numbers: dict[str, Any], *, folder: Path | None = RESULTS) -> Path | None:
    """Add a line to `folder`/NAME.jsonl; None without one, as where latentpress is installed."""
    if folder is None or not folder.is_dir():
        return None
    path = folder / f"{name}.jsonl"
    line = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": _commit(),
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "python": platform.python_version()},
        **numbers,
    }
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return path


def _commit() -> str:
    """The short commit, with `+` where the working tree differs from it."""
    command = ["git", "describe", "--always", "--dirty=+"]
    run = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, check=False)
    return run.stdout.strip() or "unknown"


def _cpu() -> str:
    """The model name as Linux tells it, else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
