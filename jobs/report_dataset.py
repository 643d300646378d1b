"""`latentpress report DATASET`: a dataset in; one HTML page that needs nothing else, and its numbers, out.

Columns of the index are read block by block, and of records as many as the page has room for, so a dataset of
millions of clips takes seconds; the rest of the time goes to the few samples that are decoded.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobs.console import console, count_of, duration, print_json, size, table
from jobs.dataset_plots import dataset_plots
from jobs.dataset_records import generations, quarantined, read_summary, runs, source_facts
from jobs.dataset_samples import draw_chosen
from jobs.index_numbers import IndexNumbers
from jobs.meaning import meaning
from jobs.report_page import PAGE_NAME, count, inline_plots, percent, render
from pipeline.commit import replace
from schemas.adoption import adoption_notes
from schemas.card import read_card
from schemas.dataset import Dataset
from schemas.errors import EXIT_DONE, ConfigError
from schemas.index import open_index
from schemas.verdict import Mending

SAMPLES = 12
_BUCKETS, _LISTED_GENERATIONS = 40, 20
_FREQUENT = 0.01
"""Share of the rows from which one caption is worth a word."""


def report_dataset(
    dataset: Path, *, output: Path | None, samples: int, vae: str | None, as_json: bool
) -> int:
    """Write the page of a dataset (`output`, or report.html in it); returns the exit code.

    `samples` are decoded and drawn, `vae` is where the video encoder is now. DatasetError where tables are
    missing or damaged.
    """
    card, opened = read_card(dataset), Dataset(dataset)
    index = IndexNumbers(open_index(dataset), card)
    sources = source_facts(opened)
    summary, grown, failed = read_summary(opened), generations(opened), quarantined(opened)
    shown, without = draw_chosen(dataset, card, count=samples, vae=vae) if samples else ([], None)
    psnr = [each["psnr_db"] for each in shown if each["psnr_db"] is not None]
    numbers = {
        "dataset": str(dataset),
        "fingerprint": card.fingerprint,
        "families": {family: card.family_fingerprint(family) for family in ("latents", "prompts")},
        "imported_from": card.imported_from,
        "meaning": dict(meaning(card)),
        "adopted": adoption_notes(dataset),
        "soft": card.soft,
        **index.as_dict(),
        "sources": sources,
        "quarantined": failed["rows"],
        "quarantine": failed,
        "unfinished": max(0, summary.get("clips", 0) - index.rows - failed["rows"]),
        "rerun": Mending(opened).rerun,
        "generations": {"count": len(grown), "newest": grown[-_LISTED_GENERATIONS:]},
        "last_run": summary.get("last_run"),
        "runs": runs(opened),
        "psnr_db": statistics.median(psnr) if psnr else None,
    }
    numbers["findings"] = list(findings(numbers))
    plots = dataset_plots(index, sizes=sources["sizes"], buckets=card.settings.buckets)
    made = render(
        "report_dataset.html",
        data=numbers,
        most_buckets=_BUCKETS,
        plots=inline_plots(plots),
        samples=shown,
        without=without,
        hard=card.hard,
    )
    page = output or opened.root / PAGE_NAME
    try:
        replace(page, made.encode())
    except PermissionError as error:
        raise ConfigError(f"{page} cannot be written: {error.strerror}; name another file with -o") from error
    if as_json:
        drawn = [{name: value for name, value in each.items() if name != "picture"} for each in shown]
        print_json(numbers | {"samples": drawn, "page": str(page)})
    else:
        _show(numbers, without)
        console.print(f"wrote {page}")
    return EXIT_DONE


def findings(numbers: dict[str, Any]) -> Iterator[str]:
    """What deserves a look before training, and what can be done about it; a sentence each."""
    clips, rows = max(1, numbers["clips"]), max(1, numbers["rows"])
    shares, sources = numbers["shares"], numbers["sources"]
    if numbers["unfinished"]:
        yield f"{count_of(numbers['unfinished'], 'row')} not done yet; to go on: {numbers['rerun']}"
    if not numbers["last_run"] and not numbers["imported_from"]:  # an import tells of none
        yield "no run of this dataset has come to its end: the numbers below are those of an earlier state"
    if stopped := (numbers["last_run"] or {}).get("stopped"):
        yield f"the last run stopped: {stopped}"
    if many := shares["made_up"]["above_half"]:
        yield (
            f"in {_of(many, clips)} more than half of the frames are made up, so they play in slow motion; "
            "frames.max_slowdown or fewer num_frames, in a new dataset, keep such clips out"
        )
    if many := shares["coverage"]["below_half"]:
        yield (
            f"{_of(many, clips)} stand for less than half of their source; frames.clips = 'chunk', in a new "
            "dataset, makes several clips of such sources"
        )
    if many := numbers["repaired"]:
        yield f"{_of(many, clips)} hold frames whose own picture could not be decoded; listed below"
    if many := sources["enlarged"]:
        yield (
            f"{_of(many, sources['clips'])} looked at were enlarged, their sources being smaller than "
            "the bucket; smaller buckets, in a new dataset, cost less and lose nothing"
        )
    cut = ((numbers["last_run"] or {}).get("prompts") or {}).get("captions_cut")
    if cut:
        yield f"{count_of(cut, 'caption')} of the last run were cut to the text encoder's length"
    for repeated in numbers["repeated_captions"][:1]:
        if repeated["rows"] > max(2, _FREQUENT * rows):
            yield (
                f"one caption stands for {_of(repeated['rows'], rows, 'rows')}: "
                f"{_shortened(repeated['caption'])!r}"
            )
    if sources["damaged_records"]:
        yield (
            f"{count_of(sources['damaged_records'], 'commit record')} cannot be read: run "
            f"`latentpress verify {numbers['dataset']}`"
        )
    yield from numbers["adopted"]


def _of(part: int, whole: int, noun: str = "clips") -> str:
    return f"{part:,} of {whole:,} {noun} ({percent(part / whole)})"


def _shortened(text: str, length: int = 120) -> str:
    return text if len(text) <= length else f"{text[:length]}..."


def _show(numbers: dict[str, Any], without: str | None) -> None:
    """The numbers for a person, and what deserves a look."""
    psnr = numbers["psnr_db"]
    facts = table("", "")
    for name, value in {
        "clips": f"{numbers['clips']:,}; rows: {numbers['rows']:,}, quarantined: {numbers['quarantined']:,}",
        "video": duration(numbers["video_s"]),
        "tokens": count(numbers["tokens"]),
        "stored": f"{size(numbers['latent_bytes'])} of latents, {size(numbers['prompt_bytes'])} of prompts",
        **({"PSNR": f"{psnr:.1f} dB, median of the samples shown"} if psnr is not None else {}),
    }.items():
        facts.add_row(name, value)
    console.print(facts)
    for sentence in itertools.islice(numbers["findings"], 20):
        console.print(f"note: {sentence}")
    if without:
        console.print(f"note: {'no' if psnr is None else 'not all'} pictures: {without}")
