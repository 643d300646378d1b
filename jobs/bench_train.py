"""`latentpress bench train`: training steps packed, padded and one by one, as table, JSON and chart."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import RESULTS, append_result
from benchmarks.step_stalls import GOAL_SAVE, GOAL_WAIT, SAVE_EVERY
from benchmarks.step_ways import PACKED, StepSettings
from benchmarks.train_step import EXACT, GOAL_MFU, GOALS, measure
from jobs.bench_packing import check_folders, tell_written
from jobs.console import console, table
from schemas.errors import EXIT_DONE, EXIT_FAILED, ConfigError
from schemas.load import check_config
from trainer.parallel import Member


def settings(**given: Any) -> StepSettings:
    """What is measured; what is None is what this machine can do in minutes: one GPU of 140 GB a model of 5 B
    parameters (with recompute) on clips of 3 s, CPUs a tiny one on tiny clips.

    ConfigError for no such setting.
    """
    gpu = torch.cuda.is_available()
    unset = {
        "durations": "3" if gpu else "3,9,18,30,63",
        "packs": 2 if gpu else 4,
        "reps": 3 if gpu else 5,
        "saves": 1 if gpu else 3,
        "height": 480 if gpu else 48,
        "width": 720 if gpu else 64,
        "prompt_tokens": 226 if gpu else 16,
        "dtype": "bfloat16" if gpu else "float32",
    }
    values = unset | {name: value for name, value in given.items() if value is not None}
    durations = values.pop("durations")
    try:
        values["durations_s"] = [float(part) for part in durations.split(",")]
    except ValueError as error:
        raise ConfigError(f"--durations {durations}: expected seconds, such as 3,9,18") from error
    return check_config(values, StepSettings, where="bench train")


def train(
    settings: StepSettings,
    *,
    nproc: int,
    json_path: Path | None,
    plot_path: Path | None,
    results: Path | None = RESULTS,
) -> int:
    """Measure on `nproc` ranks, or as one rank of a launcher; the first prints and writes. The exit code."""
    check_folders(json_path, plot_path)
    launched = "RANK" in os.environ
    if nproc > 1 and not launched:
        return _launch(nproc)
    member = Member.from_environment() if launched else Member.alone()
    report = measure(settings, member=member, tell=console.print)
    if report is None:
        return EXIT_DONE
    _print(report)
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if plot_path is not None:
        _plot(report, plot_path)
    tell_written(json_path, plot_path, append_result("train_step", report, folder=results))
    return EXIT_DONE


def _launch(nproc: int) -> int:
    """This very command on `nproc` ranks of this machine, whose RANK keeps them from launching more."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
    given = re.sub(r"--nproc[ =]\d+", "", shlex.join(sys.argv[1:]))  # torchrun takes it for its own
    run = subprocess.run([*torchrun, "-m", "jobs.cli", *shlex.split(given)], check=False)
    return EXIT_DONE if run.returncode == 0 else EXIT_FAILED


def _print(report: Mapping[str, Any]) -> None:
    ways, saves, loader = report["ways"], report["saves"], report["loader"]
    rows = table(
        "way",
        ">passes",
        ">s/step",
        ">min",
        ">max",
        ">useful tokens/s",
        ">packed is",
        ">MFU",
        ">of product",
        ">GB",
    )
    for name, way in ways.items():
        rows.add_row(
            name,
            str(way["passes"]),
            f"{way['step_s']:.3f}",
            *(f"{value:.3f}" for value in way["spread_s"]),
            f"{way['tokens_per_s']:,.0f}",
            f"{way['packed_over']:.2f}x",
            "-" if way["mfu"] is None else f"{way['mfu']:.1%}",
            f"{way['of_product']:.1%}",
            f"{way['memory_gb']:.1f}",
        )
    console.print(rows)
    console.print(
        f"{report['device']}, {report['ranks']} ranks, attention {report['attention']}, medians of "
        f"{report['settings']['reps']} interleaved runs; of product: of the FLOPs of one large matrix product"
    )
    for name, goal in GOALS.items():
        if name in ways:
            console.print(f"packed over {name}: {ways[name]['packed_over']:.2f}x (goal {goal}x)")
    if ways[PACKED]["mfu"] is not None and (goal_mfu := GOAL_MFU.get(report["settings"]["model"])):
        console.print(f"MFU {ways[PACKED]['mfu']:.1%} (goal {goal_mfu:.0%})")
    console.print(f"deterministic kernels: {ways[EXACT]['step_s'] / ways[PACKED]['step_s'] - 1:+.1%} time")
    share = ways[PACKED]["prepare_s"] / ways[PACKED]["step_s"]
    console.print(
        f"preparing the packs of a step on the host, beside the step before: {share:.1%} of its time"
    )
    for name in ("background", "foreground") if saves else ():
        save = saves[name]
        console.print(
            f"saving in the {name}: {save['blocked_s']:.2f} s standing still, {save['cost_s']:.2f} s in all; "
            f"{save['share']:.2%} of the time at every {SAVE_EVERY} steps (goal {GOAL_SAVE:.0%})"
        )
    if loader:
        console.print(
            f"waiting for data: {loader['waiting']:.2%} of the time (goal {GOAL_WAIT:.0%}), "
            f"{loader['first_wait_s']:.2f} s before the first of {loader['steps']} steps"
        )


def _plot(report: Mapping[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    names = list(report["ways"])[::-1]
    values = [report["ways"][name]["tokens_per_s"] for name in names]
    bars = axes.barh(names, values, color=["#2f6db0" if name == PACKED else "#9aa5b1" for name in names])
    axes.bar_label(bars, [f" {value:,.0f}" for value in values])
    axes.set_xlim(0, 1.15 * max(values))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    durations = ", ".join(f"{seconds:g}" for seconds in report["settings"]["durations_s"])
    axes.set_title(
        f"{report['settings']['model']} on {report['ranks']} x {report['device']}: clips of {durations} s"
    )
    axes.set_xlabel("useful tokens per second")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
