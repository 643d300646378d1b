"""`latentpress report DATASET`: a dataset in; one HTML page that needs nothing else, and its numbers, out.

Columns of the index are read block by block, and of records as many as the page has room for, so a dataset of
millions of clips takes seconds; the rest of the time goes to the few samples that are decoded.
"""

from __future__ import annotations

import itertools
import shlex
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobs.console import console, count_of, duration, print_json, size, table
from jobs.dataset_plots import dataset_plots
from jobs.dataset_records import quarantined, runs, source_facts
from jobs.dataset_samples import draw_chosen
from jobs.dataset_state import gaps, generations, read_summary, unfinished
from jobs.index_numbers import IndexNumbers
from jobs.meaning import meaning
from jobs.report_page import (
    PAGE_NAME,
    count,
    inline_plots,
    percent,
    render,
    require_writable,
    spelled,
    write_page,
)
from schemas.adoption import adoption_notes
from schemas.card import Card, read_card
from schemas.config import AT_A_RATE, SEVERAL
from schemas.dataset import Dataset
from schemas.errors import EXIT_DONE
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
    page = output or opened.root / PAGE_NAME
    require_writable(page)
    index = IndexNumbers(open_index(dataset), card)
    sources = source_facts(opened, card)
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
        "unfinished": unfinished(opened),
        "rerun": Mending(opened).rerun,
        "generations": {"count": len(grown), "newest": grown[-_LISTED_GENERATIONS:]},
        "last_run": summary["last_run"],
        "notes": [*summary["notes"], *gaps(opened)],
        "runs": runs(opened),
        "psnr_db": statistics.median(psnr) if psnr else None,
    }
    numbers["findings"] = list(findings(numbers, card))
    if _several(card):  # of a source that is cut into clips, each is a small part, as it should be
        numbers["far_ends"]["coverage"] = []
    plots = dataset_plots(index, sizes=sources["sizes"], buckets=card.settings.buckets)
    made = render(
        "report_dataset.html",
        data=numbers,
        most_buckets=_BUCKETS,
        plots=inline_plots(plots),
        samples=shown,
        without=without,
        hard=card.hard,
        several=_several(card),
    )
    write_page(page, made)
    if as_json:
        drawn = [{name: value for name, value in each.items() if name != "picture"} for each in shown]
        print_json(numbers | {"samples": drawn, "page": str(page)})
    else:
        _show(numbers, without)
        console.print(spelled(f"wrote {page}"))
    return EXIT_DONE


def findings(numbers: dict[str, Any], card: Card) -> Iterator[str]:
    """What deserves a look before training, and what can be done about it; a sentence each."""
    clips, asked = max(1, numbers["clips"]), max(1, numbers["asked"])
    shares, sources = numbers["shares"], numbers["sources"]
    if many := numbers["unfinished"]:
        yield (
            f"{count_of(many, 'row')} asked for {'is' if many == 1 else 'are'} not in the index: the numbers "
            f"below are those of an earlier state; to go on: {numbers['rerun']}"
        )
    if many := numbers["quarantined"]:
        most = numbers["quarantine"]["most"][0]
        told = f"{_of(many, many + numbers['rows'], 'rows')} {'is' if many == 1 else 'are'} quarantined"
        by_far = "most " if numbers["quarantine"]["reasons"] > 1 else ""
        yield f"{told}, {by_far}for {most['reason']}: {most['remedy']}"
    last = numbers["last_run"] or {}
    if stopped := last.get("stopped"):
        yield f"the last run stopped: {stopped}"
    if many := shares["made_up"]["far"]:
        yield (
            f"in {_of(many, clips)} more than half of the frames are made up, so they play in slow motion; "
            "frames.max_slowdown or fewer num_frames, in a new dataset, keep such clips out"
        )
    if (many := shares["coverage"]["far"]) and not _several(card):
        frames = card.settings.frames
        advice = "; frames.clips = 'chunk', in a new dataset, makes several clips of such sources"
        at_a_rate = frames is not None and frames.policy in AT_A_RATE
        yield f"{_of(many, clips)} stand for less than half of their source{advice if at_a_rate else ''}"
    if many := numbers["repaired"]:
        yield f"{_of(many, clips)} hold frames whose own picture could not be decoded; listed below"
    if many := sources["enlarged"]:
        yield (
            f"{_of(many, sources['clips'])} looked at were enlarged, their sources being smaller than "
            "the bucket; smaller buckets, in a new dataset, cost less and lose nothing"
        )
    if cut := (last.get("prompts") or {}).get("captions_cut"):
        yield f"the last run cut {count_of(cut, 'caption')} to the text encoder's length"
    for repeated in numbers["repeated_captions"][:1]:
        if repeated["rows"] > max(2, _FREQUENT * asked):
            yield (
                f"one caption stands for {_of(repeated['rows'], asked, 'rows')}: "
                f"{_shortened(repeated['caption'])!r}"
            )
    if sources["damaged_records"]:
        yield (
            f"{count_of(sources['damaged_records'], 'commit record')} cannot be read: run "
            f"`latentpress verify {shlex.quote(numbers['dataset'])}`"
        )
    yield from numbers["notes"]
    yield from numbers["adopted"]


def _several(card: Card) -> bool:
    """Whether a source is cut into as many clips as it holds."""
    return card.settings.frames is not None and card.settings.frames.clips in SEVERAL


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
        console.print(spelled(f"note: {sentence}"))
    if without:
        console.print(spelled(f"note: {'no' if psnr is None else 'not all'} pictures: {without}"))
