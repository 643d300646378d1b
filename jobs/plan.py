"""`latentpress plan`: what preprocess would do, told before anything is written.

What changed in a dataset that is there already, clips per bucket, drops with reasons, tokens, disk for
latents and prompts, and an estimate of time and memory from a few clips decoded and encoded for trial.
"""

from __future__ import annotations

import math
import os
import resource
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jobs.console import Pace, console, count_of, count_table, duration, print_json, size, table
from jobs.growth import Growth, other_settings, say_other_settings
from jobs.report import clip_counts, lengths_told, note_length, window_s
from pipeline.clip import Placed
from pipeline.executor import uses_ray
from pipeline.graph import manifest_rows, wanted_card
from pipeline.progress import gated_failures
from pipeline.sandbox import DecodeRequest, DecoderProcess, decode_settings
from pipeline.starved import is_starved
from pipeline.survey import survey
from pipeline.text_encode import load_text_encoder
from pipeline.tiling import must_try
from pipeline.video_encode import load_video_encoder
from schemas.bucket import bucket_name, video_tokens
from schemas.card import Card, card_path, read_card
from schemas.codec import DTYPES, TAGS
from schemas.config import AT_A_RATE, BucketConfig, ExecutorConfig, PreprocessConfig
from schemas.dataset import Dataset
from schemas.errors import EXIT_DONE, EXIT_GATE, EXIT_USAGE, ClipError
from schemas.load import load_config
from schemas.manifest import ManifestRow

_TRIALS = 3
_SHOWN = 20
_CAPTIONS = 1024
"""Counted at once."""
_FOUND_OUT = "found out at the start, with one clip of each bucket"


class _Chosen(NamedTuple):
    """A row that is kept."""

    row: ManifestRow
    shape: BucketConfig
    """Of each of its clips: the bucket's, with the clip's own number of frames."""
    num_clips: int

    @property
    def num_frames(self) -> int:
        """Of all its clips."""
        return self.shape.num_frames * self.num_clips


def plan(config_path: Path, *, overrides: Sequence[str], as_json: bool, adopt: bool = False) -> int:
    """Plan the run of a config; the exit code of the command. `adopt` as for preprocess."""
    config = load_config(config_path, PreprocessConfig, overrides=overrides)
    dataset = Dataset(config.output)
    have = read_card(dataset.root) if card_path(dataset.root).exists() else None
    card = wanted_card(config, have=have)
    rows = manifest_rows(config)
    if have is not None:
        if differs := other_settings(dataset, have=have, want=card, adopt=adopt):
            print_json({"other_settings": differs}) if as_json else say_other_settings(dataset, differs)
            return EXIT_USAGE
        card = have

    buckets: Counter[str] = Counter()
    drops: Counter[str] = Counter()
    notes: list[dict[str, Any]] = []
    dropped: list[dict[str, Any]] = []
    chosen: list[_Chosen] = []
    looked: dict[int, Placed | ClipError] = {}
    lengths: dict[str, tuple[int, int]] = {}
    counts: Counter[str] = Counter(clips=0, shorter_than_bucket=0, slowed_beyond_2x=0)
    leftover = 0.0
    pace = Pace("rows")
    for number, (row, found) in enumerate(survey(rows, config), 1):
        pace.tick(number, f"{len(dropped)} dropped")
        looked[row.number] = found
        if isinstance(found, ClipError):
            drops[found.reason] += 1
            dropped.append(
                {"row": row.number, "source": row.source, "reason": found.reason, "message": found.message}
            )
            continue
        bucket = config.buckets[found.bucket]
        counts.update(clip_counts(found, config))
        note_length(lengths, found, config)
        notes += [{"row": row.number, "source": row.source, "message": note} for note in found.notes]
        leftover += _leftover_s(row, found, config)
        buckets[bucket_name(bucket)] += found.num_clips
        shape = bucket.model_copy(update={"num_frames": found.num_frames})
        chosen.append(_Chosen(row, shape, found.num_clips))

    tiling = card.hard["latents"].get("video_encoder.tiling")
    growth = Growth(dataset, card, config, rows, looked)
    done, failed = growth.done()
    captions = ["", *dict.fromkeys(row.caption for row in rows)]
    prompts_bytes, captions_cut = _prompts(captions, config)
    report: dict[str, Any] = {
        "rows": len(rows),
        "kept_rows": len(chosen),
        "clips": counts["clips"],
        "frames": sum(each.num_frames for each in chosen),
        "frames_per_clip": lengths,
        "changes": growth.outlook.as_dict(),
        "stale": growth.stale(),
        "already_done": done,
        "already_quarantined": failed,
        "buckets": dict(buckets.most_common()),
        "tiling": _FOUND_OUT if have is None and must_try(config, card) else tiling,
        "drops": dict(drops.most_common()),
        "dropped": dropped,
        "shorter_than_bucket": counts["shorter_than_bucket"],
        "slowed_beyond_2x": counts["slowed_beyond_2x"],
        "leftover_s": round(leftover, 3),
        "notes": notes,
        "captions": len(captions) - 1,
        "captions_cut": captions_cut,
        "video_tokens": sum(
            video_tokens(card.geometry.latent_shape(each.shape)) * each.num_clips for each in chosen
        ),
        "latents_bytes": sum(_latent_bytes(each.shape, card) * each.num_clips for each in _once(chosen)),
        "prompts_bytes": prompts_bytes,
        **_estimate(chosen, config, card, remaining=counts["clips"] - done),
    }
    print_json(report) if as_json else _print(report, config, growth)
    if config.frames.short == "error" and drops["too_short"]:
        if not as_json:
            console.print("frames.short = 'error': preprocess would stop at the first row that is too short")
        return EXIT_GATE
    return EXIT_GATE if gated_failures(drops) > config.quarantine.max_rate * len(rows) else EXIT_DONE


