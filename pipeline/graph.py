"""The story of preprocessing, whole: mixed videos in, committed and indexed latent shards out.

    manifest -> rows -> card -> sources -> generation -> prompts units -> latents units -> index

The driver only ever holds small rows. Everything before the units is checked before work starts;
everything after is rebuilt from commit records, so running the same command again is the recovery.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections import Counter
from collections.abc import Collection, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from pipeline.adopting import require_same_numbers
from pipeline.commit import Committing, commit_once, is_scaffold, open_store, replace
from pipeline.discover import discover
from pipeline.executor import open_executor
from pipeline.fetch import Fetcher
from pipeline.foreman import stopped
from pipeline.generation import InTurn, Units, add_generation, known_sources, pending_units, split_into_clips
from pipeline.outlook import outlook
from pipeline.progress import EARLY_STOP_ROWS, EarlyStop, Tally, gated_failures, open_log, say, track
from pipeline.reindex import TableCounts, update_tables
from pipeline.source import identify
from pipeline.text_encode import load_text_encoder
from pipeline.tiling import must_try, tiling_fields, tried
from pipeline.video_encode import VideoEncoder, load_video_encoder
from schemas.adoption import adoption_record, difference_lines, read_adoptions, refuse_stale
from schemas.bucket import check_buckets
from schemas.card import Card, card_bytes, card_path, hard_differences, make_card, read_card
from schemas.config import PreprocessConfig, TextEncoderConfig, VideoEncoderConfig
from schemas.dataset import Dataset
from schemas.errors import ManifestError, RunError, StaleDatasetError
from schemas.history import History
from schemas.load import config_digest, resolved_toml
from schemas.manifest import ManifestRow, RowProblem, read_manifest, split_rows
from schemas.model_files import commit_of
from schemas.sample import Family
from schemas.scaling import most_latent_frames
from schemas.store import absolute

Encoder = TypeVar("Encoder", VideoEncoderConfig, TextEncoderConfig)
_VERSIONED = (
    *("latentpress", "torch", "av", "numpy", "diffusers", "transformers"),
    *("tokenizers", "sentencepiece", "ftfy", "regex", "beautifulsoup4"),  # what shapes text
)


def preprocess(config: PreprocessConfig, *, adopt: bool = False) -> tuple[dict[str, Any], bool]:
    """Run everything that is asked for and not yet committed; the summary, and whether anything ran.

    `adopt` goes on with settings other than the dataset's, where that can be, and leaves a record.
    """
    config = config.model_copy(update={"output": absolute(config.output)})
    dataset = Dataset(config.output)

    # Everything that can be wrong with what was asked is said before the first file is written.
    rows = manifest_rows(config)
    card = wanted_card(config)
    load_text_encoder(config.text_encoder).check()
    config = at_one_commit(config)
    refuse_foreign_folder(dataset)

    # How commits can be made here is tested before anything counts on it.
    with said_plainly(dataset), open_store(dataset.root) as committing:
        card = settle_card(dataset, config, card, adopt=adopt)

        # What was asked for before, read once; the tables as the last run should have left them.
        before = dataset.history()
        if len(before.live):
            update_tables(dataset, card, before)

        # Identity of every file, then one generation that holds what changed since the last run.
        known = known_sources(before)
        fetcher = Fetcher(config.sources, config.limits)
        paths = [row.path for row in rows]
        sources = identify(paths, mode=config.identity, known=known, limits=config.limits, fetcher=fetcher)
        clips = split_into_clips(rows, config, history=before, sources=sources)
        history, changes = add_generation(
            dataset, card, rows=clips, sources=sources, unit_rows=config.units.rows, history=before
        )
        say(str(outlook(dataset, changes, rows=len(rows), before=before, after=history)))

        # Prompts first, in their own pass over unique captions; then latents, one worker per unit.
        pending: dict[Family, Units] = {
            "prompts": pending_units(dataset, "prompts", history),
            "latents": pending_units(dataset, "latents", history),
        }
        run = None
        if any(pending.values()) or history.generations > before.generations:
            folder = begin_run(dataset, config)
        if any(pending.values()):
            run = run_units(dataset, config, card, pending, committing, folder=folder, history=history)

        # The tables follow from commit records alone; what another run asked for meanwhile counts too.
        after = dataset.history(history)
        have = update_tables(dataset, card, after)
        asked = {"rows": len(rows), "clips": len(clips)}
        summary = summarize(dataset, config, card, asked=asked, have=have, run=run)
        summary["asked_meanwhile"] = after.generations > history.generations
        replace(dataset.summary_path, (json.dumps(summary, indent=1) + "\n").encode())
    if run and run["stopped"]:
        raise RunError(run["stopped"])
    return summary, run is not None


@contextlib.contextmanager
def said_plainly(dataset: Dataset) -> Iterator[None]:
    """Turn an error of the dataset's file system into one sentence; what was begun can be resumed."""
    try:
        yield
    except OSError as error:
        raise stopped("the dataset cannot be written or read", error, where=str(dataset.root)) from error


