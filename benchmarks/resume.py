"""What a large dataset costs when run again: nothing to do, 1 % more, 1 % of captions edited or removed.

`python -m benchmarks.resume [--units N] [--unit-rows N]` makes a dataset without video: a real card, one
generation, real commit records, no shards, files or encoders. Each case is a process of its own and does what
`preprocess` does around its units: rows, history, changes, generation, pending units, tables. What units of
the case would commit is written between, outside the clock. Peak memory is that of the whole process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.record import append_result
from pipeline.commit import commit_once, make_folder
from pipeline.generation import Units, add_generation, known_sources, pending_units
from pipeline.outlook import outlook
from pipeline.reindex import update_tables
from pipeline.source import Source
from schemas.bucket import Geometry
from schemas.card import Card, card_bytes, card_path, make_card, read_card
from schemas.config import BucketConfig, PreprocessConfig
from schemas.dataset import Dataset
from schemas.load import sealed_json
from schemas.manifest import ManifestRow
from schemas.sample import Family, SampleRecord, TensorRecord, UnitCommit, unit_name
from schemas.scaling import Scaling

BUCKET = BucketConfig(num_frames=49, height=480, width=720)
CASES = ("first run", "nothing to do", "1 % appended", "1 % of captions edited", "1 % removed", "tables lost")


def rows_of(case: str, count: int) -> list[ManifestRow]:
    """What the manifest of a case holds; that of a case builds on the one before."""
    extra = count // 100
    captions = 0 if case in ("first run", "nothing to do", "1 % appended") else extra
    first = extra if case in ("1 % removed", "tables lost") else 0
    stop = count + (0 if case in ("first run", "nothing to do") else extra)
    rows = (
        ManifestRow(
            number=i + 1,
            source=f"clips/{i // 1000:05d}/{i:09d}.mp4",
            path=f"/data/videos/clips/{i // 1000:05d}/{i:09d}.mp4",
            caption=f"a caption as people write them, with some words to say what clip number {i} shows",
        )
        for i in range(first, stop)
    )
    return [
        replace(row, caption=f"edited: {row.caption}") if captions < row.number <= 2 * captions else row
        for row in rows
    ]


def start(root: Path) -> None:
    """An empty dataset with a card."""
    card = make_card(
        PreprocessConfig(manifest="m", output=str(root), buckets=(BUCKET,)),
        video_fields={"kind": "none"},
        text_fields={"kind": "none"},
        scaling=Scaling(rule="factor", factor=0.7),
        geometry=Geometry(temporal=4, spatial=8, channels=16),
        versions={},
    )
    make_folder(root)
    commit_once(card_path(root), card_bytes(card))


def commit_units(dataset: Dataset, card: Card, units: Units) -> None:
    """Records as workers would leave them, without the fsyncs."""
    shape, width = card.geometry.latent_shape(BUCKET), 4096
    for unit in units:
        samples = []
        for i, row in enumerate(unit.rows):
            if unit.family == "prompts":
                tensors = {
                    "prompt_embeds": _tensor("F32", (226, width), i),
                    "prompt_mask": _tensor("U8", (226,), i),
                }
                meta: dict[str, Any] = {"num_tokens": 20, "truncated": False}
            else:
                tensors = {name: _tensor("F32", shape, i) for name in card.latent_tensors}
                meta = {"num_frames": 49, "height": 480, "width": 720, "clip": _CLIP}
            samples.append(SampleRecord(key=row["key"], tensors=tensors, meta=meta))
        record = UnitCommit(
            family=unit.family,
            unit=unit.number,
            fingerprint=card.family_fingerprint(unit.family),
            shard=f"{unit.family}/{unit_name(unit.family, unit.number)}-{unit.number:012x}.tar",
            sha256="0" * 64,
            nbytes=1,
            samples=tuple(samples),
            seconds={"encode": 0.1},
        )
        path = dataset.commit_path(unit.family, unit.number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sealed_json(record.model_dump(mode="json")))


def _tensor(dtype: str, shape: tuple[int, ...], i: int) -> TensorRecord:
    return TensorRecord(
        dtype=dtype, shape=shape, offset=512 + i * 1024, nbytes=1024, checksum="crc32:01234567"
    )


_CLIP = {
    "source_fps": 30.0,
    "effective_fps": 8.0,
    "pts_s": [round(i / 7.9, 6) for i in range(49)],
    "coverage": 1.0,
    "frame_weights": [round(1 / (i + 1), 4) for i in range(49)],
    **{name: [] for name in ("interpolated", "duplicated", "repaired")},
}


def measure(root: Path, case: str, count: int, unit_rows: int) -> dict[str, Any]:
    """Seconds of a case by step, its peak memory, and what it did."""
    dataset, seconds = Dataset(root), {}
    card = read_card(root)
    if case == "tables lost":
        dataset.index_path.unlink()
        dataset.quarantine_path.unlink()
    before_s = time.perf_counter()

    def lap(step: str) -> None:
        nonlocal before_s
        now = time.perf_counter()
        seconds[step] = round(now - before_s, 2)
        before_s = now

    rows = rows_of(case, count)
    lap("manifest rows")
    before = dataset.history()
    if len(before.live):
        update_tables(dataset, card, before)
    lap("history and tables")
    known = known_sources(before)
    sources = {
        row.path: Source(known.get((row.path, 1, 2)) or f"content:{row.number:064x}", 1, 2) for row in rows
    }
    lap("sources")
    after, changes = add_generation(
        dataset, card, rows=rows, sources=sources, unit_rows=unit_rows, history=before
    )
    said = str(outlook(dataset, changes, rows=len(rows), before=before, after=after))
    lap("changes")
    families: tuple[Family, ...] = ("prompts", "latents")
    pending = [pending_units(dataset, family, after) for family in families]
    lap("pending units")
    for units in pending:
        commit_units(dataset, card, units)
    before_s = time.perf_counter()
    counts = update_tables(dataset, card, dataset.history(after))
    lap("tables after")
    if counts.kept != len(rows):
        raise RuntimeError(f"{case}: {counts.kept} rows in the index, expected {len(rows)}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "case": case,
        "units_run": sum(map(len, pending)),
        "wall_s": round(sum(seconds.values()), 2),
        "seconds": seconds,
        "peak_mib": round(peak),
        "said": said,
    }


def results(root: Path, *, units: int, unit_rows: int) -> Iterator[dict[str, Any]]:
    """Every case in turn, each in a fresh process."""
    start(root)
    context = multiprocessing.get_context("spawn")
    for case in CASES:
        with context.Pool(1) as pool:
            yield pool.apply(measure, (root, case, units * unit_rows, unit_rows))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resume", description=__doc__)
    parser.add_argument("--units", type=int, default=100_000, help="latents units; as many prompts units")
    parser.add_argument("--unit-rows", type=int, default=4, help="clips a unit")
    parser.add_argument("--folder", type=Path, help="where the dataset goes; about 5 kB a clip")
    parser.add_argument("--json", type=Path, help="write every number to this file")
    options = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    found = []
    try:
        print(f"{options.units} units of {options.unit_rows} clips in each family, {folder}")
        print(f"{'case':24}{'wall s':>9}{'peak MiB':>10}{'units run':>11}  steps, s")
        for each in results(folder / "latents", units=options.units, unit_rows=options.unit_rows):
            found.append(each)
            steps = ", ".join(f"{name} {seconds}" for name, seconds in each["seconds"].items())
            print(
                f"{each['case']:24}{each['wall_s']:9.2f}{each['peak_mib']:10}{each['units_run']:11}  {steps}"
            )
            print(f"{'':24}{each['said']}", flush=True)
    finally:
        shutil.rmtree(folder)
    numbers = {"units": options.units, "unit_rows": options.unit_rows, "cases": found}
    if options.json:
        options.json.write_text(json.dumps(numbers, indent=1) + "\n")
    recorded = append_result("resume", numbers)
    if recorded is not None:
        print(f"wrote {recorded}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
