"""The story of an import, whole: a cache of another trainer in, a dataset of ours out.

    cache -> listing -> survey -> card -> generation -> prompts units -> latents units -> index

As in `pipeline.graph`: everything that can be wrong with the cache is said before anything is written, commit
records alone say what is done, and running the same command again is the recovery.
"""

from __future__ import annotations

import functools
import json
import time
from typing import Any

from pipeline.commit import commit_once, open_store, replace
from pipeline.generation import add_generation, known_sources, pending_units
from pipeline.graph import library_versions, refuse_foreign_folder, said_plainly
from pipeline.imports.cache import Cache, Vae
from pipeline.imports.files import read_file
from pipeline.imports.meaning import Meaning, imported_card
from pipeline.imports.options import ImportOptions, as_named, open_cache
from pipeline.imports.rows import by_caption, identified, paired_rows, require_same_prompts
from pipeline.imports.survey import PromptFacts, survey_latents, survey_prompts
from pipeline.imports.units import Importer, Sources
from pipeline.progress import Tally, open_log, say, track
from pipeline.reindex import update_tables
from pipeline.text_encode import load_text_encoder
from pipeline.video_encode import load_video_encoder
from schemas.adoption import difference_lines
from schemas.card import Card, card_bytes, card_path, hard_differences, read_card
from schemas.config import TextEncoderConfig, VideoEncoderConfig
from schemas.dataset import Dataset
from schemas.errors import ConfigError, StaleDatasetError
from schemas.history import History
from schemas.index import lacks_empty_prompt
from schemas.model_files import find_model
from schemas.sample import Family
from schemas.store import absolute
from schemas.verdict import IMPORT_NAME

_WAN_TOKENS = 512
"""Rows that musubi-tuner's Wan text encoder runs over before it cuts pad rows off."""


def import_cache(options: ImportOptions) -> tuple[dict[str, Any], bool]:
    """Import what is not committed yet; the summary, and whether anything ran.

    ConfigError names the file and what to give where the cache cannot be known whole.
    """
    dataset = Dataset(absolute(options.output))

    # The VAE first: it alone knows channels, frame rule and scaling.
    video_config = VideoEncoderConfig(kind="diffusers", model=as_named(options.vae))
    video = load_video_encoder(video_config)
    vae = Vae(video.hard_fields()["class"], video.geometry.channels)

    # Every file is looked at before the first one is written.
    cache = open_cache(options, vae)
    listing = cache.listing()
    if not listing.clips:
        raise ConfigError(f"{options.source} holds no clips: {'; '.join(listing.notes) or 'is it a cache?'}")
    read = functools.partial(read_file, left_out=options.leave_out)
    latents = survey_latents(cache, listing.clips, read=read, geometry=video.geometry, scaling=video.scaling)
    prompts = survey_prompts(cache, listing.clips, read=read)
    text_config = _text_config(options.text_encoder, cache, prompts)
    text = load_text_encoder(text_config) if text_config else None
    _check_text(options.text_encoder, prompts)
    meaning = Meaning(
        options.format,
        listing.says,
        has_captions=any(clip.caption is not None for clip in listing.clips),
        fps=options.fps,
        left_out=options.leave_out,
    )
    card = imported_card(
        meaning,
        cache,
        latents=latents,
        prompts=prompts,
        video_config=video_config,
        video=video,
        text_config=text_config,
        text=text,
        versions=library_versions(),
    )
    for note in listing.notes:
        say(f"note: {note}")
    refuse_foreign_folder(dataset, option="-o ")

    with said_plainly(dataset), open_store(dataset.root) as committing:
        card = _settled(dataset, card)
        before = dataset.history()
        if len(before.live):
            update_tables(dataset, card, before)

        # Identity is the content of the latents' files; that of prompts is noted, to see them change.
        files = identified(listing, known_sources(before))
        clips = paired_rows(listing, files, root=options.source)
        rows = [row for row, _ in clips]
        require_same_prompts(
            clips, before, dataset, prompt=lambda clip: cache.prompt([read(path) for path in clip.prompt])
        )
        history, _ = add_generation(
            dataset, card, rows=rows, sources=files, unit_rows=options.unit_rows, history=before
        )
        importer = Importer(
            dataset,
            card,
            cache,
            Sources(
                clips={str(clip.path): clip for clip in listing.clips},
                prompts=by_caption(listing, clips),
                text=text,
                masked=prompts.masked,
            ),
            read=functools.partial(read, whole=True),
            fps=options.fps,
            committing=committing,
        )
        run = _run(importer, dataset, history, options)
        have = update_tables(dataset, card, dataset.history(history))
        summary = {
            "rows": len(rows),
            "kept": have.kept,
            "quarantined": have.quarantined,
            "reasons": dict(have.reasons.most_common()),
            "buckets": dict(have.buckets.most_common()),
            "num_tokens": have.num_tokens,
            "fingerprint": card.fingerprint,
            "empty_prompt": not lacks_empty_prompt(dataset.root),
            "notes": list(listing.notes),
            "stored": card.stored,
            "imported_from": card.hard["latents"]["imported_from"],
        }
        replace(dataset.summary_path, (json.dumps(summary, indent=1) + "\n").encode())
    return summary, run


