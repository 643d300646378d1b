"""`latentpress inspect`: one sample as a picture, source frames over what its latents decode to.

In: a dataset folder and (optionally) a sample. Out: a PNG and a JSON-able description. The source is
decoded again with the settings in the dataset's card, so the two rows differ by the encoder alone;
where the file is gone, the latents are drawn without it.

F pixel frames, T latent frames, C channels, H, W pixels (frames) or latent cells.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from jobs.console import print_json
from jobs.sheet import Sheet, draw_sheet
from pipeline.decode import decode_clip
from pipeline.video_encode import VideoEncoder, load_video_encoder
from schemas.card import Card, read_card
from schemas.codec import as_float32
from schemas.config import LimitsConfig
from schemas.errors import EXIT_DONE, ClipError, DatasetError, StaleDatasetError
from schemas.index import read_index, read_quarantine, read_tensor

PSNR_CEILING_DB = 100.0
"""Given to identical frames, whose PSNR is infinite."""
_LISTED = 5
"""Samples named in an error."""


def run(dataset: Path, *, sample: str | None, output: Path | None, as_json: bool) -> int:
    """The subcommand: draw, then say where the picture is."""
    result = inspect_sample(dataset, sample=sample, output=output)
    if as_json:
        print_json(result)
        return EXIT_DONE
    print(f"{result['source']}  sample {result['sample_id']}  latents {result['shape']} {result['dtype']}")
    if result["psnr"]:
        print("PSNR {mean:.1f} dB mean, {min:.1f} dB worst frame".format(**result["psnr"]))
    for note in result["notes"]:
        print(f"note: {note}")
    print(f"wrote {result['png']}")
    return EXIT_DONE


def inspect_sample(
    dataset: Path, *, sample: str | None = None, output: Path | None = None, columns: int = 8
) -> dict[str, Any]:
    """Draw one sample to `output` (default: `inspect-<id>.png` in the current folder) and describe it.

    `sample` is the start of a sample id, or a source as the manifest gives it, its path or its file
    name; default: the first sample. DatasetError where there is no such sample or more than one.
    """
    card = read_card(dataset)
    row = _choose(dataset, sample)
    clip = _clip_record(dataset, row)
    latents = read_tensor(dataset, row, card.latent_tensors[0])
    decoded = _encoder(dataset, card).decode(as_float32(latents))
    source, notes = _source_frames(row, card, shape=decoded.shape)
    psnr = [] if source is None else frame_psnr(source, decoded)
    output = Path(output or f"inspect-{row['sample_id'][:12]}.png")
    sheet = Sheet(
        title=row["source"],
        score=f"PSNR {np.mean(psnr):.1f} dB, worst frame {min(psnr):.1f} dB" if psnr else "",
        details=" · ".join([*_facts(row, clip, card), *notes, *clip["notes"]]),
        caption=row["caption"],
        times=_times(clip),
        scores=[f"{value:.1f} dB" for value in psnr],
        decoded=decoded,
        source=source,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(sheet, columns=columns).save(output)
    return {
        "sample_id": row["sample_id"],
        "source": row["source"],
        "caption": row["caption"],
        "shape": list(latents.shape),
        "dtype": latents.dtype,
        "bucket": row["bucket"],
        "psnr": {"mean": float(np.mean(psnr)), "min": min(psnr), "per_frame": psnr} if psnr else None,
        "clip": clip,
        "notes": notes,
        "png": str(output),
    }


def frame_psnr(source: np.ndarray, decoded: np.ndarray) -> list[float]:
    """Decibels of each frame of uint8 [F, H, W, 3] against its source."""
    result = []
    for a, b in zip(source, decoded, strict=True):
        error = float(np.mean((a.astype(np.float32) - b) ** 2))
        result.append(min(PSNR_CEILING_DB, 10 * np.log10(255**2 / error)) if error else PSNR_CEILING_DB)
    return [round(float(value), 2) for value in result]


# ------------------------------------------------------------------------------ the sample


def _choose(dataset: Path, sample: str | None) -> dict[str, Any]:
    rows: list[dict[str, Any]] = read_index(dataset).to_pylist()
    if not rows:
        raise DatasetError(f"{dataset} holds no samples; run `latentpress preprocess` with its config")
    if sample is None:
        return rows[0]
    named = [row for row in rows if sample in _names(row)]
    found = {row["sample_id"]: row for row in named or rows if named or row["sample_id"].startswith(sample)}
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        listed = ", ".join(list(found)[:_LISTED])
        raise DatasetError(
            f"{sample!r} names {len(found)} samples of {dataset}; give the id of one: {listed}"
        )
    for row in read_quarantine(dataset).to_pylist():
        if sample in _names(row):
            raise DatasetError(f"{sample!r} was quarantined ({row['reason']}): {row['message']}")
    listed = ", ".join(f"{row['sample_id'][:12]} ({row['source']})" for row in rows[:_LISTED])
    raise DatasetError(f"{dataset} has no sample {sample!r}; it holds {len(rows)}, such as {listed}")


def _names(row: dict[str, Any]) -> tuple[str, ...]:
    """What a person may call a row's video."""
    source = Path(row["source"])
    return (row["source"], row.get("path", ""), source.name, source.stem)


