"""What a run says about itself: both logs after a resume, the console line, losses by duration."""

from __future__ import annotations

import json
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from schemas.errors import RunError
from trainer.metrics import (
    DURATIONS,
    Metrics,
    SaveRecord,
    StepRecord,
    duration_bucket,
    duration_sums,
    loss_by_duration,
    plot_loss,
    read_records,
    running_mean,
)

RECORD = StepRecord(
    step=1,
    stage="only",
    loss=0.5,
    grad_norm=1.25,
    lr=1e-4,
    tokens=1000,
    tokens_per_s=123456.0,
    fill=0.99,
    data_wait=0.001,
    seconds=1.0,
    eta_s=4000.0,
    mfu=0.41,
    memory_gb=120.3,
    loss_by_duration={"0-3s": 0.4, "3-9s": 0.6},
)


@dataclass(frozen=True)
class Looked:
    """A record of another module's kind."""

    kind: ClassVar[str] = "looked"
    step: int
    seen: dict[str, float]


def run(output: Path, *, first: int, last: int, factor: float = 1.0, total: int = 100) -> None:
    with Metrics(output, first_step=first, total_steps=total, normalize="per_clip") as log:
        for step in range(first + 1, last + 1):
            log.log(replace(RECORD, step=step, loss=factor * step))


def board(output: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_both_logs_have_every_step_once_after_a_resume(tmp_path: Path) -> None:
    run(tmp_path, first=0, last=5)
    run(tmp_path, first=3, last=6, factor=10)
    want = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (5, 50.0), (6, 60.0)]
    assert [(r["step"], r["loss"]) for r in read_records(tmp_path / "metrics.jsonl")] == want
    assert board(tmp_path, "step/loss") == want
    assert board(tmp_path, "step/loss_by_duration/3-9s")[0][1] == pytest.approx(0.6)
    starts = read_records(tmp_path / "metrics.jsonl", kind="start")
    assert [(start["step"], start["repeated_steps"]) for start in starts] == [(0, 0), (3, 2)]


def test_a_start_says_what_is_not_as_it_was(tmp_path: Path) -> None:
    run(tmp_path, first=0, last=5)
    with Metrics(tmp_path, first_step=3, total_steps=9, normalize="per_clip", changes=["a: 1 -> 2"]):
        pass
    starts = read_records(tmp_path / "metrics.jsonl", kind="start")
    assert [start["changes"] for start in starts] == [[], ["a: 1 -> 2"]]


def test_records_of_any_kind_are_kept_apart(tmp_path: Path) -> None:
    with Metrics(tmp_path, first_step=0, total_steps=9, normalize="per_clip") as log:
        log.log(RECORD)
        log.add(SaveRecord(1, "only", blocked_s=0.25, background=True))
        log.add(Looked(1, {"near": 2.0}))
    path = tmp_path / "metrics.jsonl"
    assert [record["step"] for record in read_records(path)] == [1]
    assert read_records(path, kind="looked") == [{"kind": "looked", "step": 1, "seen": {"near": 2.0}}]
    kinds = [record["kind"] for record in read_records(path, kind=None)]
    assert kinds == ["start", "step", "save", "looked"]
    assert board(tmp_path, "looked/seen/near") == [(1, 2.0)]
    assert board(tmp_path, "save/blocked_s") == [(1, 0.25)]


def test_damaged_lines_and_steps_without_a_loss_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = {"kind": "step", "step": 1, "stage": "a", "loss": 1.0}
    half = {"kind": "step", "step": 2, "stage": "a"}
    path.write_text("\n".join([json.dumps(good), json.dumps(half), "[3]", '{"kind": "st', "\0"]))
    assert read_records(path) == [good]