def _leftover_s(row: ManifestRow, placed: Placed, config: PreprocessConfig) -> float:
    """Seconds of a row that no clip of it shows; the policies that show the whole row leave nothing."""
    frames, num_frames = config.frames, placed.num_frames
    if frames.policy not in AT_A_RATE:
        return 0.0
    step = frames.slide_step if frames.clips == "slide" else num_frames
    used = (placed.num_clips - 1) * min(step, num_frames) + num_frames
    return window_s(row, placed) * max(0, placed.num_available - used) / max(1, placed.num_available)


def _once(chosen: Sequence[_Chosen]) -> list[_Chosen]:
    """Without the rows that share the latents of another, such as those of several captions of a clip."""
    return list({(each.row.path, each.row.start_s, each.row.end_s): each for each in chosen}.values())


def _latent_bytes(shape: BucketConfig, card: Card) -> int:
    item = DTYPES[TAGS[card.settings.video_encoder.dtype]].itemsize
    return int(np.prod(card.geometry.latent_shape(shape))) * item * len(card.latent_tensors)


def _prompts(captions: Sequence[str], config: PreprocessConfig) -> tuple[int, int]:
    """Bytes of the stored prompts, and how many captions are cut; from their tokens alone."""
    text, most = load_text_encoder(config.text_encoder), config.text_encoder.max_length
    starts = range(0, len(captions), _CAPTIONS)
    tokens = [n for i in starts for n in text.count_tokens(captions[i : i + _CAPTIONS])]
    full = config.text_encoder.padding == "full"
    rows = sum(most if full else min(n, most) for n in tokens)
    return rows * text.row_bytes(), sum(n > most for n in tokens)