def _clip_record(dataset: Path, row: dict[str, Any]) -> dict[str, Any]:
    """How the clip was decoded, from the `.json` beside its latents."""
    try:
        with tarfile.open(Path(dataset) / row["shard"]) as shard:
            member = shard.extractfile(f"{row['sample_id']}.json")
            assert member is not None, "written by the shard writer as a regular file"
            clip: dict[str, Any] = json.loads(member.read())["clip"]
            return clip
    except (OSError, KeyError, ValueError, tarfile.TarError) as error:
        raise DatasetError(
            f"shard {row['shard']}, sample {row['sample_id']}: its .json cannot be read ({error}); "
            f"run `latentpress verify {dataset}`"
        ) from error


def _encoder(dataset: Path, card: Card) -> VideoEncoder:
    """The encoder the card names; refused where this version's numbers mean something else."""
    encoder = load_video_encoder(card.settings.video_encoder)
    for field, value in encoder.hard_fields().items():
        made_with = card.hard["latents"].get(f"video_encoder.{field}")
        if made_with != value:
            raise StaleDatasetError(
                f"{dataset} was encoded with video_encoder.{field} = {made_with!r}, this is {value!r}: "
                "its latents cannot be decoded here"
            )
    return encoder


def _source_frames(
    row: dict[str, Any], card: Card, *, shape: tuple[int, ...]
) -> tuple[np.ndarray | None, list[str]]:
    """The source decoded again, or None and the reason why not."""
    if not Path(row["path"]).exists():
        return None, [f"source file {row['path']} is gone"]
    settings = card.settings
    try:
        frames, _, record = decode_clip(
            row["path"],
            start_s=row["start_s"],
            end_s=row["end_s"],
            clip=row["clip"],
            frames=settings.frames,
            buckets=settings.buckets,
            resize=settings.resize,
            picture=settings.picture,
            decode=settings.decode,
            limits=LimitsConfig(),
        )
    except ClipError as error:
        return None, [f"source cannot be decoded again: {error.message}"]
    if frames.shape != shape:
        return None, [f"source now gives frames {frames.shape}, the latents {shape}"]
    changed = list(record.pts_s) != row["pts_s"]
    return frames, ["source file has changed since it was encoded"] if changed else []


# ------------------------------------------------------------------------------- its words


def _facts(row: dict[str, Any], clip: dict[str, Any], card: Card) -> list[str]:
    turned = f" rotated {clip['rotation']}°" if clip["rotation"] else ""
    synthetic = {name: len(clip[name]) for name in ("interpolated", "duplicated", "repaired")}
    return [
        f"{clip['codec']} in {clip['container'].split(',')[0]}",
        f"{clip['source_width']}x{clip['source_height']}{turned}, {clip['source_fps']:.4g} fps, "
        f"{clip['duration_s']:.2f} s",
        f"{row['bucket']} {card.settings.resize.mode}",
        f"{card.settings.frames.policy} at {clip['effective_fps']:.3g} frames/s over "
        f"{clip['coverage']:.0%} of the clip",
        *(f"{count} frames {name}" for name, count in synthetic.items() if count),
        f"{row['dtype']} latents {'x'.join(map(str, row['shape']))}",
        f"sample {row['sample_id'][:12]}",
    ]


def _times(clip: dict[str, Any]) -> list[str]:
    """Source seconds per frame, and what is not a picture of the source."""
    marks = {i: name for name in ("duplicated", "interpolated", "repaired") for i in clip[name]}
    return [f"{seconds:.2f} s {marks.get(i, '')}".rstrip() for i, seconds in enumerate(clip["pts_s"])]
