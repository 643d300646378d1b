"""Decode benchmark: the same clips through every contender, interleaved, in CPU seconds.

In: video files and a target shape. Out: per clip and contender the median CPU seconds (user and system of
its child process) or what went wrong, and geometric means per class. CPU seconds, because they hold on a
busy machine; children, because a decoder that hangs or crashes must cost one clip and not the run.

Classes are codecs; H.264 and HEVC are split by size (HD: a coded area of 1280 x 720 or more), and their
clips in which every packet is a key packet stand apart, as nothing is predicted there.
"""

from __future__ import annotations

import json
import math
import os
import select
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.contenders import CONTENDERS, Stream, Target

OURS, CEILING = "ours", "bare decode"
PREDICTED = ("h264", "hevc")
HD_AREA = 1280 * 720
GOAL, GOAL_PREDICTED_HD = 1.2, 1.8
"""CPU seconds of the best other library, divided by ours."""
GOAL_SHARE = 0.9
"""CPU seconds of a bare decode, divided by ours, where every packet is needed."""
START_LIMIT_S = 120.0
CHILD_COMMAND = ("-m", "benchmarks.contenders")


@dataclass(frozen=True)
class Cell:
    """One contender on one clip."""

    cpu_s: float | None
    """Median; None where it gave no frames."""
    num_pictures: int | None
    num_fed: int | None = None
    """Packets its decoder was given, where it tells."""
    problem: str = ""
    """Error, hang, crash or a miscount, in a sentence; empty where all is well."""


@dataclass(frozen=True)
class ClipResult:
    clip: str
    stream: Stream | None
    """None where a bare decode gives no picture."""
    cells: dict[str, Cell]

    @property
    def kind(self) -> str:
        """The class it counts in."""
        if self.stream is None:
            return "unknown"
        codec = self.stream.codec
        if codec not in PREDICTED:
            return codec
        if self.stream.intra:
            return f"{codec} intra"
        return f"{codec} HD" if self.stream.width * self.stream.height >= HD_AREA else f"{codec} below HD"


@dataclass(frozen=True)
class Report:
    target: Target
    reps: int
    limit_s: float
    versions: dict[str, str]
    missing: dict[str, str]
    """Contender -> why it could not start."""
    clips: list[ClipResult]

    @property
    def contenders(self) -> list[str]:
        return list(self.versions)