def _estimate(
    chosen: Sequence[_Chosen], config: PreprocessConfig, card: Card, *, remaining: int
) -> dict[str, Any]:
    """Seconds that the latents take and bytes of memory, from trial clips spread over the manifest; time goes
    by frames. The first clip warms up: it counts only where it is the one."""
    encoder = load_video_encoder(config.video_encoder)
    decode_s, encode_s = list[float](), list[float]()
    step = max(1, len(chosen) // _TRIALS)
    with DecoderProcess(**decode_settings(config)) as decoder:
        for row, _, _ in chosen[step // 2 :: step][:_TRIALS]:
            decoder.submit(DecodeRequest(row.path, start_s=row.start_s, end_s=row.end_s, clip=0))
            try:
                clip = decoder.result()
            except ClipError:
                continue
            tiled = card.is_tiled(bucket_name(config.buckets[clip.bucket]))
            try:
                encoder.load()
                started = time.perf_counter()
                encoder.encode(clip.frames[None], tiled=tiled)
            except Exception as error:
                if not is_starved(error):
                    raise
                break  # the run finds out what fits
            encode_s.append((time.perf_counter() - started) / len(clip.frames))
            decode_s.append(clip.decode_s / len(clip.frames))
            clip.release()
    clips = sum(each.num_clips for each in chosen)
    frames = remaining * sum(each.num_frames for each in chosen) / max(1, clips)
    seconds = None
    if encode_s:
        encode_s = encode_s[1:] or encode_s
        seconds = frames * pace(statistics.median(decode_s), statistics.median(encode_s), config.executor)
    of_worker_and_child = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    peak = 1024 * sum(resource.getrusage(who).ru_maxrss for who in of_worker_and_child)
    return {
        "trial_clips": len(decode_s),
        "estimated_s": seconds and round(seconds, 1),
        "estimated_memory_bytes": peak * config.executor.workers,
    }


def pace(decode_s: float, encode_s: float, settings: ExecutorConfig) -> float:
    """Seconds of a run for what takes one decoder and one encoder so long: they work beside each other, so
    the slower of the two sets it, and on this machine its cores."""
    workers = settings.workers if uses_ray(settings) else 1
    cores = math.inf if settings.address else os.cpu_count() or 1
    decoders = settings.decode_actors or workers * (settings.decoders_per_worker or 0) or cores
    return max(encode_s / workers, decode_s / decoders, (decode_s + encode_s) / cores)


def _print(report: dict[str, Any], config: PreprocessConfig, growth: Growth) -> None:
    console.print(str(growth.outlook))
    for each in report["stale"][:_SHOWN]:
        console.print(f"  row {each['row']}  {each['source']}: {each['cause']}: {each['runs']}")
    if len(report["stale"]) > _SHOWN:
        console.print(f"  ... and {len(report['stale']) - _SHOWN} more (--json lists all)")
    if report["clips"]:
        console.print(count_table("bucket", report["buckets"]))
    if report["tiling"]:
        console.print(f"encoded in tiles: {_tiled(report['tiling'])}")
    if report["drops"]:
        console.print(count_table("dropped", report["drops"], unit="rows"))
        _print_rows(report["dropped"])
    if report["notes"]:
        console.print("to know of kept rows")
        _print_rows(report["notes"])
    facts = table("", "")
    into = f"{report['kept_rows']} kept, " if report["drops"] else ""
    done = f", {report['already_done']} done already" if report["already_done"] else ""
    if report["already_quarantined"]:
        done += f", {report['already_quarantined']} of them quarantined and not tried again"
    facts.add_row("rows", f"{report['rows']} ({into}{count_of(report['clips'], 'clip')}{done})")
    facts.add_row(
        "shorter than a clip",
        f"{count_of(report['shorter_than_bucket'], 'row')} (frames.short = {config.frames.short!r}), "
        f"{report['slowed_beyond_2x']} of them slowed beyond 2x",
    )
    if config.frames.policy in AT_A_RATE:
        facts.add_row("in no clip", f"{duration(report['leftover_s'])} of video at the ends of rows")
    if config.frames.clips == "whole" and report["frames_per_clip"]:
        facts.add_row("frames", f"{report['frames']:,}")
        facts.add_row("frames a clip", lengths_told(report["frames_per_clip"]))
    if report["captions_cut"]:
        most = config.text_encoder.max_length
        facts.add_row("captions", f"{report['captions_cut']} of {report['captions']} cut to {most} tokens")
    facts.add_row("video tokens", f"{report['video_tokens']:,}")
    facts.add_row("disk", f"latents {size(report['latents_bytes'])}, prompts {size(report['prompts_bytes'])}")
    if report["estimated_s"] is not None:
        workers = config.executor.workers
        facts.add_row(
            "estimate",
            f"{duration(report['estimated_s'])} for the latents with {count_of(workers, 'worker')} and about "
            f"{size(report['estimated_memory_bytes'])} of memory "
            f"(from {count_of(report['trial_clips'], 'trial clip')})",
        )
    console.print(facts)


def _tiled(tiling: str | dict[str, Any]) -> str:
    """Names of the buckets that are, or when that is known."""
    if isinstance(tiling, str):
        return tiling
    return ", ".join(name for name, sizes in tiling.items() if sizes) or "no bucket"


def _print_rows(rows: Sequence[dict[str, Any]]) -> None:
    for row in rows[:_SHOWN]:
        console.print(f"  row {row['row']}  {row['source']}: {row['message']}")
    if len(rows) > _SHOWN:
        console.print(f"  ... and {len(rows) - _SHOWN} more (--json lists all)")
