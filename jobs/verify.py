"""`latentpress verify`: findings for a person or a program; clean is exit code 0.

With `samples`, also a gate: that many samples are decoded again from their sources and held against their
latents; exit code 3 where one is past it, or where none could be compared.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from jobs.console import count_of, print_json, size
from jobs.gate import Gate
from pipeline.collect import find_orphans
from pipeline.fidelity import MIN_PSNR_DB, card_encoder, choose_samples, compare
from schemas.adoption import adoption_notes, refuse_stale
from schemas.card import read_card
from schemas.check import check_dataset
from schemas.config import LimitsConfig, PreprocessConfig, SourcesConfig
from schemas.dataset import Dataset
from schemas.errors import EXIT_DONE, EXIT_FAILED, EXIT_GATE, ConfigError
from schemas.load import load_config
from schemas.store import location
from schemas.verdict import Verdict

_SHOWN = 50


def verify(
    dataset: str | Path,
    *,
    config: Path | None,
    overrides: Sequence[str],
    samples: int,
    min_psnr: float | None,
    as_json: bool,
    vae: str | None = None,
) -> int:
    """Check `dataset`, and with `config` also that its card is what that config asks for.

    `samples` of it are compared with their sources where it is clean, under the limits and sources
    of `config` if it is given; `min_psnr` in dB is their gate (MIN_PSNR_DB), `vae` where the video encoder is
    now.
    """
    card = read_card(dataset)
    settings = None
    if config is None and overrides:
        raise ConfigError("--set changes a config; name it with -c CONFIG")
    if config is not None:
        from pipeline.graph import wanted_card

        settings = load_config(config, PreprocessConfig, overrides=overrides)
        refuse_stale(location(dataset), have=card, want=wanted_card(settings, have=card))
    if min_psnr is not None and not samples:
        raise ConfigError("--min-psnr is the gate of samples that are decoded again; give --sample N with it")
    if vae is not None and not samples:
        raise ConfigError("--vae decodes samples again; give --sample N with it")
    live = sys.stderr.isatty()

    def progress(done: int, total: int) -> None:
        if live:
            print(f"\r{done}/{total} units", end="\n" if done == total else "", file=sys.stderr, flush=True)

    verdict = check_dataset(dataset, progress=progress)
    if verdict.clean:
        _note_orphans(dataset, verdict)
    gate = None
    if samples and verdict.clean:
        limits, sources = LimitsConfig(), SourcesConfig()
        if settings is not None:
            limits, sources = settings.limits, settings.sources
        rows = choose_samples(dataset, card, samples)
        encoder = card_encoder(dataset, card, vae=vae)
        gate = Gate(
            list(compare(dataset, card, rows, limits=limits, sources=sources, encoder=encoder)),
            min_psnr=MIN_PSNR_DB if min_psnr is None else min_psnr,
            notes=adoption_notes(dataset),
        )
    if as_json:
        print_json({**verdict.as_dict(), "fidelity": gate and gate.as_dict()})
    else:
        report(dataset, verdict)
        if gate:
            gate.report()
    if not verdict.clean:
        return EXIT_FAILED
    return EXIT_DONE if gate is None or gate.passed else EXIT_GATE


def _note_orphans(dataset: str | Path, verdict: Verdict) -> None:
    orphans = find_orphans(Dataset(dataset), older_than_s=0)
    if orphans:
        nbytes = sum(orphan.nbytes for orphan in orphans)
        verdict.notes.append(
            f"{count_of(len(orphans), 'file')} ({size(nbytes)}) of no commit, such as {orphans[0].name}; "
            f"`latentpress gc {dataset}` removes those that are old enough"
        )


def report(dataset: str | Path, verdict: Verdict) -> None:
    """The verdict for a person."""
    for finding in verdict.findings[:_SHOWN]:
        print(finding)
    if len(verdict.findings) > _SHOWN:
        print(f"... and {len(verdict.findings) - _SHOWN} more (--json lists all)")
    for note in verdict.notes:
        print(f"note: {note}")
    if verdict.unfinished:
        print(f"{count_of(verdict.unfinished, 'unit')} not done yet; to go on: {verdict.rerun}")
    print(
        f"{dataset}: {count_of(verdict.samples, 'sample')}, {count_of(verdict.prompts, 'prompt')}, "
        f"{verdict.quarantined} quarantined, {count_of(verdict.units, 'unit')}, "
        f"{verdict.nbytes / 1e6:.1f} MB: "
        + ("clean" if verdict.clean else count_of(len(verdict.findings), "finding"))
    )
