"""`latentpress bench decode`: our decoder beside PyAV, decord and torchcodec, as table, JSON and chart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks import preprocess as routes
from benchmarks.contenders import Target
from benchmarks.decode import (
    CEILING,
    GOAL,
    GOAL_PREDICTED_HD,
    GOAL_SHARE,
    OURS,
    ClassMean,
    ClipResult,
    Report,
    class_means,
    measure,
    numbers,
)
from benchmarks.record import RESULTS, append_result
from jobs.console import console, print_json, table
from pipeline.discover import video_files
from schemas.config import PreprocessConfig
from schemas.errors import EXIT_DONE, ConfigError
from schemas.load import load_config

COLORS = {"PyAV naive": "#9aa5b1", "decord": "#d98c5f", "torchcodec": "#5f8fd9"}
HOW_TO_INSTALL = {
    "ModuleNotFoundError": "it: pip install 'latentpress[bench]'",
    "RuntimeError": "its FFmpeg libraries: apt-get install ffmpeg (or make bench-deps)",
}


def decode(
    paths: list[Path],
    *,
    num_frames: int,
    height: int,
    width: int,
    reps: int,
    limit_s: float,
    json_path: Path | None,
    plot_path: Path | None,
    results: Path = RESULTS,
) -> int:
    """Measure every clip, print the tables, write what was asked for; returns the exit code."""
    clips = video_files(paths)
    for path in (json_path, plot_path):
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"{path}: there is no folder {path.parent}")
    target = Target(num_frames, height, width)
    console.print(
        f"{len(clips)} clips -> {num_frames} frames of {width} x {height}; CPU seconds, 1 thread, medians of "
        f"{reps} interleaved runs; at most {limit_s:g} s for each"
    )
    report = measure(clips, target=target, reps=reps, limit_s=limit_s, tell=_tell)
    _print_missing(report)
    _print_clips(report)
    _print_problems(report)
    _print_means(report)
    if json_path is not None:
        json_path.write_text(json.dumps(numbers(report), indent=1) + "\n", encoding="utf-8")
    if plot_path is not None:
        _plot(report, plot_path)
    recorded = append_result("decode", numbers(report), folder=results)
    for path in (json_path, plot_path, recorded):
        if path is not None:
            console.print(f"wrote {path}")
    return EXIT_DONE


def preprocess(config_path: Path, *, overrides: Sequence[str], reps: int, as_json: bool) -> int:
    """Measure the routes of the main job on a config's clips; returns the exit code."""
    config = load_config(config_path, PreprocessConfig, overrides=overrides)
    report = routes.run(config, reps=reps)
    append_result("preprocess", report)
    if as_json:
        print_json(report)
        return EXIT_DONE
    rows = table("route", ">clips/s", ">of plain loop", ">start-up s")
    for name, route in report["routes"].items():
        rows.add_row(
            name, f"{route['clips_per_s']:.2f}", f"{route['ratio']:.2f}", f"{route['startup_s']:.1f}"
        )
    console.print(rows)
    console.print(f"{report['clips']} clips, medians of {reps} interleaved runs")
    return EXIT_DONE


def _tell(result: ClipResult) -> None:
    cells = "  ".join(
        f"{name} {'-' if cell.cpu_s is None else f'{cell.cpu_s:.2f}'}" for name, cell in result.cells.items()
    )
    console.print(f"  {result.clip}: {cells}", style="dim")


def _print_missing(report: Report) -> None:
    for name, why in report.missing.items():
        command = HOW_TO_INSTALL.get(why.partition(":")[0], "another version")
        console.print(f"\n{name} is not in the comparison: {why}\n  install {command}")


def _print_clips(report: Report) -> None:
    """One row per clip: our CPU seconds, and each contender's relative to them."""
    others = [name for name in report.contenders if name != OURS]
    rows = table("clip", "class", ">ours, CPU s", *(f">{name}" for name in others))
    for clip in report.clips:
        own = clip.cells[OURS].cpu_s
        cells = [f"{own:.3f}" if own else "-"]
        for name in others:
            theirs = clip.cells[name].cpu_s
            flag = "*" if clip.cells[name].problem else ""
            cells.append(
                "-" if theirs is None else f"{theirs / own:.2f}x{flag}" if own else f"{theirs:.3f} s{flag}"
            )
        rows.add_row(clip.clip, clip.kind, *cells)
    console.print()
    console.print(rows)
    console.print("Nx: CPU seconds relative to ours. -: not readable. *: miscounts the pictures, see below.")


