"""What a survey of a manifest found, counted as it comes: durations, rates, sizes, traits, problems.

In: one good row or one finding at a time. Out: a JSON value and its tables. The sentences about single
rows are kept on disk (`schemas.ledger`), so that a million of them cost no memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

from jobs.console import console, table
from jobs.histogram import Histogram
from pipeline.clip import HDR, Decoded, Placed
from pipeline.short import SLOW
from schemas.bucket import bucket_name
from schemas.config import PreprocessConfig
from schemas.ledger import Finding, Ledger
from schemas.manifest import ManifestRow, RowProblem

_SHOWN = 40
_SHOWN_WARNINGS = 10
_SHOWN_NAMES = 8
_MOST_SIZES = 10_000


class Report:
    """The running counts of one survey."""

    def __init__(self, ledger: Ledger, config: PreprocessConfig | None) -> None:
        """`config`: whose buckets and frames the rows are held against, where one was given."""
        self._ledger, self._config = ledger, config
        self.good = self.bad = self._copies = 0
        self.reasons: Counter[str] = Counter()
        self._warnings: Counter[str] = Counter()
        self._counts: dict[str, Counter[str]] = {
            name: Counter()
            for name in ("codecs", "containers", "sizes", "traits", "buckets", "clips", "decoded")
        }
        self._lengths: dict[str, tuple[int, int]] = {}
        self._values = {name: Histogram() for name in ("duration_s", "fps", "pictures", "width", "height")}

    def add_problem(self, problem: RowProblem) -> None:
        self.bad += 1
        self.reasons[problem.reason] += 1
        finding = Finding(problem.number, problem.source, problem.reason, problem.message)
        self._ledger.add_finding("problem", finding)

    def add_warning(self, row: ManifestRow, reason: str, message: str) -> None:
        """Something to know of a good row."""
        self._warnings[reason] += 1
        self._ledger.add_finding("warning", Finding(row.number, row.source, reason, message))

    def add_copy(self) -> None:
        """A good row whose file has the bytes of an earlier row's file, but another window or caption."""
        self._copies += 1

    def add(self, row: ManifestRow, placed: Placed) -> None:
        """A good row; what its file holds is counted once, however many captions the clip has."""
        self.good += 1
        if self._config is not None:
            self._add_clips(row, placed, self._config)
        if self._ledger.first_row("windows", (row.path, row.start_s, row.end_s), row.number) is None:
            self._add_file(row, placed)

    def _add_file(self, row: ManifestRow, placed: Placed) -> None:
        info, counts = placed.info, self._counts
        counts["codecs"][info.codec] += 1
        counts["containers"][info.container] += 1
        size = f"{info.display_width}x{info.display_height}"
        full = len(counts["sizes"]) >= _MOST_SIZES and size not in counts["sizes"]
        counts["sizes"]["other" if full else size] += 1
        counts["traits"].update(
            {
                "rotated": int(info.rotation != 0),
                "variable_rate": int(info.variable_rate),
                "interlaced": int(info.interlaced),
                "hdr": int(info.color_transfer in HDR),
                "untagged_color": int(info.color_rule.startswith("untagged")),
                "alpha": int(info.alpha),
            }
        )
        for name, value in (
            ("duration_s", window_s(row, placed)),
            ("fps", info.fps),
            ("pictures", float(info.num_pictures)),
            ("width", float(info.display_width)),
            ("height", float(info.display_height)),
        ):
            self._values[name].add(value)
        if placed.decoded is not None:
            self._add_decoded(row, placed.decoded)

    def _add_clips(self, row: ManifestRow, placed: Placed, config: PreprocessConfig) -> None:
        bucket = config.buckets[placed.bucket]
        self._counts["buckets"][bucket_name(bucket)] += placed.num_clips
        note_length(self._lengths, placed, config)
        self._counts["clips"].update(clip_counts(placed, config))
        for note in placed.notes:
            self.add_warning(row, "note", note)

    def _add_decoded(self, row: ManifestRow, found: Decoded) -> None:
        self._counts["decoded"].update(
            {
                "pictures": found.num_pictures,
                "damaged": found.num_damaged,
                "hidden": found.num_hidden,
                "rows_damaged": int(found.num_damaged > 0),
            }
        )
        if found.num_damaged:
            total = found.num_pictures + found.num_damaged
            self.add_warning(row, "damaged", f"{found.num_damaged} of {total} pictures are damaged")

    def as_json(self) -> dict[str, Any]:
        """All but the findings; clips only under a config, damage only after a full decode."""
        counts = {name: dict(counter.most_common()) for name, counter in self._counts.items()}
        return {
            "rows": self.good + self.bad,
            "good": self.good,
            "bad": self.bad,
            "reasons": dict(self.reasons.most_common()),
            "warned": dict(self._warnings.most_common()),
            "content_copies": self._copies,
            **{name: counts[name] for name in ("codecs", "containers", "sizes", "traits")},
            **{name: values.spread() for name, values in self._values.items()},
            **({"buckets": counts["buckets"], **counts["clips"]} if self._config else {}),
            **({"frames_per_clip": self._lengths} if self._config else {}),
            **({"decoded": counts["decoded"]} if counts["decoded"] else {}),
        }

    def findings(self, kind: str) -> Iterator[dict[str, Any]]:
        """`problem` or `warning`, by row."""
        for number, source, reason, message in self._ledger.findings(kind):
            yield {"row": number, "source": source, "reason": reason, "message": message}

    def show(self) -> None:
        """The numbers, the first findings and a last line that says it all."""
        if self.good:
            self._show_numbers()
        self._show_findings("warning", "to know of good rows", self._warnings.total(), most=_SHOWN_WARNINGS)
        self._show_findings("problem", "bad rows", self.bad, most=_SHOWN)
        seconds = self._values["duration_s"].sum
        console.print(
            f"{self.good + self.bad} rows: {self.good} good, {self.bad} bad"
            + (f", {seconds:.0f} s of video" if self.good else "")
        )

    def _show_numbers(self) -> None:
        spreads = table("", ">min", ">10 %", ">median", ">90 %", ">max")
        for name, label in (
            ("duration_s", "seconds"),
            ("fps", "fps"),
            ("pictures", "pictures in the file"),
            ("width", "width shown"),
            ("height", "height shown"),
        ):
            spread = self._values[name].spread()
            assert spread is not None
            spreads.add_row(
                label, *(f"{round(spread[key], 2):g}" for key in ("min", "p10", "median", "p90", "max"))
            )
        console.print(spreads)
        facts = table("", "")
        for name in ("codecs", "containers", "sizes", "traits", "buckets", "decoded"):
            if any(self._counts[name].values()):
                facts.add_row(name, _listed(self._counts[name]))
        if self._config is not None and self._config.frames.clips == "whole":
            facts.add_row("frames a clip", lengths_told(self._lengths))
        if clips := self._counts["clips"]:
            rest = f"rows shorter than a clip {clips['shorter_than_bucket']}, "
            rest += f"slowed beyond 2x {clips['slowed_beyond_2x']}"
            facts.add_row("clips", f"{clips['clips']}; {rest}")
        if self._copies:
            facts.add_row(
                "copies", f"{self._copies} of an earlier row's file, with another window or caption"
            )
        console.print(facts)

    def _show_findings(self, kind: str, title: str, count: int, *, most: int) -> None:
        if count:
            console.print(f"\n{title}:")
        for finding in islice(self._ledger.findings(kind), most):
            console.print(
                f"row {finding.number}  {finding.source or ''}  {finding.reason}: {finding.message}"
            )
        if count > most:
            console.print(f"... and {count - most} more (--json lists all)")