def _text_config(model: str | None, cache: Cache, prompts: PromptFacts) -> TextEncoderConfig | None:
    if model is None:
        return None
    return TextEncoderConfig(
        kind="t5",
        model=as_named(model),
        family=cache.text_family,
        max_length=prompts.length or _WAN_TOKENS,
        padding=cache.padding,
        dtype=prompts.dtype,
        compute_dtype=prompts.dtype,
    )


def _check_text(model: str | None, prompts: PromptFacts) -> None:
    if model is None:
        return
    files = find_model(model, subfolder="text_encoder", key="--text-encoder", weights="model")
    if files.config.get("d_model") != prompts.width:
        raise ConfigError(
            f"--text-encoder gives embeddings {files.config.get('d_model')} wide, those of the cache are "
            f"{prompts.width}: give the encoder they were made with"
        )


def _settled(dataset: Dataset, want: Card) -> Card:
    """The card of a new dataset, or the one that is there; StaleDatasetError where it says something else."""
    if not card_path(dataset.root).exists():
        commit_once(card_path(dataset.root), card_bytes(want))
    have = read_card(dataset.root)
    if differences := hard_differences(have, want):
        raise StaleDatasetError(
            f"{dataset.root} holds something else than this import would give:\n"
            f"{difference_lines(differences)}\nimport with the same options, or into another folder",
            differences,
        )
    return have


def _run(importer: Importer, dataset: Dataset, history: History, options: ImportOptions) -> bool:
    """Make what is pending; whether there was anything."""
    families: tuple[Family, ...] = ("prompts", "latents")
    pending = {family: pending_units(dataset, family, history) for family in families}
    if not any(pending.values()):
        return False
    folder = dataset.runs / f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-import"
    replace(folder / IMPORT_NAME, json.dumps({"arguments": options.arguments()}).encode())
    with open_log(folder) as log:
        for family in families:
            units = pending[family]
            lost = _lost(dataset, history) if family == "latents" and units else set()
            tally = Tally(family, total=units.num_rows)
            for result in track((importer.run(unit, lost=lost) for unit in units), tally):
                if result.uncommitted is not None:
                    commit_once(dataset.commit_path(family, result.unit), result.uncommitted)
                log(result.facts())
    return True


def _lost(dataset: Dataset, history: History) -> set[str]:
    """Samples of captions whose embeddings could not be imported."""
    commits = dataset.commits("prompts", dataset.finished()["prompts"].tolist())
    failed = {failure.key for commit in commits for failure in commit.quarantined}
    live = history.live_table(["sample_id", "caption_digest"]).to_pylist()
    return {row["sample_id"] for row in live if row["caption_digest"] in failed}
