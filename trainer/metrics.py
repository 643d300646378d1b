"""What a run says about itself: records in; metrics.jsonl, TensorBoard, console lines and loss.png out.

Only rank 0 has one. metrics.jsonl is the truth, all else is drawn from it; what a resumed run is to do
again is cut from both logs, so every step is there once. Console lines come at most once a second, so a
fast run does not scroll away.
"""

from __future__ import annotations

import itertools
import json
import math
import resource
import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal, Protocol

import torch

from schemas.errors import RunError
from trainer.board import Board

Normalize = Literal["per_clip", "per_token"]

DURATIONS_S = (3, 9, 18, 30, 63)
"""Upper ends of the buckets that losses are told apart by: TTT-Video's curriculum."""
DURATIONS = tuple(
    f"{low}-{high}s" if high else f"{low}s+" for low, high in itertools.pairwise((0, *DURATIONS_S, 0))
)
"""Their names."""
_LENIENT = 1.05
"""A clip of "three seconds" may have a frame more."""

_HEADER_EVERY = 40
_NEEDED = {"step": {"stage", "loss"}}


class Record(Protocol):
    """One line of metrics.jsonl: a dataclass with a kind, as `step`, `validation`, `save`."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    kind: ClassVar[str]

    @property
    def step(self) -> int:
        """Optimizer steps done."""


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step."""

    kind: ClassVar[str] = "step"

    step: int
    """Optimizer steps done, this one included."""
    stage: str
    loss: float
    grad_norm: float
    """Before clipping."""
    lr: float
    tokens: int
    """Of the step's streams, all ranks: video and prompt, where the model has prompts in its stream."""
    tokens_per_s: float
    fill: float
    """Share of the token budget used."""
    data_wait: float
    """Share of the step this rank waited for data."""
    seconds: float
    eta_s: float
    mfu: float | None = None
    """FLOPs of the step over those its devices can do in that time (`trainer.flops`), 0..1; None where the
    device's peak is unknown."""
    memory_gb: float = 0.0
    """Most device memory held so far, in 1e9 bytes, this rank; on CPUs that of the process."""
    loss_by_duration: Mapping[str, float] = field(default_factory=dict)
    """Mean error of the step's clips by source seconds, as {"0-3s": 0.41}."""
    unreadable: int = 0
    """Samples of this run so far that could not be read and weigh nothing."""


@dataclass(frozen=True)
class SaveRecord:
    """One checkpoint."""

    kind: ClassVar[str] = "save"

    step: int
    stage: str
    blocked_s: float
    """Seconds that training stood still for it."""
    background: bool
    """Whether the writing went on beside later steps."""


@dataclass(frozen=True)
class StartRecord:
    """One start of the run, the first or a resumed one; `Metrics` writes it."""

    kind: ClassVar[str] = "start"

    step: int
    """Steps done before."""
    repeated_steps: int
    """Steps that had been done beyond that one, and are done again."""
    date: str
    """UTC, ISO 8601."""
    changes: Sequence[str] = ()
    """What was not as before, in lines (`trainer.resume.resume_notes`)."""


class Metrics:
    """Appends to `<output>/metrics.jsonl` and `<output>/tensorboard`.

    What lies beyond `first_step` is cut from both: it will be trained again. RunError where metrics.jsonl or
    the loss curve cannot be written, as on a full disk.
    """

    def __init__(
        self,
        output: Path,
        *,
        first_step: int,
        total_steps: int,
        normalize: Normalize,
        changes: Sequence[str] = (),
    ) -> None:
        """`changes`: as in `StartRecord`."""
        self._output = output
        self._total = total_steps
        self._normalize = normalize
        self._path = output / "metrics.jsonl"
        found = read_records(self._path, kind=None)
        last = max((record["step"] for record in found), default=first_step)
        kept = [record for record in found if record["step"] <= first_step]
        temporary = output / ".tmp-metrics.jsonl"
        with disk_errors(self._path):
            temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
            temporary.rename(self._path)  # a kill keeps the old file or the new one
            self._file = self._path.open("a", encoding="utf-8", buffering=1)
        self._board = Board(output / "tensorboard", first_step=first_step)
        self._printed, self._lines = float("-inf"), 0
        date = datetime.now(UTC).isoformat(timespec="seconds")
        self.add(StartRecord(first_step, max(0, last - first_step), date, changes))

    def log(self, record: StepRecord) -> None:
        """A step: to the logs, and to the console where the last line is a second old."""
        self.add(record)
        now = time.monotonic()
        if now - self._printed >= 1 or record.step == self._total:
            if self._lines % _HEADER_EVERY == 0:
                print(_header(self._total), flush=True)
            self._printed, self._lines = now, self._lines + 1
            print(_line(record, self._total), flush=True)

    def add(self, record: Record) -> None:
        """Any record, to the logs alone."""
        values = asdict(record)
        with disk_errors(self._path):
            self._file.write(json.dumps({"kind": record.kind, **values}) + "\n")
        if record.kind != StartRecord.kind:
            self._board.add(record.kind, values, step=record.step)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # what could not be written has been said
            self._file.close()
        self._board.close()
        if kind is None:
            plot_loss(self._output, normalize=self._normalize)