def manifest_rows(config: PreprocessConfig) -> list[ManifestRow]:
    """The rows of the manifest, or of a folder; ManifestError listing every row that cannot be used."""
    rows, problems = split_rows(manifest_items(Path(config.manifest)), sources=config.sources)
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
        config.buckets,
        video.geometry,
        target=config.target,
        text_length=config.text_encoder.max_length,
        most_latent_frames=most_latent_frames(video.scaling, video.geometry.channels),
    )
    return video


def wanted_card(config: PreprocessConfig, *, have: Card | None = None, tiled: Collection[str] = ()) -> Card:
    """The card that this config asks for; ConfigError where an encoder cannot take a bucket.

    What the config leaves open, whether clips are encoded in tiles, is as in the card `have` of the dataset;
    without one, `tiled` names the buckets that are.
    """
    video = checked_encoder(config)
    text = load_text_encoder(config.text_encoder)
    return make_card(
        config,
        video_fields=video.hard_fields() | tiling_fields(config, video, have=have, tiled=tiled),
        text_fields=text.hard_fields(),
        scaling=video.scaling,
        geometry=video.geometry,
        image=video.image,
        image_scaling=video.image_scaling,
        versions=library_versions(),
    )


def at_one_commit(config: PreprocessConfig) -> PreprocessConfig:
    """The same with the commits that hub ids stand for here, so that all workers take these."""

    def pinned(encoder: Encoder) -> Encoder:
        commit = commit_of(encoder.model, encoder.revision)
        return encoder.model_copy(update={"revision": commit}) if commit else encoder

    return config.model_copy(
        update={
            "video_encoder": pinned(config.video_encoder),
            "text_encoder": pinned(config.text_encoder),
        }
    )


def refuse_foreign_folder(dataset: Dataset, *, option: str = "--set output=") -> None:
    """StaleDatasetError where the output folder holds other things than a dataset."""
    # A temp file is that of a run that was killed here, or is at work now; so is a card.
    if not card_path(dataset.root).exists() and dataset.root.is_dir():
        names = [entry.name for entry in dataset.root.iterdir()]
        if any(not is_scaffold(name) for name in names) and card_path(dataset.root).name not in names:
            raise StaleDatasetError(
                f"{dataset.root} is not empty and has no card.json, so it is not a latent dataset; "
                f"give another {option}FOLDER"
            )


def settle_card(dataset: Dataset, config: PreprocessConfig, want: Card, *, adopt: bool) -> Card:
    """Write the card of a new dataset, after what only a trial tells; or hold the one that is there against
    what is wanted."""
    if not card_path(dataset.root).exists():
        if must_try(config, want) and (tiled := tried(config, want)):
            say(f"note: one clip of {', '.join(tiled)} does not fit in memory as a whole: encoded in tiles")
            want = wanted_card(config, tiled=tiled)
        commit_once(card_path(dataset.root), card_bytes(want))
    have = read_card(dataset.root)
    want = wanted_card(config, have=have)
    if adopt:
        history = dataset.history()
        record = adoption_record(dataset.root, have=have, want=want, generation=history.generations)
        if record:
            if len(history.live):  # a run that was killed has left them behind
                update_tables(dataset, have, history)
            require_same_numbers(dataset, config, have=have, want=want)
            if not commit_once(*record):
                raise RunError(f"another run adopted settings for {dataset.root} just now; run this again")
    refuse_stale(dataset.root, have=have, want=want)
    if adopted := hard_differences(have, want):
        say(f"note: settings adopted in place of the dataset's:\n{difference_lines(adopted)}")
    kinds = (("video_encoder", config.video_encoder.kind), ("text_encoder", config.text_encoder.kind))
    if trial := [f"{name}.kind = {kind!r}" for name, kind in kinds if kind in ("dct", "tiny-t5")]:
        say(f"note: only for trials, since no published model reads what it makes: {', '.join(trial)}")
    for name, version in want.soft.items():
        if have.soft.get(name) != version:
            say(f"note: {name} is {version}, the dataset was begun with {have.soft.get(name)}")
    return have


