"""What a dataset says beside its index: quarantine, runs, and what its sources were.

In: a dataset. Out: JSON-able values of bounded size, however many clips, runs or reasons there are. Of the
sources only some units are looked at, evenly spread: their sizes stand in commit records alone.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from jobs.remedies import remedy
from pipeline.clip import HDR
from pipeline.geometry import fit
from schemas.card import Card
from schemas.dataset import Dataset
from schemas.errors import DatasetError
from schemas.index import read_quarantine

_REASONS, _EXAMPLES = 40, 5
_RUNS = 20
_UNITS = 48
"""Whose records are read for what their sources were."""
_SIZES = 300
_KINDS = 12
_STAGES = ("load", "decode_wait", "encode", "write")
_ENLARGED = 1.05
_RUN = re.compile(r"\d{8}T\d{6}-.+")


def quarantined(dataset: Dataset) -> dict[str, Any]:
    """How many rows, of how many reasons; of the most frequent reasons what to do, and the first few rows."""
    table = read_quarantine(
        dataset.root, columns=["reason", "stage", "source", "start_s", "end_s", "clip", "message", "attempts"]
    )
    counts = {row["values"]: row["counts"] for row in pc.value_counts(table["reason"]).to_pylist()}
    found = []
    for reason in sorted(counts, key=lambda reason: (-counts[reason], reason))[:_REASONS]:
        numbers = np.flatnonzero(pc.equal(table["reason"], reason).to_numpy())[:_EXAMPLES]
        rows = table.take(numbers).to_pylist()
        found.append({"reason": reason, "rows": counts[reason], "remedy": remedy(reason), "examples": rows})
    return {"rows": table.num_rows, "reasons": len(counts), "most": found}


def runs(dataset: Dataset) -> dict[str, Any]:
    """The newest runs, oldest first, by their logs (killed ones too), and how many there are."""
    found = dataset.runs.iterdir() if dataset.runs.exists() else ()
    folders = sorted((path for path in found if _RUN.fullmatch(path.name)), key=lambda path: path.name)
    newest = [run for folder in folders[-_RUNS:] if (run := _run(folder)) is not None]
    return {"count": len(folders), "newest": newest}


def _run(folder: Path) -> dict[str, Any] | None:
    """One run; None where nothing was logged: it had only rows to add or remove."""
    counts: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    for line in _facts(folder / "log.jsonl"):
        family, spent = line["family"], line["seconds"]
        counts[f"{family}_units"] += 1
        counts[family] += line["kept"]
        counts["quarantined"] += len(line["failures"]) if family == "latents" else 0
        counts["nbytes"] += line["nbytes"]
        counts["video_s"] += line["video_s"]
        if family == "latents":
            seconds.update({name: spent.get(name, 0.0) for name in (*_STAGES, "total")})
    if not counts:
        return None
    total = seconds["total"]
    return {
        "run": folder.name,
        "clips": counts["latents"],
        "quarantined": counts["quarantined"],
        "prompts": counts["prompts"],
        "video_s": counts["video_s"],
        "nbytes": counts["nbytes"],
        "worker_s": total,
        "clips_per_worker_s": (counts["latents"] + counts["quarantined"]) / total if total else None,
        "shares": {name: seconds[name] / total if total else None for name in _STAGES},
    }


def _facts(path: Path) -> Iterator[dict[str, Any]]:
    """The units of a log; the last line of a run that was killed may be torn."""
    try:
        with path.open("rb") as file:
            for line in file:
                try:
                    facts = json.loads(line)
                except ValueError:
                    continue
                if "family" in facts:
                    yield facts
    except (FileNotFoundError, NotADirectoryError):
        return


def source_facts(dataset: Dataset, card: Card) -> dict[str, Any]:
    """What the source files of some units were, as their commit records have it."""
    units = dataset.finished()["latents"]
    looked_at = units[np.unique(np.linspace(0, len(units) - 1, min(_UNITS, len(units))).round().astype(int))]
    kinds: dict[str, Counter[str]] = {name: Counter() for name in ("codecs", "containers", "traits")}
    sizes: Counter[tuple[int, int]] = Counter()
    clips = enlarged = damaged = 0
    for unit in looked_at.tolist():
        try:
            commit = dataset.commit("latents", unit)
        except DatasetError:
            damaged += 1
            continue
        for sample in commit.samples if commit else ():
            clip = sample.meta["clip"]
            if not clip.get("source_width"):  # imported: nothing is known of the source
                continue
            clips += 1
            size = clip["source_width"], clip["source_height"]
            sizes[size[::-1] if clip["rotation"] % 180 else size] += 1
            enlarged += _is_enlarged(sample.meta, card)
            kinds["codecs"][clip["codec"]] += 1
            kinds["containers"][clip["container"].split(",")[0]] += 1
            kinds["traits"].update(_traits(clip))
    return {
        "clips": clips,
        "units": len(looked_at),
        "damaged_records": damaged,
        "enlarged": enlarged,
        "sizes": [[*size, count] for size, count in sizes.most_common(_SIZES)],
        **{name: dict(counter.most_common(_KINDS)) for name, counter in kinds.items()},
    }


def _is_enlarged(meta: dict[str, Any], card: Card) -> bool:
    """Whether the part of the source that is seen has fewer pixels, one way or the other, than its frames."""
    if (resize := card.settings.resize) is None:
        return False
    clip, into = meta["clip"], (meta["width"], meta["height"])
    place = fit(
        clip["source_width"],
        clip["source_height"],
        sar=Fraction(clip["sar"].replace(":", "/")),
        into=into[::-1] if clip["rotation"] % 180 else into,
        mode=resize.mode,
    )
    return any(after > _ENLARGED * before for after, before in zip(place.size, place.crop[2:], strict=True))


def _traits(clip: dict[str, Any]) -> list[str]:
    traits = {
        "rotated": clip["rotation"] != 0,
        "interlaced": clip["interlaced"],
        "HDR": clip["color_transfer"] in HDR,
        "untagged color": clip["color_rule"].startswith("untagged"),
        "notes": bool(clip["notes"]),
    }
    return [name for name, there in traits.items() if there]