def read_records(path: Path, *, kind: str | None = "step") -> list[dict[str, Any]]:
    """The records of one kind (None: all) of a metrics.jsonl, in order.

    Lines that a kill or a full disk has damaged are left out.
    """
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError):
            records.append(json.loads(line))
    return [
        record
        for record in records
        if isinstance(record, dict)
        and isinstance(record.get("step"), int)
        and (kind is None or record.get("kind") == kind)
        and record.keys() >= _NEEDED.get(record.get("kind", ""), set())
    ]


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """RunError where what is written to `path` inside does not get there."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path} cannot be written: {error.strerror or error}; make room, and run again to resume"
        ) from error


def duration_bucket(seconds: float) -> int:
    """The place in DURATIONS of a clip of so many source seconds."""
    return bisect_left(DURATIONS_S, seconds / _LENIENT)


def duration_sums(seconds: Sequence[float], errors: Sequence[float]) -> list[float]:
    """Sum of `errors` and number of clips, bucket after bucket: [2 * len(DURATIONS)], to be added up over
    packs and ranks."""
    sums = [0.0] * (2 * len(DURATIONS))
    for length, error in zip(seconds, errors, strict=True):
        at = 2 * duration_bucket(length)
        sums[at] += error
        sums[at + 1] += 1
    return sums


def loss_by_duration(sums: Sequence[float]) -> dict[str, float]:
    """Mean error of each bucket that has clips, from added-up `duration_sums`."""
    pairs = zip(DURATIONS, sums[::2], sums[1::2], strict=True)
    return {name: total / count for name, total, count in pairs if count}


def memory_gb(device: torch.device) -> float:
    """Most memory held so far, in 1e9 bytes: of a CUDA device, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def draw_missing(output: Path, *, normalize: Normalize) -> None:
    """Draw loss.png of a run that was killed before it could."""
    if not (output / "loss.png").exists():
        plot_loss(output, normalize=normalize)


def plot_loss(output: Path, *, normalize: Normalize) -> None:
    """`output`/loss.png from its metrics.jsonl, where that has steps: every step's loss, faint, under a
    running mean."""
    from matplotlib.figure import Figure  # here, so that training itself needs no plotting library

    if not (records := read_records(output / "metrics.jsonl")):
        return
    steps = [record["step"] for record in records]
    losses = [record["loss"] for record in records]
    window = max(1, min(100, len(steps) // 5))
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, ".", color="tab:blue", alpha=0.3, label="each step")
    label = f"mean of the last {window} steps"
    axes.plot(steps, running_mean(losses, window), color="tab:blue", linewidth=2, label=label)
    for before, record in itertools.pairwise(records):
        if before["stage"] != record["stage"]:
            axes.axvline(record["step"] - 0.5, color="0.6", linestyle="--", linewidth=1)
            axes.annotate(
                f" {record['stage']}", (record["step"], 1), xycoords=("data", "axes fraction"), va="top"
            )
    over = "clips" if normalize == "per_clip" else "tokens"
    axes.set(title="Training loss", xlabel="optimizer step", ylabel=f"loss, mean over {over}")
    axes.set_ylim(0, 1.1 * max(filter(math.isfinite, losses), default=1.0) or 1.0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    temporary = output / ".tmp-loss.png"
    with disk_errors(output / "loss.png"):
        figure.savefig(temporary)
        temporary.rename(output / "loss.png")


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """At each place the mean of the last `window` values, of fewer at the start."""
    sums = [0.0, *itertools.accumulate(values)]
    return [(sums[i] - sums[max(0, i - window)]) / min(i, window) for i in range(1, len(sums))]


def _header(total: int) -> str:
    width = len(str(total))
    return (
        f"{'step':>{2 * width + 1}}  {'stage':<12} {'loss':>8} {'grad':>8} {'lr':>8} {'tokens/s':>10} "
        f"{'MFU':>6} {'fill':>6} {'wait':>6} {'GB':>6} {'ETA':>9}"
    )


def _line(record: StepRecord, total: int) -> str:
    width = len(str(total))
    stage = record.stage if len(record.stage) <= 12 else record.stage[:11] + "~"
    mfu = f"{record.mfu:6.1%}" if record.mfu is not None else f"{'-':>6}"
    return (
        f"{record.step:>{width}}/{total}  {stage:<12} {record.loss:8.4f} {record.grad_norm:8.3g} "
        f"{record.lr:8.1e} {record.tokens_per_s:10,.0f} {mfu} {record.fill:6.1%} {record.data_wait:6.1%} "
        f"{record.memory_gb:6.1f} {_time(record.eta_s):>9}"
    )


def _time(seconds: float) -> str:
    """12:34 (minutes), 5:12:34 (hours) or 3d 05:12 (days)."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours_left = divmod(hours, 24)
    if days:
        return f"{days}d {hours_left:02d}:{minutes:02d}"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
