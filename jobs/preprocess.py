"""`latentpress preprocess`: config file in, latent dataset out, and how it went in a few lines."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from jobs.console import console, count_of, count_table, print_json
from pipeline.graph import preprocess
from schemas.config import PreprocessConfig
from schemas.errors import EXIT_DONE, EXIT_FAILED, EXIT_GATE
from schemas.load import load_config

_AGAIN_S = 0.05
"""Until an interrupt that was lost is raised again."""


def run(config_path: Path, *, overrides: Sequence[str], adopt: bool, as_json: bool) -> int:
    """Preprocess; the exit code of the command."""
    config = load_config(config_path, PreprocessConfig, overrides=overrides)
    with _ended_like_ctrl_c():
        summary, ran = preprocess(config, adopt=adopt)
    unfinished = summary["asked_meanwhile"] or summary["clips"] > summary["kept"] + summary["quarantined"]
    over = summary["quarantine_rate"] > config.quarantine.max_rate
    if as_json:
        print_json(summary)
    else:
        report(config, summary, ran=ran, over=over)
    return EXIT_FAILED if unfinished else EXIT_GATE if over else EXIT_DONE


@contextlib.contextmanager
def _ended_like_ctrl_c() -> Iterator[None]:
    """SIGTERM, which batch systems send, and SIGHUP, of a closed terminal, end a run as Ctrl-C does: its
    workers and temp files go with it. Under `nohup` SIGHUP stays ignored. What is raised while an object is
    taken down, in some library's `__del__`, Python only reports: that is raised once more."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    def report(lost: sys.UnraisableHookArgs) -> None:
        if issubclass(lost.exc_type, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)
        else:
            told(lost)

    told, sys.unraisablehook = sys.unraisablehook, report
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        sys.unraisablehook = told
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def report(config: PreprocessConfig, summary: dict[str, Any], *, ran: bool, over: bool) -> None:
    """The summary for a person."""
    # A clip counts here once for each of its captions, and below, where it is encoded, once.
    console.print(
        f"{summary['kept']} of {summary['clips']} captioned clips kept, {summary['quarantined']} quarantined"
    )
    if summary["asked_meanwhile"]:
        console.print(
            "another run, or `latentpress retry`, changed what is asked for meanwhile; run the same command "
            "again to ask for yours"
        )
    if summary["reasons"]:
        console.print(count_table("reason", summary["reasons"]))
    latents = summary["last_run"].get("latents") if ran else None
    if not ran:
        console.print("nothing to do: everything asked for is committed")
    elif latents:
        executor = summary["last_run"]["executor"]
        console.print(
            f"{count_of(latents['clips'], 'clip')} encoded in {latents['wall_s'] - latents['start_s']:.1f} s "
            f"= {latents['clips_per_s']:.2f} clips/s on {executor['kind']} x {executor['workers']}, after "
            f"{latents['start_s']:.1f} s of start-up"
        )
    prompts = summary["last_run"].get("prompts") if ran else None
    if prompts and (cut := prompts["captions_cut"]):
        was = "was" if cut == 1 else "were"
        console.print(
            f"note: {count_of(cut, 'caption')} {was} cut to {config.text_encoder.max_length} tokens"
        )
    console.print(f"dataset: {config.output}  (summary.json, index.parquet, quarantine.parquet)")
    if over:
        rate, allowed = summary["quarantine_rate"], config.quarantine.max_rate
        console.print(
            f"quarantined {rate:.1%} of the clips, over quarantine.max_rate = {allowed:.1%}: exit 3"
        )
    if latents and latents["advice"]:
        console.print(f"bottleneck: {latents['advice']}")