def _print_problems(report: Report) -> None:
    for name in report.contenders:
        found = [(clip.clip, cell.problem) for clip in report.clips if (cell := clip.cells[name]).problem]
        unread = sum(clip.cells[name].cpu_s is None for clip in report.clips)
        console.print(
            f"\n{name}: reads {len(report.clips) - unread} of {len(report.clips)} clips", style="bold"
        )
        for clip_name, problem in found:
            console.print(f"  {clip_name}: {problem[:160]}")


def _print_means(report: Report) -> None:
    others = [name for name in report.contenders if name not in (OURS, CEILING)]
    rows = table(
        "class",
        ">clips",
        *(f">{name}" for name in others),
        "best other",
        ">goal",
        ">all decoded",
        ">of ceiling",
        ">frames/s per core",
    )
    for mean in class_means(report):
        cells = [
            f"{mean.ratio[name]:.2f}x ({mean.num_clips[name]})" if name in mean.ratio else "-"
            for name in others
        ]
        best = f"{mean.best_other} {mean.ratio[mean.best_other]:.2f}x" if mean.best_other else "-"
        share = "-" if mean.whole_share is None else _mark(mean.whole_share, GOAL_SHARE, "")
        whole = f"{mean.num_whole}" if mean.num_whole else "-"
        rate = f"{mean.frames_per_s:.0f}"
        rows.add_row(mean.kind, str(mean.num_clips[OURS]), *cells, best, _goal(mean), whole, share, rate)
    console.print(
        "\nCPU seconds relative to ours, geometric means (over so many clips that both read). HD: coded area "
        "of 1280 x 720 or more; intra: every packet is a key packet."
    )
    console.print(rows)
    console.print(
        f"Goal: the best other library needs {GOAL_PREDICTED_HD}x our CPU seconds on predicted HD, {GOAL}x "
        "elsewhere. Of ceiling: a bare decode of every picture, divided by ours, over those clips of which "
        f"we need every packet; the goal is {GOAL_SHARE}."
    )


def _goal(mean: ClassMean) -> str:
    if mean.goal is None:
        return ""
    if not mean.best_other:
        return "no other reads it"
    return _mark(mean.ratio[mean.best_other], mean.goal, "x")


def _mark(value: float, goal: float, unit: str) -> str:
    """A value, and whether it meets its goal as it would be printed."""
    return f"{value:.2f}{unit} {'met' if round(value, 2) >= goal else f'(goal {goal}{unit})'}"


def _plot(report: Report, path: Path) -> None:
    """Grouped bars per class: CPU seconds relative to ours, with the bare decode and the goal as marks."""
    from matplotlib.figure import Figure

    means = class_means(report)
    names = [name for name in report.contenders if name in COLORS]
    figure = Figure(figsize=(max(7.0, 1.5 + 1.05 * len(means)), 4.8), layout="constrained", dpi=120)
    axes = figure.subplots()
    width = 0.84 / max(1, len(names))
    for k, name in enumerate(names):
        at = [i + (k - (len(names) - 1) / 2) * width for i, mean in enumerate(means) if name in mean.ratio]
        heights = [mean.ratio[name] for mean in means if name in mean.ratio]
        bars = axes.bar(at, heights, width * 0.92, color=COLORS[name], label=name)
        axes.bar_label(bars, [f"{height:.1f}" for height in heights], fontsize=7, padding=1)
    marks = {
        "goal for the best other library": ([mean.goal for mean in means], "#b3261e", "-"),
        "bare decode of every picture": ([mean.ratio.get(CEILING) for mean in means], "#333333", ":"),
    }
    for label, (heights_at, color, style) in marks.items():
        shown = [(i, height) for i, height in enumerate(heights_at) if height is not None]
        if shown:
            places, values = zip(*shown, strict=True)
            starts, ends = [i - 0.45 for i in places], [i + 0.45 for i in places]
            axes.hlines(values, starts, ends, color=color, linestyle=style, linewidth=1.4, label=label)
    axes.axhline(1.0, color="#2f7d4f", linewidth=1.6, label="ours = 1")
    axes.set_xticks(
        range(len(means)),
        [f"{mean.kind.replace(' ', chr(10), 1)}\n({mean.num_clips[OURS]})" for mean in means],
        fontsize=8,
    )
    axes.set_xlim(-0.6, len(means) - 0.4)
    axes.set_ylabel("CPU seconds relative to ours")
    axes.margins(y=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    target = report.target
    what = f"{target.num_frames} frames at {target.width} x {target.height}, one thread"
    figure.suptitle(f"{what}: lower is faster (clips per class in brackets)", fontsize=10)
    figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=3)
    figure.savefig(path)