def test_without_tensorboard_it_is_said_once_and_all_else_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run(tmp_path, first=0, last=3)
    assert capsys.readouterr().out.count("pip install tensorboard") == 1
    assert len(read_records(tmp_path / "metrics.jsonl")) == 3
    assert not (tmp_path / "tensorboard").exists()


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """As on a disk that is full: writing beyond `size` bytes of a file fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_error_that_says_what_to_do(tmp_path: Path) -> None:
    with largest_file(4096), pytest.raises(RunError, match=r"metrics\.jsonl cannot be written: .*make room"):
        run(tmp_path, first=0, last=100)
    done = len(read_records(tmp_path / "metrics.jsonl"))
    assert 0 < done < 100
    with largest_file(10), pytest.raises(RunError, match=r"metrics\.jsonl cannot be written: .*make room"):
        run(tmp_path, first=done, last=100)
    run(tmp_path, first=done, last=100)
    assert len(read_records(tmp_path / "metrics.jsonl")) == 100
    with largest_file(4096), pytest.raises(RunError, match=r"loss\.png cannot be written: .*make room"):
        plot_loss(tmp_path, normalize="per_clip")


def test_a_full_disk_ends_the_tensorboard_log_with_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hook = threading.excepthook
    monkeypatch.setattr("trainer.metrics.plot_loss", lambda output, **settings: None)
    with largest_file(60_000):
        run(tmp_path, first=0, last=150)
    out, err = capsys.readouterr()
    assert out.count("the TensorBoard log ends here: ") == 1
    assert "Traceback" not in err
    assert len(read_records(tmp_path / "metrics.jsonl")) == 150
    assert threading.excepthook is hook


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock is two seconds after the last."""
    ticks = iter(range(0, 10_000, 2))
    monkeypatch.setattr("trainer.metrics.time.monotonic", lambda: float(next(ticks)))


@pytest.mark.usefixtures("clock")
def test_lines_are_aligned_and_fit_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Metrics(tmp_path, first_step=0, total_steps=1_000_000, normalize="per_clip") as log:
        for step in range(1, 90):
            stage = "a" if step < 50 else "a-stage-with-a-long-name"
            mfu = None if step % 2 else 0.405
            log.log(replace(RECORD, step=step, stage=stage, mfu=mfu, eta_s=7.3**step % 1e6))
    lines = capsys.readouterr().out.splitlines()
    headers = [number for number, line in enumerate(lines) if "tokens/s" in line]
    assert headers == [0, 41, 82]
    assert {len(line) for line in lines} == {len(lines[0])}
    assert len(lines[0]) <= 120
    for name in ("step", "stage", "loss", "grad", "lr", "MFU", "wait", "GB", "ETA"):
        assert name in lines[0]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(5.4, "0:05"), (125, "2:05"), (3600, "1:00:00"), (86400 * 3 + 3600 * 5 + 60, "3d 05:01")],
)
def test_times_left(seconds: float, shown: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Metrics(tmp_path, first_step=0, total_steps=9, normalize="per_clip") as log:
        log.log(replace(RECORD, eta_s=seconds))
    assert capsys.readouterr().out.rstrip().endswith(f" {shown}")


def test_fast_runs_print_the_first_and_the_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("trainer.metrics.time.monotonic", lambda: 5.0)
    run(tmp_path, first=0, last=30, total=30)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["1/30", "30/30"]


def test_losses_by_duration_are_means_over_all_that_is_added_up() -> None:
    ours = duration_sums([3.0, 3.1, 8.0], [1.0, 2.0, 5.0])
    theirs = duration_sums([2.0, 70.0], [6.0, 7.0])
    added = [a + b for a, b in zip(ours, theirs, strict=True)]
    assert loss_by_duration(added) == {"0-3s": 3.0, "3-9s": 5.0, "63s+": 7.0}
    assert [DURATIONS[duration_bucket(s)] for s in (0.0, 3.2, 9.4, 30.0, 63.0)] == [
        "0-3s",
        "3-9s",
        "3-9s",
        "18-30s",
        "30-63s",
    ]


def test_a_running_mean_starts_with_what_there_is() -> None:
    assert running_mean([2.0, 4.0, 6.0, 8.0], 2) == [2.0, 3.0, 5.0, 7.0]
