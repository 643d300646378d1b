"""`latentpress bench decode`: our decoder beside PyAV, decord and torchcodec, as table, JSON and chart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks import preprocess as routes
from benchmarks.contenders import Target
from benchmarks.decode import ALL, CEILING, OURS, ClipResult, Report, class_means, measure, numbers
from benchmarks.record import RESULTS, append_result
from jobs.console import console, print_json, table
from pipeline.discover import VIDEO_SUFFIXES
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
    clips = _files(paths)
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


def _files(paths: list[Path]) -> list[Path]:
    files = []
    for path in paths:
        if path.is_dir():
            files += sorted(file for file in path.iterdir() if file.suffix.lower() in VIDEO_SUFFIXES)
        elif path.is_file():
            files.append(path)
        else:
            raise ConfigError(f"{path} does not exist")
    if not files:
        raise ConfigError(f"no video in {', '.join(map(str, paths))}")
    return files


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
    rows = table("clip", "codec", ">ours, CPU s", *(f">{name}" for name in others))
    for clip in report.clips:
        own = clip.cells[OURS].cpu_s
        cells = [f"{own:.3f}" if own else "-"]
        for name in others:
            theirs = clip.cells[name].cpu_s
            flag = "*" if clip.cells[name].problem else ""
            cells.append(
                "-" if theirs is None else f"{theirs / own:.2f}x{flag}" if own else f"{theirs:.3f} s{flag}"
            )
        rows.add_row(clip.clip, clip.codec, *cells)
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
        "codec", ">clips", *(f">{name}" for name in others), ">share of ceiling", ">frames/s per core"
    )
    for mean in class_means(report):
        cells = [
            f"{mean.ratio[name]:.2f}x ({mean.num_clips[name]})" if name in mean.ratio else "-"
            for name in others
        ]
        share = f"{mean.ratio[CEILING]:.2f}" if CEILING in mean.ratio else "-"
        rows.add_row(mean.codec, str(mean.num_clips[OURS]), *cells, share, f"{mean.frames_per_s:.0f}")
    console.print("\nGeometric means of CPU seconds relative to ours (over so many clips that both read):")
    console.print(rows)
    console.print(
        "Share of ceiling: a bare decode of every picture, divided by ours; above 1 we decode less."
    )


def _plot(report: Report, path: Path) -> None:
    """Grouped bars per codec: CPU seconds relative to ours, with the bare decode as a mark."""
    from matplotlib.figure import Figure

    means = [mean for mean in class_means(report) if mean.codec != ALL and mean.num_clips[OURS] > 1]
    means += [mean for mean in class_means(report) if mean.codec == ALL]
    names = [name for name in report.contenders if name in COLORS]
    figure = Figure(figsize=(max(6.5, 2.5 + 1.25 * len(means)), 4.4), layout="constrained", dpi=120)
    axes = figure.subplots()
    width = 0.8 / max(1, len(names))
    for k, name in enumerate(names):
        at = [i + (k - (len(names) - 1) / 2) * width for i, mean in enumerate(means) if name in mean.ratio]
        heights = [mean.ratio[name] for mean in means if name in mean.ratio]
        bars = axes.bar(at, heights, width * 0.92, color=COLORS[name], label=name)
        axes.bar_label(bars, [f"{height:.1f}" for height in heights], fontsize=8, padding=1)
    for i, mean in enumerate(means):
        if CEILING in mean.ratio:
            label = "" if i else "bare decode of every picture"
            axes.hlines(mean.ratio[CEILING], i - 0.44, i + 0.44, color="#333333", linestyle=":", label=label)
    axes.axhline(1.0, color="#2f7d4f", linewidth=1.6, label="ours = 1")
    axes.set_xticks(range(len(means)), [f"{mean.codec}\n{mean.num_clips[OURS]} clips" for mean in means])
    axes.set_ylabel("CPU seconds relative to ours")
    axes.margins(y=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    target = report.target
    what = f"{target.num_frames} frames at {target.width} x {target.height}, one thread"
    figure.suptitle(f"{what}: lower is faster", fontsize=10)
    figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=3)
    figure.savefig(path)
