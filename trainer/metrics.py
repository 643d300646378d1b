"""What a run says about itself: one record a step in; metrics.jsonl, console lines and loss.png out.

Only rank 0 has one. Console lines come at most once a second, so a fast run does not scroll away.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

Normalize = Literal["per_clip", "per_token"]
_NEEDED = {"step", "stage", "loss"}

COLUMNS = (
    f"{'step':>13}  {'stage':<10} {'loss':>8} {'grad':>8} {'lr':>8} "
    f"{'tokens/s':>9} {'fill':>6} {'wait':>6} {'ETA':>8}"
)


@dataclass(frozen=True)
class StepRecord:
    """One line of metrics.jsonl."""

    step: int
    """Optimizer steps done, this one included."""
    stage: str
    loss: float
    grad_norm: float
    """Before clipping."""
    lr: float
    tokens: int
    """Video and prompt tokens of the step, all ranks."""
    tokens_per_s: float
    fill: float
    """Share of the token budget used."""
    data_wait: float
    """Share of the step this rank waited for data."""
    seconds: float
    eta_s: float


class Metrics:
    """Appends to `<output>/metrics.jsonl`; what lies beyond `first_step` is cut, it will be trained again."""

    def __init__(self, output: Path, *, first_step: int, total_steps: int, normalize: Normalize) -> None:
        self._output = output
        self._total = total_steps
        self._normalize = normalize
        self._path = output / "metrics.jsonl"
        kept = [record for record in read_records(self._path) if record["step"] <= first_step]
        temporary = output / ".tmp-metrics.jsonl"
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        temporary.rename(self._path)  # a kill keeps the old file or the new one
        self._file = self._path.open("a", encoding="utf-8", buffering=1)
        self._printed = float("-inf")

    def log(self, record: StepRecord) -> None:
        if self._printed == float("-inf"):
            print(COLUMNS, flush=True)
        self._file.write(json.dumps(asdict(record)) + "\n")
        now = time.monotonic()
        if now - self._printed >= 1 or record.step == self._total:
            self._printed = now
            print(_line(record, self._total), flush=True)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None and (records := read_records(self._path)):
            plot_loss(records, self._output / "loss.png", normalize=self._normalize)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; lines that a kill or a full disk has damaged are left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict) and record.keys() >= _NEEDED]


def draw_missing(output: Path, *, normalize: Normalize) -> None:
    """Draw loss.png of a run that was killed before it could."""
    if not (path := output / "loss.png").exists() and (records := read_records(output / "metrics.jsonl")):
        plot_loss(records, path, normalize=normalize)


def plot_loss(records: Sequence[dict[str, Any]], path: Path, *, normalize: Normalize) -> None:
    """A PNG: every step's loss, faint, under a running mean."""
    from matplotlib.figure import Figure  # here, so that training itself needs no plotting library

    steps = [record["step"] for record in records]
    losses = [record["loss"] for record in records]
    window = max(1, len(steps) // 5)
    sums = [0.0, *itertools.accumulate(losses)]
    means = [(sums[i] - sums[max(0, i - window)]) / min(i, window) for i in range(1, len(sums))]
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, ".", color="tab:blue", alpha=0.3, label="each step")
    axes.plot(steps, means, color="tab:blue", linewidth=2, label=f"mean of the last {window} steps")
    for before, record in itertools.pairwise(records):
        if before["stage"] != record["stage"]:
            axes.axvline(record["step"] - 0.5, color="0.6", linestyle="--", linewidth=1)
            axes.annotate(
                f" {record['stage']}", (record["step"], 1), xycoords=("data", "axes fraction"), va="top"
            )
    over = "clips" if normalize == "per_clip" else "tokens"
    axes.set(title="Training loss", xlabel="optimizer step", ylabel=f"squared error of v, mean over {over}")
    axes.set_ylim(0, 1.1 * max(losses))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path)


def _line(record: StepRecord, total: int) -> str:
    minutes, seconds = divmod(round(record.eta_s), 60)
    return (
        f"{record.step:>6}/{total:<6}  {record.stage:<10} {record.loss:8.4f} {record.grad_norm:8.3f} "
        f"{record.lr:8.1e} {record.tokens_per_s:9,.0f} {record.fill:6.1%} {record.data_wait:6.1%} "
        f"{minutes:5d}:{seconds:02d}"
    )
