"""`latentpress bench loader`: our reader beside a bare read and its peers, as table, JSON and chart."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.loader import (
    CEILING,
    CODECS,
    GOAL_CEILING,
    GOAL_PEER,
    PEERS,
    STORED,
    install_peers,
    measure,
    peers_home,
)
from benchmarks.made_up import write_dataset
from benchmarks.record import RESULTS, append_result
from jobs.console import console, table
from pipeline.progress import say
from schemas.errors import EXIT_DONE, ConfigError

INSTALL = "latentpress bench loader --peers"


def loader(
    dataset: Path | None,
    *,
    clips: int,
    workers: int,
    reps: int,
    peers: bool,
    json_path: Path | None,
    plot_path: Path | None,
    results: Path | None = RESULTS,
) -> int:
    """Measure, print the table, write what was asked for; returns the exit code."""
    for path in (json_path, plot_path):
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"{path}: there is no folder {path.parent}")
    if peers:
        install_peers(peers_home(), tell=say)
    with tempfile.TemporaryDirectory(prefix="latentpress-bench-") as work:
        datasets = [dataset] if dataset else _made_up(Path(work), clips)
        report = {
            "dataset": "given" if dataset else "made up",
            **measure(
                datasets,
                peers_folder=peers_home(),
                work=Path(work),
                workers=(0, workers) if workers else (0,),
                reps=reps,
                tell=say,
            ),
        }
    _print(report)
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if plot_path is not None:
        _plot(report, plot_path)
    for written in (json_path, plot_path, append_result("loader", report, folder=results)):
        if written is not None:
            console.print(f"wrote {written}")
    return EXIT_DONE


def _made_up(work: Path, clips: int) -> list[Path]:
    say(f"writing {clips} clips of moments, and as many of means")
    return [
        write_dataset(work / "moments", clips=clips),
        write_dataset(work / "mean", clips=clips, store="mean"),
    ]


def _print(report: dict[str, Any]) -> None:
    console.print(
        f"{report['samples']} clips, {report['bytes'] / 1e6:.0f} MB as stored; medians of {report['reps']} "
        "interleaved epochs from the page cache"
    )
    rows = table("route", ">workers", ">GB/s", ">of ceiling", ">clips/s", ">video tokens/s")
    ceilings = {row["workers"]: row["gb_per_s"] for row in report["routes"] if row["route"] == CEILING}
    for row in report["routes"]:
        rows.add_row(
            row["route"],
            str(row["workers"]),
            f"{row['gb_per_s']:.2f}",
            f"{row['gb_per_s'] / ceilings[row['workers']]:.2f}",
            f"{row['samples_per_s']:.0f}",
            f"{row['tokens_per_s']:,.0f}",
        )
    console.print(rows)
    console.print(f"{STORED}, 0 workers: {_mark(report['of_ceiling'], GOAL_CEILING)} of the bare read")
    ratios, best = report["of_best_peer"], report["best_peer"]
    if "own" in ratios:
        console.print(
            f"  and {_mark(ratios['own'], GOAL_PEER)} times the best peer that stores tensors, {best['own']}"
        )
    if "raw" in ratios:
        console.print(f"  and {ratios['raw']:.2f} times {best['raw']}")
    for name, why in report["missing"].items():
        remedy = f"; install it: {INSTALL}" if name in PEERS else ""
        console.print(f"{name} is not in the comparison: {why}{remedy}")


def _mark(value: float, goal: float) -> str:
    """A value, and whether it meets its goal as it would be printed."""
    return f"{value:.2f} ({'goal met' if round(value, 2) >= goal else f'goal {goal}'})"


def _plot(report: dict[str, Any], path: Path) -> None:
    """Bars of GB/s, one color for ours, one for peers, one for the ceiling."""
    from matplotlib.figure import Figure

    routes = report["routes"]
    peers = [name + suffix for name in PEERS for suffix in CODECS.values()]
    known = dict.fromkeys(peers, "#9aa5b1") | {CEILING: "#333333"}
    colors = [known.get(row["route"], "#2f7d4f") for row in routes]
    figure = Figure(figsize=(8.0, 1.2 + 0.32 * len(routes)), layout="constrained", dpi=120)
    axes = figure.subplots()
    bars = axes.barh(
        [f"{row['route']}, {row['workers']} workers" for row in routes],
        [row["gb_per_s"] for row in routes],
        color=colors,
    )
    axes.bar_label(bars, [f"{row['gb_per_s']:.2f}" for row in routes], fontsize=7, padding=2)
    axes.invert_yaxis()
    axes.set_xlabel("GB/s of stored tensors, from the page cache")
    axes.tick_params(labelsize=8)
    axes.margins(x=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
