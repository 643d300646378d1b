"""`latentpress plan`: what preprocess would do, told before anything is written.

Clips per bucket, drops with reasons, tokens, disk for latents and prompts, and an estimate of time
and memory from a few clips decoded and encoded for trial.
"""

from __future__ import annotations

import os
import resource
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jobs.console import console, count_table, duration, print_json, size, table
from pipeline.graph import manifest_rows, wanted_card
from pipeline.progress import gated_failures
from pipeline.sandbox import DecodeRequest, DecoderProcess
from pipeline.survey import survey
from pipeline.text_encode import load_text_encoder
from pipeline.video_encode import load_video_encoder
from schemas.bucket import bucket_name, video_tokens
from schemas.card import Card, card_path, read_card, refuse_stale
from schemas.codec import DTYPES, TAGS
from schemas.config import BucketConfig, PreprocessConfig
from schemas.dataset import Dataset, generation_key
from schemas.errors import EXIT_DONE, EXIT_GATE, ClipError
from schemas.load import load_config
from schemas.manifest import ManifestRow

_TRIALS = 3


def plan(config_path: Path, *, overrides: Sequence[str], as_json: bool) -> int:
    """Plan the run of a config; the exit code of the command."""
    config = load_config(config_path, PreprocessConfig, overrides=overrides)
    rows = manifest_rows(config)
    card = wanted_card(config)
    dataset = Dataset(config.output)
    if card_path(dataset.root).exists():
        refuse_stale(dataset.root, have=read_card(dataset.root), want=card)

    buckets: Counter[str] = Counter()
    drops: Counter[str] = Counter()
    dropped: list[dict[str, Any]] = []
    chosen: list[tuple[ManifestRow, BucketConfig]] = []
    short = 0
    for row, found in survey(rows, config):
        if isinstance(found, ClipError):
            drops[found.reason] += 1
            dropped.append(
                {"row": row.number, "source": row.source, "reason": found.reason, "message": found.message}
            )
            continue
        short += found.num_available < found.bucket.num_frames
        buckets[bucket_name(found.bucket)] += 1
        chosen.append((row, found.bucket))

    done = _done(dataset, chosen)
    captions = list(dict.fromkeys(row.caption for row in rows))
    report: dict[str, Any] = {
        "rows": len(rows),
        "clips": len(chosen),
        "already_done": done,
        "buckets": dict(buckets.most_common()),
        "drops": dict(drops.most_common()),
        "dropped": dropped,
        "shorter_than_bucket": short,
        "captions": len(captions),
        "video_tokens": sum(video_tokens(card.geometry.latent_shape(bucket)) for _, bucket in chosen),
        "latents_bytes": sum(_latent_bytes(bucket, card) for _, bucket in chosen),
        "prompts_bytes": _prompt_bytes(captions, config),
        **_estimate(chosen, config, remaining=len(chosen) - done),
    }
    print_json(report) if as_json else _print(report, config)
    return EXIT_GATE if gated_failures(drops) > config.quarantine.max_rate * len(rows) else EXIT_DONE


def _done(dataset: Dataset, chosen: Sequence[tuple[ManifestRow, BucketConfig]]) -> int:
    """Rows that are committed and whose file has not been touched since."""
    live = {generation_key(row): row for row in dataset.live_rows()}
    done = 0
    for row, _ in chosen:
        asked = live.get(row.key)
        if asked is None:
            continue
        stat = os.stat(row.path)
        committed = (
            dataset.commit_path("latents", asked["unit"]).exists()
            and dataset.commit_path("prompts", asked["prompt_unit"]).exists()
        )
        done += committed and (stat.st_size, stat.st_mtime_ns) == (asked["size"], asked["mtime_ns"])
    return done


def _latent_bytes(bucket: BucketConfig, card: Card) -> int:
    item = DTYPES[TAGS[card.settings.video_encoder.dtype]].itemsize
    return int(np.prod(card.geometry.latent_shape(bucket))) * item * len(card.latent_tensors)


def _prompt_bytes(captions: Sequence[str], config: PreprocessConfig) -> int:
    """Measured on a few captions; exact with padding = "full"."""
    trial = captions[:: max(1, len(captions) // 16)]
    encodings = load_text_encoder(config.text_encoder).encode(trial)
    mean = statistics.fmean(sum(t.data.nbytes for t in encoding.tensors.values()) for encoding in encodings)
    return round(mean * len(captions))


def _estimate(
    chosen: Sequence[tuple[ManifestRow, BucketConfig]], config: PreprocessConfig, *, remaining: int
) -> dict[str, Any]:
    """Seconds and bytes of memory, from trial clips spread over the manifest."""
    encoder = load_video_encoder(config.video_encoder)
    spent = []
    step = max(1, len(chosen) // _TRIALS)
    with DecoderProcess(
        frames=config.frames, buckets=config.buckets, resize=config.resize, limits=config.limits
    ) as decoder:
        for row, _ in chosen[step // 2 :: step][:_TRIALS]:
            decoder.submit(DecodeRequest(row.path, start_s=row.start_s, end_s=row.end_s))
            try:
                clip = decoder.result()
            except ClipError:
                continue
            started = time.perf_counter()
            encoder.encode(clip.frames[None])
            spent.append(clip.decode_s + time.perf_counter() - started)
            clip.release()
    parallel = min(config.executor.workers, os.cpu_count() or 1)
    seconds = statistics.median(spent) * remaining / parallel if spent else None
    of_worker_and_child = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    peak = 1024 * sum(resource.getrusage(who).ru_maxrss for who in of_worker_and_child)
    return {
        "trial_clips": len(spent),
        "estimated_s": seconds and round(seconds, 1),
        "estimated_memory_bytes": peak * config.executor.workers,
    }


def _print(report: dict[str, Any], config: PreprocessConfig) -> None:
    console.print(count_table("bucket", report["buckets"]))
    if report["drops"]:
        console.print(count_table("dropped", report["drops"]))
        for drop in report["dropped"][:20]:
            console.print(f"  row {drop['row']}  {drop['source']}: {drop['message']}")
    facts = table("", "")
    facts.add_row(
        "rows", f"{report['rows']} ({report['clips']} clips, {report['already_done']} done already)"
    )
    facts.add_row(
        "shorter than bucket", f"{report['shorter_than_bucket']} (frames.short = {config.frames.short!r})"
    )
    facts.add_row("video tokens", f"{report['video_tokens']:,}")
    facts.add_row("disk", f"latents {size(report['latents_bytes'])}, prompts {size(report['prompts_bytes'])}")
    if report["estimated_s"] is not None:
        workers = config.executor.workers
        facts.add_row(
            "estimate",
            f"{duration(report['estimated_s'])} with {workers} workers and about "
            f"{size(report['estimated_memory_bytes'])} of memory (from {report['trial_clips']} trial clips)",
        )
    console.print(facts)
