"""`latentpress validate`: every row of a manifest held against its file and the rules of a config.

Exit code 0 where the share of bad rows is within the config's quarantine rate (0 without a config),
3 above it. Rows that preprocess would refuse to start with (missing file, no caption, repeated row)
count like rows it would quarantine.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.console import console, count_table, print_json, table
from pipeline.clip import ClipInfo
from pipeline.graph import manifest_items
from pipeline.survey import Surveyed, survey
from pipeline.video_encode import load_video_encoder
from schemas.bucket import check_buckets
from schemas.config import PreprocessConfig
from schemas.errors import EXIT_DONE, EXIT_GATE, ConfigError, ManifestError
from schemas.load import check_config, load_config
from schemas.manifest import ManifestRow, RowProblem, split_rows, write_manifest

_SHOWN = 40


def validate(
    manifest: Path, *, config: Path | None, overrides: Sequence[str], output: Path | None, as_json: bool
) -> int:
    """Validate `manifest`; the exit code of the command."""
    if config is None:
        if overrides:
            raise ConfigError("--set changes a config; name it with -c CONFIG")
        settings = check_config(
            {"manifest": str(manifest), "output": "unused"}, PreprocessConfig, where="--set"
        )
        allowed = 0.0
    else:
        settings = load_config(config, PreprocessConfig, overrides=overrides)
        check_buckets(settings.buckets, load_video_encoder(settings.video_encoder).geometry)
        allowed = settings.quarantine.max_rate
    rows, problems = split_rows(manifest_items(manifest))
    if not rows and not problems:
        raise ManifestError(f"{manifest} holds no rows")
    good: list[tuple[ManifestRow, ClipInfo]] = []
    for row, found in survey(rows, settings):
        if isinstance(found, Surveyed):
            good.append((row, found.info))
        else:
            problems.append(RowProblem(row.number, row.source, found.reason, found.message))
    problems.sort(key=lambda problem: problem.number)
    if output is not None:
        write_manifest(output, [row for row, _ in good])
    report = _report(manifest, good, problems)
    if as_json:
        print_json(report)
    else:
        _print(report, problems)
        if output is not None:
            console.print(f"wrote the {len(good)} good rows to {output}")
    return EXIT_GATE if len(problems) > allowed * (len(good) + len(problems)) else EXIT_DONE


def _report(
    manifest: Path, good: Sequence[tuple[ManifestRow, ClipInfo]], problems: Sequence[RowProblem]
) -> dict[str, Any]:
    infos = [info for _, info in good]
    return {
        "manifest": str(manifest),
        "rows": len(good) + len(problems),
        "good": len(good),
        "bad": len(problems),
        "reasons": dict(Counter(problem.reason for problem in problems).most_common()),
        "codecs": dict(Counter(info.codec for info in infos).most_common()),
        "containers": dict(Counter(info.container for info in infos).most_common()),
        "duration_s": _spread([info.duration_s for info in infos]),
        "fps": _spread([info.fps for info in infos]),
        "pictures": _spread([float(info.num_pictures) for info in infos]),
        "width": _spread([float(info.display_width) for info in infos]),
        "height": _spread([float(info.display_height) for info in infos]),
        "problems": [
            {"row": p.number, "source": p.source, "reason": p.reason, "message": p.message} for p in problems
        ],
    }


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {
        "min": round(min(values), 3),
        "median": round(statistics.median(values), 3),
        "max": round(max(values), 3),
        "sum": round(sum(values), 3),
    }


def _print(report: dict[str, Any], problems: Sequence[RowProblem]) -> None:
    if report["good"]:
        spreads = table("", ">min", ">median", ">max")
        for name, label in (
            ("duration_s", "seconds"),
            ("fps", "fps"),
            ("pictures", "pictures"),
            ("width", "width"),
            ("height", "height"),
        ):
            spread = report[name]
            spreads.add_row(label, *(f"{spread[key]:g}" for key in ("min", "median", "max")))
        console.print(count_table("codec", report["codecs"]))
        console.print(spreads)
    for problem in problems[:_SHOWN]:
        console.print(f"row {problem.number}  {problem.source or ''}  {problem.reason}: {problem.message}")
    if len(problems) > _SHOWN:
        console.print(f"... and {len(problems) - _SHOWN} more (--json lists all)")
    console.print(
        f"{report['rows']} rows: {report['good']} good, {report['bad']} bad"
        + (f", {report['duration_s']['sum']:.0f} s of video" if report["good"] else "")
    )
