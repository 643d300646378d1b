"""What a person sees while units run, and what `summary.json` says afterwards.

On a terminal one live line, elsewhere a plain line every few seconds; both say the same: clips,
rates, quarantined so far, what went wrong and was tried again, and the time left.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.bottleneck import where_time_went
from pipeline.commit import replace
from pipeline.unit import UnitResult
from schemas.store import is_remote

EARLY_STOP_ROWS = 200
"""Where more than half of the first so many clips fail, the run stops."""
_PLAIN_EVERY_S = 5.0
_ASKED_FOR = ("too_short", "hdr")
"""Reasons that a setting asks for: `frames.short`, `frames.max_slowdown`, `picture.hdr`."""


def gated_failures(reasons: Mapping[str, int]) -> int:
    """Failed clips that speak against the run: not those dropped because a setting asks for it."""
    return sum(count for reason, count in reasons.items() if reason not in _ASKED_FOR)


@dataclass
class Tally:
    """Running totals of one pass over the units of a family."""

    label: str
    total: int
    """Clips (or captions) that will run."""
    kept: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    video_s: float = 0.0
    captions_cut: int = 0
    nbytes: int = 0
    seconds: Counter[str] = field(default_factory=Counter)
    found: int = 0
    """Of these clips, found committed, by another driver or a worker whose answer was lost: they count for no
    rate."""
    incidents: Counter[str] = field(default_factory=Counter)
    """What gave way or was tried again, by kind."""
    started: float = field(default_factory=time.perf_counter)
    wall_s: float = 0.0
    start_s: float | None = None
    """Until its first unit was begun."""

    @property
    def failed(self) -> int:
        return sum(self.reasons.values())

    @property
    def unwanted(self) -> int:
        return gated_failures(self.reasons)

    @property
    def done(self) -> int:
        return self.kept + self.failed

    @property
    def own_s(self) -> float:
        """Since its first unit was begun: families can share a pass."""
        return max(1e-9, self.wall_s - (self.start_s or 0.0))

    def add(self, result: UnitResult) -> None:
        self.kept += result.kept
        self.reasons.update(reason for reason, _ in result.failures)
        self.found += 0 if result.ours else result.kept + len(result.failures)
        self.video_s += result.video_s
        self.captions_cut += result.captions_cut
        self.nbytes += result.nbytes
        self.seconds.update(result.seconds)
        self.wall_s = time.perf_counter() - self.started
        if "total" in result.seconds:  # the first to end need not be the first that was begun
            begun_s = max(0.0, self.wall_s - result.seconds["total"])
            self.start_s = begun_s if self.start_s is None else min(begun_s, self.start_s)

    def line(self) -> str:
        """One aligned line."""
        rate = (self.done - self.found) / self.own_s
        left = f"{_clock(round((self.total - self.done) / rate))}" if rate else "-:--"
        text = f"{self.label:8} {self.done:>{len(str(self.total))}}/{self.total}  {rate:6.2f}/s"
        if self.label == "latents":
            text += f"  {self.video_s / self.own_s:6.1f} video-s/s  quarantined {self.failed}"
        text += "".join(
            f"  {kind.replace('_', ' ')} {count}" for kind, count in sorted(self.incidents.items())
        )
        return f"{text}  {_clock(round(self.wall_s))} gone, {left} left"

    def summary(self, *, workers: int, gpu_names: list[str]) -> dict[str, Any]:
        """Rates, and where the time went."""
        return {
            "clips": self.done,
            "wall_s": round(self.wall_s, 3),
            "clips_found_committed": self.found,
            "incidents": dict(sorted(self.incidents.items())),
            "clips_per_s": round((self.done - self.found) / self.own_s, 3),
            "video_s_per_s": round(self.video_s / self.own_s, 2),
            **({"captions_cut": self.captions_cut} if self.label == "prompts" else {}),
            "bytes": self.nbytes,
            **where_time_went(
                self.seconds,
                wall_s=self.wall_s,
                start_s=self.start_s or 0.0,
                workers=workers,
                gpu_names=gpu_names,
            ),
        }


@dataclass
class EarlyStop:
    """Watches the first clips of a dataset, however many runs they take: most of them failing means that
    the config is wrong, and a week of quarantining would not show it better."""

    kept: int
    reasons: Counter[str]
    """Of earlier runs, up to the unit that completed EARLY_STOP_ROWS."""
    allowed: float
    """`quarantine.max_rate`; above a half it says that so many failures are expected."""

    @property
    def done(self) -> int:
        return self.kept + self.reasons.total()

    def add(self, result: UnitResult) -> None:
        """Count a unit, if it is one of the first."""
        if self.done < EARLY_STOP_ROWS:
            self.kept += result.kept
            self.reasons.update(reason for reason, _ in result.failures)

    def verdict(self) -> str | None:
        """The sentence to stop with, where the first EARLY_STOP_ROWS clips are done and speak against it."""
        failed = gated_failures(self.reasons)
        if self.done < EARLY_STOP_ROWS or failed <= self.done * max(0.5, self.allowed):
            return None
        reason, count = self.reasons.most_common(1)[0]
        return (
            f"{failed} of the first {self.done} clips failed, {count} of them with {reason!r}: this looks "
            "like a wrong config, so the run stopped. quarantine.parquet names each; look at one file with "
            "`latentpress validate`. Once that is mended, `latentpress retry --all` has them tried again; if "
            "so many failures are expected, raise quarantine.max_rate and run the same command again"
        )


def say(text: str, *, end: str = "\n") -> None:
    """Tell a person; a terminal that is gone or a full disk behind it does not end a run."""
    with contextlib.suppress(OSError):
        print(text, end=end, file=sys.stderr, flush=True)


def _clock(seconds: int) -> str:
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def track(results: Iterable[UnitResult], tally: Tally) -> Iterator[UnitResult]:
    """Pass results on, adding those of its family to `tally` and showing its line on standard error."""
    live = sys.stderr.isatty()
    shown = 0.0
    if live:
        say(f"\r{tally.label}: starting", end="")
    for result in results:
        if result.family != tally.label:
            yield result
            continue
        tally.add(result)
        if live:
            say(f"\r\x1b[K{tally.line()}", end="")
        elif tally.wall_s - shown >= _PLAIN_EVERY_S and tally.done < tally.total:
            shown = tally.wall_s
            say(tally.line())
        yield result
    if tally.done:
        say(f"\r\x1b[K{tally.line()}" if live else tally.line())


@contextlib.contextmanager
def open_log(folder: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """`log.jsonl` in `folder`, a line at once on disk for every call; an object store gets it at the end."""
    remote = is_remote(folder)
    with tempfile.TemporaryFile("w+") if remote else (folder / "log.jsonl").open("a") as file:

        def log(facts: Mapping[str, Any]) -> None:
            file.write(json.dumps(facts) + "\n")
            file.flush()

        try:
            yield log
        finally:
            if remote:
                file.seek(0)
                replace(folder / "log.jsonl", file.read().encode())
