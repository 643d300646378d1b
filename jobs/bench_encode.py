"""`latentpress bench encode`: the encoders of a config alone and in a real run, as tables, JSON and chart."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from benchmarks import random_models
from benchmarks.encode import alone, end_to_end, measure_text, measure_video, variants
from benchmarks.record import RESULTS, append_result
from jobs.console import console, size, table
from pipeline.graph import checked_encoder, manifest_rows
from pipeline.progress import say
from schemas.config import Dtype, PreprocessConfig
from schemas.errors import EXIT_DONE, ConfigError, RunError
from schemas.load import load_config

_TEXT_BATCHES = (1, 8, 32)
_COLORS = ("#2f7d4f", "#5f8fd9", "#d98c5f", "#9aa5b1", "#7a5fd9", "#b3261e")


def encode(
    config_path: Path,
    *,
    overrides: Sequence[str],
    dtypes: str,
    random: str,
    text: bool,
    tiling: bool,
    compile: bool,
    with_run: bool,
    rows: int,
    batches: int,
    reps: int,
    json_path: Path | None,
    plot_path: Path | None,
    results: Path = RESULTS,
) -> int:
    """Measure, print the tables, write what was asked for; returns the exit code."""
    for path in (json_path, plot_path):
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"{path}: there is no folder {path.parent}")
    with _models(random, text=text) as replaced:
        config = load_config(config_path, PreprocessConfig, overrides=[*overrides, *replaced])
        chosen = _dtypes(dtypes) or (config.video_encoder.compute_dtype,)
        checked_encoder(config)
        if with_run:
            manifest_rows(config)  # what is wrong with it is said before minutes of measuring
        report: dict[str, Any] = {
            "model": random or config.video_encoder.model or config.video_encoder.kind,
            "random_weights": bool(random),
            "reps": reps,
            "video": measure_video(
                config.video_encoder,
                variants(config, dtypes=chosen, tiling=tiling, compile=compile),
                batches=batches,
                reps=reps,
                tell=say,
            ),
        }
        if text and config.text_encoder.kind != "tiny-t5":
            report["text"] = measure_text(
                config.text_encoder, dtypes=chosen, batch_sizes=_TEXT_BATCHES, tell=say
            )
        if with_run:
            report["end_to_end"] = end_to_end(config, rows=rows, batches=batches, reps=reps, tell=say)
    _print(report)
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if plot_path is not None:
        _plot(report, plot_path)
    for written in (json_path, plot_path, append_result("encode", report, folder=results)):
        if written is not None:
            console.print(f"wrote {written}")
    return EXIT_DONE


@contextlib.contextmanager
def _models(random: str, *, text: bool) -> Iterator[list[str]]:
    """Overrides that put random models in place of the config's, while they exist."""
    if not random:
        yield []
        return
    with tempfile.TemporaryDirectory(prefix="latentpress-bench-") as folder:
        replaced = random_models.overrides(random, Path(folder))
        say(f"writing random weights of {random}")
        if isinstance(failed := alone(random_models.write, random, Path(folder), text), str):
            raise RunError(f"the random weights could not be written: {failed}")
        yield replaced if text else [*replaced, "text_encoder.kind=tiny-t5"]


def _dtypes(names: str) -> tuple[Dtype, ...]:
    found = tuple(name.strip() for name in names.split(",") if name.strip())
    for name in found:
        if name not in get_args(Dtype):
            raise ConfigError(f"--dtypes: expected some of {', '.join(get_args(Dtype))}, found {name!r}")
    return found  # type: ignore[return-value]


def _print(report: dict[str, Any]) -> None:
    weights = "the embedded codec" if report["model"] == "dct" else "its weights"
    weights = "random weights of its shapes" if report["random_weights"] else weights
    devices = sorted({each["device"] for each in report["video"] if "device" in each})
    console.print(f"{report['model']}, {weights}; {', '.join(devices)}; medians of {report['reps']} runs")
    rows = table(
        "bucket", "encoder runs in", ">batch", ">clips/s", ">frames/s", ">peak memory", ">load s", ">first s"
    )
    for each in report["video"]:
        if "failed" in each:
            rows.add_row(each["bucket"], each["variant"], "", each["failed"])
            continue
        rows.add_row(
            each["bucket"],
            each["variant"],
            str(each["batch"]),
            f"{each['clips_per_s']:.3g}",
            f"{each['frames_per_s']:.3g}",
            size(each["peak_bytes"]),
            f"{each['load_s']:.1f}",
            f"{each['first_batch_s']:.1f}",
        )
    console.print(rows)
    if report.get("text"):
        rows = table("text encoder runs in", ">batch", ">captions/s", ">tokens/s", ">peak memory")
        for each in report["text"]:
            if "failed" in each:
                rows.add_row(each["dtype"], str(each["batch"]), each["failed"])
                continue
            rows.add_row(
                each["dtype"],
                str(each["batch"]),
                f"{each['captions_per_s']:.3g}",
                f"{each['tokens_per_s']:.3g}",
                size(each["peak_bytes"]),
            )
        console.print(rows)
    run = report.get("end_to_end")
    if run and "failed" in run:
        console.print(f"end to end: {run['failed']}")
    elif run:
        busy = ", ".join(f"{stage} {share:.0%}" for stage, share in run["stage_busy"].items())
        console.print(
            f"end to end: {run['clips']} clips at {run['clips_per_s']:.3g}/s, {run['of_ceiling']:.2f} of the "
            f"encoder fed from memory ({busy})"
        )


def _plot(report: dict[str, Any], path: Path) -> None:
    """Bars of frames/s per bucket and variant, each with its peak memory."""
    from matplotlib.figure import Figure

    good = [each for each in report["video"] if "failed" not in each]
    buckets = list(dict.fromkeys(each["bucket"] for each in good))
    names = list(dict.fromkeys(each["variant"] for each in good))
    figure = Figure(figsize=(max(6.0, 1.5 + 0.9 * len(good)), 4.5), layout="constrained", dpi=120)
    axes = figure.subplots()
    width = 0.84 / max(1, len(names))
    for k, name in enumerate(names):
        mine = [each for each in good if each["variant"] == name]
        at = [buckets.index(each["bucket"]) + (k - (len(names) - 1) / 2) * width for each in mine]
        color = _COLORS[k % len(_COLORS)]
        bars = axes.bar(at, [each["frames_per_s"] for each in mine], width * 0.92, color=color, label=name)
        axes.bar_label(bars, [size(each["peak_bytes"]) for each in mine], fontsize=7, padding=1)
    axes.set_xticks(range(len(buckets)), buckets)
    axes.set_ylabel("frames/s")
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    device = ", ".join(sorted({each["device"] for each in good}))
    figure.suptitle(
        f"{report['model']} on {device}, fed from memory; on each bar its peak memory", fontsize=10
    )
    figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=3)
    figure.savefig(path)