class Child:
    """One contender's process: started again after a hang or a crash."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> dict[str, Any]:
        """Its version, or why it is missing."""
        self._process = subprocess.Popen(
            [sys.executable, *CHILD_COMMAND, self.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        return self._answer(START_LIMIT_S)

    def ask(self, path: Path, target: Target, *, limit_s: float) -> dict[str, Any]:
        """The answer to one job; `error` says `hang` or `crash` where the child did not give one."""
        if self._process is None:
            self.start()
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"path": str(path), "target": asdict(target)}) + "\n")
        self._process.stdin.flush()
        return self._answer(limit_s)

    def _answer(self, limit_s: float) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], limit_s)[0]:
            self.close()
            return {"error": f"hang: no answer within {limit_s:g} s"}
        line = self._process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        code = self._process.wait()
        self.close()
        return {"error": f"crash: {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"}

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def measure(
    paths: Sequence[Path],
    *,
    target: Target,
    reps: int,
    limit_s: float,
    tell: Callable[[ClipResult], None],
    contenders: Iterable[str] = tuple(CONTENDERS),
) -> Report:
    """Run every clip `reps` times through every contender, taking turns; `tell` hears of each clip."""
    children = {name: Child(name) for name in contenders}
    try:
        starts = {name: child.start() for name, child in children.items()}
        versions = {name: start["version"] for name, start in starts.items() if "version" in start}
        missing = {
            name: start.get("missing") or start["error"]
            for name, start in starts.items()
            if name not in versions
        }
        report = Report(target, reps, limit_s, versions, missing, [])
        present = [children[name] for name in versions]
        for path in paths:
            result = _measure_clip(present, path, target=target, reps=reps, limit_s=limit_s)
            report.clips.append(result)
            tell(result)
        return report
    finally:
        for child in children.values():
            child.close()


def _measure_clip(
    children: Sequence[Child], path: Path, *, target: Target, reps: int, limit_s: float
) -> ClipResult:
    answers: dict[str, list[dict[str, Any]]] = {child.name: [] for child in children}
    for _ in range(reps):
        for child in children:
            runs = answers[child.name]
            if not any("error" in run for run in runs):
                runs.append(child.ask(path, target, limit_s=limit_s))
    ceiling = answers.get(CEILING, [{}])[-1]
    cells = {name: _cell(runs, ceiling.get("num_pictures"), target) for name, runs in answers.items()}
    found = ceiling.get("stream")
    return ClipResult(path.name, found and Stream(**found), cells)


def _cell(runs: Sequence[dict[str, Any]], num_pictures: int | None, target: Target) -> Cell:
    last = runs[-1]
    if "error" in last:
        return Cell(None, None, problem=last["error"])
    shape, problem = tuple(last["shape"]), ""
    if shape and shape != (target.num_frames, target.height, target.width, 3):
        problem = f"wrong count: gave {shape[0]} of {target.num_frames} frames"
    elif num_pictures is not None and last["num_pictures"] != num_pictures:
        problem = f"wrong count: {last['num_pictures']} pictures, a plain decode gives {num_pictures}"
    cpu_s = statistics.median(run["cpu_s"] for run in runs)
    return Cell(cpu_s, last["num_pictures"], last["num_fed"], problem)


@dataclass(frozen=True)
class ClassMean:
    """Geometric means over the clips of one class that both we and the contender read."""

    kind: str
    ratio: dict[str, float]
    """Contender -> its CPU seconds divided by ours."""
    num_clips: dict[str, int]
    best_other: str
    """The library with the fewest CPU seconds relative to ours; empty where none reads the class."""
    goal: float | None
    """What its ratio should be at least; None for the class of all."""
    whole_share: float | None
    """A bare decode divided by ours, over the clips of which we need every packet."""
    num_whole: int
    frames_per_s: float
    """Frames given per CPU second, ours."""


ALL = "all"


def class_means(report: Report) -> list[ClassMean]:
    """One per class, those with most clips first, then one over all clips."""
    by_kind: dict[str, list[ClipResult]] = {}
    for clip in report.clips:
        if OURS in clip.cells and clip.cells[OURS].cpu_s is not None:
            by_kind.setdefault(clip.kind, []).append(clip)
    groups = sorted(by_kind.items(), key=lambda item: (-len(item[1]), item[0]))
    groups.append((ALL, [clip for _, clips in groups for clip in clips]))
    return [_class_mean(kind, clips, report) for kind, clips in groups if clips]


def _class_mean(kind: str, clips: Sequence[ClipResult], report: Report) -> ClassMean:
    seconds = {name: _beside_ours(name, clips) for name in report.contenders}
    ratio = {name: _mean_ratio(pairs) for name, pairs in seconds.items() if pairs}
    others = [name for name in ratio if name not in (OURS, CEILING)]
    whole = _beside_ours(CEILING, [clip for clip in clips if _needs_all(clip.cells[OURS])])
    predicted_hd = kind.endswith(" HD") and not kind.endswith("below HD")
    return ClassMean(
        kind=kind,
        ratio=ratio,
        num_clips={name: len(pairs) for name, pairs in seconds.items()},
        best_other=min(others, key=lambda name: ratio[name], default=""),
        goal=None if kind == ALL else GOAL_PREDICTED_HD if predicted_hd else GOAL,
        whole_share=_mean_ratio(whole) if whole else None,
        num_whole=len(whole),
        frames_per_s=_geometric_mean(report.target.num_frames / own for _, own in seconds[OURS] if own),
    )


def _beside_ours(name: str, clips: Iterable[ClipResult]) -> list[tuple[float, float]]:
    """CPU seconds of a contender and ours, of the clips that both read."""
    found = []
    for clip in clips:
        theirs, own = clip.cells[name].cpu_s if name in clip.cells else None, clip.cells[OURS].cpu_s
        if theirs is not None and own:
            found.append((theirs, own))
    return found


def _needs_all(cell: Cell) -> bool:
    return cell.num_fed is not None and cell.num_fed >= (cell.num_pictures or 0)


def _mean_ratio(pairs: Iterable[tuple[float, float]]) -> float:
    return _geometric_mean(theirs / own for theirs, own in pairs)


def _geometric_mean(values: Iterable[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def numbers(report: Report) -> dict[str, Any]:
    """The report as plain values: file names only, no folders."""
    return {
        "target": asdict(report.target),
        "reps": report.reps,
        "limit_s": report.limit_s,
        "versions": report.versions,
        "missing": report.missing,
        "means": [asdict(mean) for mean in class_means(report)],
        "clips": [{**asdict(clip), "kind": clip.kind} for clip in report.clips],
    }
