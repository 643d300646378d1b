"""`latentpress bench packing`: the plan beside other ways to make steps, as table, JSON and chart."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.packing import GOAL_BUSY, GOALS, OURS, Row, measure
from benchmarks.record import RESULTS, append_result
from jobs.console import console, table
from schemas.errors import EXIT_DONE, ConfigError

_COLORS = {"fill": "#2f6db0", "useful": "#c4552d"}


def packing(
    clips: int,
    *,
    ranks: int,
    seed: int,
    json_path: Path | None,
    plot_path: Path | None,
    results: Path | None = RESULTS,
) -> int:
    """Plan `clips` clips every way, print the table, write what was asked for; returns the exit code."""
    check_folders(json_path, plot_path)
    rows: list[Row] = []
    report = measure(clips, ranks=ranks, seed=seed, tell=rows.append)
    console.print(
        f"{clips} clips of 480 x 720 for {ranks} ranks; budget in longest clips; busy, useful: share of the "
        "ranks' time that they compute, and that they compute what is no padding"
    )
    shown = table("lengths", ">budget", "way", ">fill", ">busy", ">useful", ">kept", ">tokens/step")
    for row in rows:
        shown.add_row(
            row.lengths,
            f"{row.budget}x",
            row.way,
            *(f"{value:.1%}" for value in (row.fill, row.busy, row.useful, row.kept)),
            f"{row.tokens_per_step:,}",
            style="bold" if row.way == OURS else None,
        )
    console.print(shown)
    console.print(f"planning a million clips takes {report['planning_s_per_million']:.1f} s")
    for row in rows:
        if row.way == OURS and row.budget == 2:
            console.print(
                f"{row.lengths}: fill {row.fill:.1%} (goal {GOALS[row.lengths]:.1%}), "
                f"busy {row.busy:.1%} (goal {GOAL_BUSY:.0%})"
            )
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if plot_path is not None:
        _plot(report, plot_path)
    tell_written(json_path, plot_path, append_result("packing", report, folder=results))
    return EXIT_DONE


def check_folders(*paths: Path | None) -> None:
    """ConfigError where a file is asked for in a folder that is not there: before minutes of measuring."""
    for path in paths:
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"{path}: there is no folder {path.parent}")


def tell_written(*paths: Path | None) -> None:
    for path in paths:
        if path is not None:
            console.print(f"wrote {path}")


def _plot(report: Mapping[str, Any], path: Path) -> None:
    """Per lengths, at the larger budget: fill and useful time of every way."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), dpi=120, layout="constrained")
    for axes, lengths in zip(figure.subplots(1, len(GOALS), sharey=True), GOALS, strict=True):
        rows = [row for row in report["rows"] if row["lengths"] == lengths and row["budget"] == 2][::-1]
        for shift, (name, color) in zip((0.2, -0.2), _COLORS.items(), strict=True):
            label = "fill of the budget" if name == "fill" else "useful share of the ranks' time"
            places = [place + shift for place in range(len(rows))]
            axes.barh(places, [row[name] for row in rows], 0.38, color=color, label=label)
        axes.axvline(GOALS[lengths], color=_COLORS["fill"], linestyle=":", linewidth=1)
        axes.axvline(GOAL_BUSY, color=_COLORS["useful"], linestyle=":", linewidth=1)
        axes.set_yticks(range(len(rows)), [row["way"] for row in rows])
        axes.set_xlim(0, 1.01)
        axes.set_title(lengths)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(
        f"{report['clips']} clips, {report['ranks']} ranks, budget of two longest clips (dotted: goals)"
    )
    figure.savefig(path)
