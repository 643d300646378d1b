"""The story of preprocessing, whole: mixed videos in, committed and indexed latent shards out.

    manifest -> rows -> card -> sources -> generation -> prompts units -> latents units -> index

The driver only ever holds small rows. Everything before the units is checked before work starts;
everything after is rebuilt from commit records, so running the same command again is the recovery.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.commit import TEMP_PREFIX, commit_once, make_folder, replace
from pipeline.discover import discover
from pipeline.executor import open_executor
from pipeline.generation import Unit, add_generation, known_sources, pending_units, split_into_clips
from pipeline.progress import Tally, gated_failures, track
from pipeline.source import identify
from pipeline.text_encode import load_text_encoder
from pipeline.unit import UnitResult
from pipeline.video_encode import VideoEncoder, load_video_encoder
from schemas.bucket import check_buckets
from schemas.card import Card, card_bytes, card_path, make_card, read_card, refuse_stale
from schemas.config import PreprocessConfig
from schemas.dataset import Dataset
from schemas.errors import ConfigError, ManifestError, RunError, StaleDatasetError
from schemas.index import build_tables, parquet_bytes
from schemas.load import config_digest, resolved_toml
from schemas.manifest import ManifestRow, RowProblem, read_manifest, split_rows
from schemas.sample import Family

EARLY_STOP_ROWS = 200
"""Where more than half of the first so many rows fail, the config is wrong: the run stops."""
_VERSIONED = ("latentpress", "torch", "av", "numpy", "transformers")


def preprocess(config: PreprocessConfig) -> tuple[dict[str, Any], bool]:
    """Run everything that is asked for and not yet committed; the summary, and whether anything ran."""
    config = config.model_copy(update={"output": os.path.abspath(config.output)})
    dataset = Dataset(config.output)

    # Everything that can be wrong with what was asked is said before the first file is written.
    rows = manifest_rows(config)
    card = wanted_card(config)
    card = settle_card(dataset, card)

    # Identity of every file, then one generation that holds what changed since the last run.
    known = known_sources(dataset)
    sources = identify([row.path for row in rows], mode=config.identity, known=known)
    clips = split_into_clips(rows, config, dataset=dataset, sources=sources)
    changed = add_generation(dataset, card, rows=clips, sources=sources, unit_rows=config.units.rows)
    into = f" make {len(clips)} clips" if len(clips) > len(rows) else ""
    _say(f"{len(rows)} rows{into}: {changed['added']} new, {changed['removed']} removed since the last run")

    # Prompts first, in their own pass over unique captions; then latents, one worker per unit.
    pending: dict[Family, list[Unit]] = {
        "prompts": pending_units(dataset, "prompts"),
        "latents": pending_units(dataset, "latents"),
    }
    run = run_units(dataset, config, card, pending) if any(pending.values()) else None

    # Rebuilt from commit records alone.
    index, quarantine = build_tables(dataset, card)
    replace(dataset.index_path, parquet_bytes(index))
    replace(dataset.quarantine_path, parquet_bytes(quarantine))
    asked = {"rows": len(rows), "clips": len(clips)}
    summary = summarize(dataset, config, card, asked=asked, index=index, quarantine=quarantine, run=run)
    replace(dataset.summary_path, (json.dumps(summary, indent=1) + "\n").encode())
    return summary, run is not None


def manifest_rows(config: PreprocessConfig) -> list[ManifestRow]:
    """The rows of the manifest, or of a folder; ManifestError listing every row that cannot be used."""
    rows, problems = split_rows(manifest_items(Path(config.manifest)))
    if problems:
        raise ManifestError(
            f"{config.manifest}: {len(problems)} of {len(rows) + len(problems)} rows cannot be used; mend or "
            f"remove them (`latentpress validate {config.manifest} -o good.jsonl` writes the others)",
            [str(problem) for problem in problems],
        )
    if not rows:
        raise ManifestError(f"{config.manifest} holds no rows")
    return rows


def manifest_items(manifest: Path) -> Iterator[ManifestRow | RowProblem]:
    """Rows of a manifest file, or of a folder of videos with captions."""
    yield from discover(manifest) if manifest.is_dir() else read_manifest(manifest)


def checked_encoder(config: PreprocessConfig) -> VideoEncoder:
    """The video encoder; ConfigError where it, or the model that `target` describes, cannot take a bucket."""
    video = load_video_encoder(config.video_encoder)
    check_buckets(
        config.buckets, video.geometry, target=config.target, text_length=config.text_encoder.max_length
    )
    return video


def wanted_card(config: PreprocessConfig) -> Card:
    """The card that this config asks for; ConfigError where an encoder cannot take a bucket."""
    video = checked_encoder(config)
    text = load_text_encoder(config.text_encoder)
    versions = {name: _version(name) for name in _VERSIONED}
    return make_card(
        config,
        video_fields=video.hard_fields(),
        text_fields=text.hard_fields(),
        scaling=video.scaling,
        geometry=video.geometry,
        versions={**versions, "python": platform.python_version()},
    )


def settle_card(dataset: Dataset, want: Card) -> Card:
    """Write the card of a new dataset, or hold the existing one against what is wanted."""
    path = card_path(dataset.root)
    if not path.exists():
        # A temp file is that of a run that was killed here, or is at this line now.
        if dataset.root.is_dir() and any(
            not entry.name.startswith((TEMP_PREFIX, path.name)) for entry in dataset.root.iterdir()
        ):
            raise StaleDatasetError(
                f"{dataset.root} is not empty and has no card.json, so it is not a latent dataset; "
                "give another --set output=FOLDER"
            )
        try:
            make_folder(dataset.root)
            commit_once(path, card_bytes(want))
        except OSError as error:
            raise ConfigError(f"output: {dataset.root} cannot be written: {error.strerror}") from error
    have = read_card(dataset.root)
    refuse_stale(dataset.root, have=have, want=want)
    for name, version in want.soft.items():
        if have.soft.get(name) != version:
            _say(f"note: {name} is {version}, the dataset was begun with {have.soft.get(name)}")
    return have


def run_units(
    dataset: Dataset, config: PreprocessConfig, card: Card, pending: dict[Family, list[Unit]]
) -> dict[str, Any]:
    """Run the pending units of both families; rates and seconds of this run."""
    folder = dataset.runs / time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    make_folder(folder)
    replace(folder / "config.toml", resolved_toml(config).encode())
    run: dict[str, Any] = {}
    with open_executor(config, card) as executor, (folder / "log.jsonl").open("a") as log:
        run["executor"] = {"kind": executor.name, "workers": executor.workers}
        for family, units in pending.items():
            tally = Tally(family, total=sum(len(unit.rows) for unit in units))
            for result in track(executor.run(units), tally):
                log.write(json.dumps(dataclasses.asdict(result)) + "\n")
                log.flush()
                _stop_early(tally, result)
            if units:
                run[family] = tally.summary(workers=executor.workers)
    return run


def _stop_early(tally: Tally, result: UnitResult) -> None:
    before = tally.done - result.kept - len(result.failures)
    if before < EARLY_STOP_ROWS <= tally.done and tally.unwanted * 2 > tally.done:
        reason, count = tally.reasons.most_common(1)[0]
        raise RunError(
            f"{tally.unwanted} of the first {tally.done} clips failed, {count} of them with {reason!r} "
            f"(such as {result.failures[0][1] if result.failures else 'earlier ones'}): "
            "this looks like a wrong config, so the run stopped. Look at one file with `latentpress validate`"
        )


def summarize(
    dataset: Dataset,
    config: PreprocessConfig,
    card: Card,
    *,
    asked: dict[str, int],
    index: pa.Table,
    quarantine: pa.Table,
    run: dict[str, Any] | None,
) -> dict[str, Any]:
    """`summary.json`: the dataset as it stands, and the last run that had work to do."""
    if run is None and dataset.summary_path.exists():
        run = json.loads(dataset.summary_path.read_bytes()).get("last_run")
    reasons = Counter(quarantine["reason"].to_pylist())
    gated = gated_failures(reasons)
    buckets = Counter(index["bucket"].to_pylist())
    return {
        **asked,
        "kept": index.num_rows,
        "quarantined": quarantine.num_rows,
        "quarantine_rate": round(gated / asked["clips"], 4),
        "reasons": dict(reasons.most_common()),
        "buckets": dict(buckets.most_common()),
        "num_tokens": sum(index["num_tokens"].to_pylist()),
        "fingerprint": card.fingerprint,
        "config_digest": config_digest(config),
        "bottleneck": run["latents"]["bottleneck"] if run and "latents" in run else None,
        "last_run": run,
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
