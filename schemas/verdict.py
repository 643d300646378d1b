"""What verification says: counts, and findings with the command that mends each. Nothing here runs one."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from schemas.dataset import Dataset
from schemas.store import absolute

IMPORT_NAME = "import.json"
"""In the folder of a run that imported: its arguments, but for the dataset's place."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    file: str
    """Relative to the dataset."""
    sample: str | None
    problem: str
    command: str | None
    """What mends it; None where only a copy of the file can."""

    def __str__(self) -> str:
        sample = f", sample {self.sample}" if self.sample else ""
        return f"{self.file}{sample}: {self.problem}\n  to mend it: {self.command or 'put a copy of it back'}"


@dataclass
class Verdict:
    """What `verify` found."""

    units: int = 0
    samples: int = 0
    prompts: int = 0
    quarantined: int = 0
    nbytes: int = 0
    unfinished: int = 0
    """Units asked for and not committed yet."""
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is not wrong and worth knowing."""
    rerun: str = ""
    """The command that finishes what is unfinished."""

    @property
    def clean(self) -> bool:
        return not self.findings and not self.unfinished

    def as_dict(self) -> dict[str, Any]:
        return {"clean": self.clean, **asdict(self)}


class Mending:
    """The commands that mend a dataset; run by a person, never here."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        runs = sorted(dataset.runs.iterdir(), reverse=True) if dataset.runs.exists() else []
        configs = (run / "config.toml" for run in runs)
        config = next((str(path) for path in configs if path.exists()), "CONFIG")
        command = ["preprocess", config, "--set", f"output={absolute(dataset.root)}"]
        if imports := [path for run in runs if (path := run / IMPORT_NAME).exists()]:
            arguments = next(filter(None, map(_arguments, imports)), ["ARGUMENTS"])
            command = ["import", *arguments, "-o", absolute(dataset.root)]
        self.rerun = shlex.join(["latentpress", *command])
        """With the config of the newest run, on the dataset where it is now: it may have been moved since."""

    def rebuilt(self, *names: str) -> str:
        """Delete files of the dataset and let `preprocess` make them again."""
        tool = "aws s3 rm" if str(self._dataset.root).startswith("s3://") else "rm -f"
        gone = [f"{tool} {shlex.quote(str(self._dataset.root / name))}" for name in names]
        return " && ".join([*gone, self.rerun])


def _arguments(path: Path) -> list[str]:
    """Those of an import, as it noted them; none where the note is torn."""
    try:
        arguments = json.loads(path.read_bytes())["arguments"]
    except (ValueError, KeyError, TypeError):
        return []
    return [str(each) for each in arguments] if isinstance(arguments, list) else []