def _listed(counts: Counter[str]) -> str:
    """`h264 43, vp9 8`; the most frequent ones, most frequent first."""
    most = [(name, count) for name, count in counts.most_common(_SHOWN_NAMES) if count]
    rest = f", {len(counts) - len(most)} more" if len(counts) > _SHOWN_NAMES else ""
    return ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in most) + rest


def clip_counts(placed: Placed, config: PreprocessConfig) -> dict[str, int]:
    """What one good row adds: its clips, and 1 where they are short, or slowed by filling them up."""
    num_frames = placed.num_frames
    fills = config.frames.short in ("interpolate", "nearest")
    return {
        "clips": placed.num_clips,
        "shorter_than_bucket": int(placed.num_available < num_frames),
        "slowed_beyond_2x": int(fills and placed.num_available * SLOW < num_frames),
    }


def note_length(lengths: dict[str, tuple[int, int]], placed: Placed, config: PreprocessConfig) -> None:
    """Take a good row into `lengths`: by bucket, frames of its shortest and of its longest clip."""
    name = bucket_name(config.buckets[placed.bucket])
    least, most = lengths.get(name, (placed.num_frames, placed.num_frames))
    lengths[name] = min(least, placed.num_frames), max(most, placed.num_frames)


def lengths_told(lengths: dict[str, tuple[int, int]]) -> str:
    return ", ".join(f"{least} to {most} in {name}" for name, (least, most) in lengths.items())


def window_s(row: ManifestRow, placed: Placed) -> float:
    """Seconds of the clip that a row asks for."""
    whole = placed.info.duration_s
    return min(whole if row.end_s is None else row.end_s, whole) - (row.start_s or 0.0)