def run_units(
    dataset: Dataset,
    config: PreprocessConfig,
    card: Card,
    pending: dict[Family, Units],
    committing: Committing,
    *,
    folder: Path,
    history: History,
) -> dict[str, Any]:
    """Run the pending units of both families; rates, seconds and protections of this run, and under
    `stopped` the sentence it was stopped with, if it was."""
    run: dict[str, Any] = {"stopped": None, "sandbox": {}}
    incidents: dict[Family, Counter[str]] = {}
    with open_log(folder) as log:

        def note(kind: str, sentence: str, family: Family | None) -> None:
            incidents[family or [*incidents][-1]][kind] += 1
            log({"incident": kind, "what": sentence})

        if "video_encoder.tiling" in card.hard["latents"]:
            log({"tiling": card.hard["latents"]["video_encoder.tiling"]})
        with open_executor(config, card, committing=committing, note=note) as executor:
            run["executor"] = {"kind": executor.name, "workers": executor.workers}
            # In two passes one encoder is in memory at a time; in one, nobody waits for the last prompts.
            passes: list[list[Family]] = [["prompts"], ["latents"]]
            if config.executor.together:
                passes = [["prompts", "latents"]]
            for families in passes:
                todo = {family: pending[family] for family in families if pending[family]}
                tallies = {f: Tally(f, total=todo[f].num_rows) for f in todo}
                incidents |= {f: tally.incidents for f, tally in tallies.items()}
                early = {
                    family: EarlyStop(
                        *committed_before(dataset, family, history), allowed=config.quarantine.max_rate
                    )
                    for family in todo
                }
                run["stopped"] = next(filter(None, (each.verdict() for each in early.values())), None)
                if run["stopped"]:
                    break
                results = executor.run(InTurn(list(todo.values())))
                for tally in tallies.values():
                    results = track(results, tally)
                for result in results:
                    if result.uncommitted is not None:
                        commit_once(dataset.commit_path(result.family, result.unit), result.uncommitted)
                    log(result.facts())
                    for kind, sentence in result.incidents:
                        note(kind, sentence, result.family)
                    run["sandbox"].update(result.protections)
                    early[result.family].add(result)
                    run["stopped"] = early[result.family].verdict()
                    if run["stopped"]:
                        break
                workers, gpus = executor.workers, executor.gpu_names
                run |= {f: tallies[f].summary(workers=workers, gpu_names=gpus) for f in tallies}
                if run["stopped"]:
                    break
    return run


def begin_run(dataset: Dataset, config: PreprocessConfig) -> Path:
    """The folder of this run, with the config that repeats it from any working folder."""
    folder = dataset.runs / f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{os.getpid()}"
    repeatable = config.model_copy(update={"manifest": absolute(config.manifest)})
    replace(folder / "config.toml", resolved_toml(repeatable).encode())
    return folder


def committed_before(dataset: Dataset, family: Family, history: History) -> tuple[int, Counter[str]]:
    """Clips that earlier runs kept and failed, of the first EARLY_STOP_ROWS; not those to be tried again."""
    kept, reasons, moved = 0, Counter[str](), history.earlier_units()
    for commit in dataset.commits(family, dataset.finished()[family][:EARLY_STOP_ROWS].tolist()):
        kept += len(commit.samples)
        reasons.update(f.reason for f in commit.quarantined if commit.unit not in moved.get(f.key, ()))
        if kept + reasons.total() >= EARLY_STOP_ROWS:
            break
    return kept, reasons


def summarize(
    dataset: Dataset,
    config: PreprocessConfig,
    card: Card,
    *,
    asked: dict[str, int],
    have: TableCounts,
    run: dict[str, Any] | None,
) -> dict[str, Any]:
    """`summary.json`: the dataset as it stands, and the last run that had work to do."""
    if run is None:
        run = last_run(dataset)
    clips = max(1, asked["clips"], have.kept + have.quarantined)
    return {
        **asked,
        "kept": have.kept,
        "quarantined": have.quarantined,
        "quarantine_rate": round(gated_failures(have.reasons) / clips, 4),
        "reasons": dict(have.reasons.most_common()),
        "buckets": dict(have.buckets.most_common()),
        "num_tokens": have.num_tokens,
        "fingerprint": card.fingerprint,
        "adopted": [record["fields"] for record in read_adoptions(dataset.root)],
        "config_digest": config_digest(config),
        "bottleneck": run["latents"]["bottleneck"] if run and "latents" in run else None,
        "last_run": run,
    }


def last_run(dataset: Dataset) -> dict[str, Any] | None:
    """What the summary that is there says of the last run; it can be made again, so damage is no error."""
    try:
        run: dict[str, Any] | None = json.loads(dataset.summary_path.read_bytes())["last_run"]
        return run
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def library_versions() -> dict[str, str]:
    """What goes into a card beside the settings, and only warns where it differs."""
    return {**{name: _version(name) for name in _VERSIONED}, "python": platform.python_version()}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
