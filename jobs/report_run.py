"""`latentpress report RUN`: a run's folder in; one HTML page that needs nothing else, and its numbers, out.

Everything is drawn from metrics.jsonl, config.toml, checkpoints and samples, so it can be made while the run
goes on, after it, or on another machine from a copy.
"""

from __future__ import annotations

import itertools
import statistics
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jobs.console import console, count_of, duration, print_json, table
from jobs.report_page import (
    PAGE_NAME,
    inline,
    inline_plots,
    percent,
    render,
    require_writable,
    spelled,
    write_page,
)
from jobs.run_plots import Records, run_plots
from schemas.errors import EXIT_DONE, ConfigError
from trainer.checkpoint import all_complete, checkpoints_folder
from trainer.metrics import read_records

_SHEETS = 4
"""Newest sample sheets that are shown."""


def report_run(run: Path, *, output: Path | None, as_json: bool) -> int:
    """Write the page of a run (`output`, or report.html inside it); returns the exit code."""
    records = read_records(run / "metrics.jsonl", kind=None)
    steps = _of(records, "step")
    if not steps:
        raise ConfigError(
            f"{run}: expected the output folder of `latentpress train`, steps in its metrics.jsonl; found "
            + ("none yet, try again later" if records else "no such file or none in it")
        )
    page = output or run / PAGE_NAME
    require_writable(page)
    config = run / "config.toml"
    text = config.read_text(encoding="utf-8") if config.exists() else ""
    numbers = summarize(records, settings=tomllib.loads(text)) | {
        "run": str(run),
        "checkpoints": _checkpoints(run),
    }
    plots = run_plots(steps, _of(records, "validation"), _of(records, "save"))
    sheets = [(path.parent.name, path.name, inline(path.read_bytes(), "image/png")) for path in _sheets(run)]
    made = render("report_run.html", run=numbers, plots=inline_plots(plots), config=text, sheets=sheets)
    write_page(page, made)
    if as_json:
        print_json(numbers | {"page": str(page)})
    else:
        _show(numbers)
        console.print(spelled(f"wrote {page}"))
    return EXIT_DONE


def summarize(records: Records, *, settings: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a page: of the run, of each stage, and what happened when."""
    steps = _of(records, "step")
    last = steps[-1]
    stages = [
        _stage(name, list(group)) for name, group in itertools.groupby(steps, key=lambda r: str(r["stage"]))
    ]
    validations = _of(records, "validation")
    return {
        "steps": last["step"],
        "total_steps": sum(stage["steps"] for stage in settings.get("stages", [])) or None,
        "stage": last["stage"],
        "loss": _mean([record["loss"] for record in steps[-_tail(steps) :]]),
        "eta_s": last["eta_s"],
        "training_s": sum(record["seconds"] for record in steps),
        "tokens": sum(record["tokens"] for record in steps),
        "unreadable": last["unreadable"],
        "stages": stages,
        "starts": [_plain(record) for record in _of(records, "start")],
        "saves": _saves(_of(records, "save"), steps),
        "validation": _plain(validations[-1]) if validations else None,
        "events": list(_events(records)),
    }


def _stage(name: str, steps: Records) -> dict[str, Any]:
    """One stage: medians of what varies by step, and the loss of its first and last tenth."""
    part = _tail(steps)
    seconds = sum(record["seconds"] for record in steps)
    return {
        "name": name,
        "first_step": steps[0]["step"],
        "last_step": steps[-1]["step"],
        "training_s": seconds,
        "first_loss": _mean([record["loss"] for record in steps[:part]]),
        "last_loss": _mean([record["loss"] for record in steps[-part:]]),
        "loss_by_duration": _by_duration(steps[-part:]),
        "tokens_per_s": sum(record["tokens"] for record in steps) / seconds if seconds else 0.0,
        "step_s": statistics.median(record["seconds"] for record in steps),
        "mfu": _median([record["mfu"] for record in steps if record["mfu"] is not None]),
        "fill": _mean([record["fill"] for record in steps]),
        "data_wait": sum(r["data_wait"] * r["seconds"] for r in steps) / seconds if seconds else 0.0,
        "memory_gb": max(record["memory_gb"] for record in steps),
    }


def _saves(saves: Records, steps: Records) -> dict[str, Any] | None:
    """How long training stood still for checkpoints; None without any."""
    if not saves:
        return None
    blocked = [save["blocked_s"] for save in saves]
    trained = sum(record["seconds"] for record in steps)
    return {
        "count": len(saves),
        "median_s": statistics.median(blocked),
        "longest_s": max(blocked),
        "share": sum(blocked) / (trained + sum(blocked)) if trained else 0.0,
        "background": sum(save["background"] for save in saves),
    }


def _events(records: Records) -> Iterator[dict[str, Any]]:
    """What is worth a line, in order: starts, stages, unreadable samples, steps without a finite loss."""
    stage, unreadable = None, 0
    for record in records:
        if record["kind"] == "start":
            what = "started" if record["step"] == 0 else f"resumed after step {record['step']}"
            again = [f"{count_of(n, 'step')} done again"] if (n := record["repeated_steps"]) else []
            told = [f"{what} at {record['date']}", *again, *record.get("changes", ())]
            yield {"step": record["step"], "what": "; ".join(told)}
        if record["kind"] != "step":
            continue
        if record["stage"] != stage:
            stage = record["stage"]
            yield {"step": record["step"], "what": f"stage {stage}"}
        if record["unreadable"] > unreadable:
            more = record["unreadable"] - unreadable
            yield {"step": record["step"], "what": f"{more} unreadable, weighing nothing"}
        unreadable = record["unreadable"]  # counts start anew with each start


def _by_duration(steps: Records) -> dict[str, float]:
    names = dict.fromkeys(name for record in steps for name in record["loss_by_duration"])
    found = {name: [r["loss_by_duration"].get(name) for r in steps] for name in names}
    return {name: _mean([value for value in values if value is not None]) for name, values in found.items()}


def _checkpoints(run: Path) -> list[dict[str, Any]]:
    """Complete checkpoints that are there, oldest first."""
    complete = all_complete(checkpoints_folder(run))
    return [{"step": saved.step, "bytes": sum(saved.meta["files"].values())} for saved in complete]


def _sheets(run: Path) -> list[Path]:
    """Sample sheets of the newest steps that have some, newest first."""
    numbers = {path: path.name.removeprefix("step-") for path in (run / "samples").glob("step-*")}
    drawn = [path for path, number in numbers.items() if number.isdecimal()]
    drawn.sort(key=lambda path: int(numbers[path]), reverse=True)
    return [sheet for folder in drawn for sheet in sorted(folder.glob("*.png"))][:_SHEETS]


def _show(numbers: dict[str, Any]) -> None:
    rows = table("stage", ">steps", ">time", ">loss", ">tokens/s", ">MFU", ">fill", ">data wait", ">GB")
    for stage in numbers["stages"]:
        rows.add_row(
            stage["name"],
            str(stage["last_step"] - stage["first_step"] + 1),
            duration(stage["training_s"]),
            f"{stage['first_loss']:.4f} -> {stage['last_loss']:.4f}",
            f"{stage['tokens_per_s']:,.0f}",
            percent(stage["mfu"]),
            percent(stage["fill"]),
            percent(stage["data_wait"]),
            f"{stage['memory_gb']:.1f}",
        )
    console.print(rows)


def _of(records: Records, kind: str) -> list[Any]:
    return [record for record in records if record["kind"] == kind]


def _plain(record: Any) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "kind"}


def _tail(steps: Records) -> int:
    return max(1, len(steps) // 10)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
