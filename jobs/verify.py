"""`latentpress verify`: findings for a person or a program; clean is exit code 0."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from jobs.console import print_json
from schemas.card import read_card, refuse_stale
from schemas.check import Verdict, check_dataset
from schemas.config import PreprocessConfig
from schemas.errors import EXIT_DONE, EXIT_FAILED, ConfigError
from schemas.load import load_config

_SHOWN = 50


def verify(dataset: Path, *, config: Path | None, overrides: Sequence[str], as_json: bool) -> int:
    """Check `dataset`, and with `config` also that its card is what that config asks for."""
    card = read_card(dataset)
    if config is None and overrides:
        raise ConfigError("--set changes a config; name it with -c CONFIG")
    if config is not None:
        from pipeline.graph import wanted_card

        want = wanted_card(load_config(config, PreprocessConfig, overrides=overrides))
        refuse_stale(dataset, have=card, want=want)
    live = sys.stderr.isatty()

    def progress(done: int, total: int) -> None:
        if live:
            print(f"\r{done}/{total} units", end="\n" if done == total else "", file=sys.stderr, flush=True)

    verdict = check_dataset(dataset, progress=progress)
    if as_json:
        print_json(verdict.as_dict())
    else:
        report(dataset, verdict)
    return EXIT_DONE if verdict.clean else EXIT_FAILED


def report(dataset: Path, verdict: Verdict) -> None:
    """The verdict for a person."""
    for finding in verdict.findings[:_SHOWN]:
        print(finding)
    if len(verdict.findings) > _SHOWN:
        print(f"... and {len(verdict.findings) - _SHOWN} more (--json lists all)")
    if verdict.unfinished:
        print(
            f"{verdict.unfinished} units are not done yet; run `latentpress preprocess` with its config again"
        )
    print(
        f"{dataset}: {verdict.samples} samples, {verdict.prompts} prompts, "
        f"{verdict.quarantined} quarantined, {verdict.units} units, {verdict.nbytes / 1e6:.1f} MB: "
        + ("clean" if verdict.clean else f"{len(verdict.findings)} findings")
    )
