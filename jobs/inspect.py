"""`latentpress inspect`: one sample as a picture, source frames over what its latents decode to.

In: a dataset folder and (optionally) a sample. Out: a PNG and a JSON-able description. The source is
decoded again, sandboxed, with the settings in the dataset's card, so the two rows differ by the encoder
alone; where the file is gone or another one, the latents are drawn without it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jobs.console import print_json
from jobs.sheet import Sheet, draw_sheet
from pipeline.fidelity import Redecoder, card_encoder, decode, frame_psnr
from schemas.adoption import adoption_notes
from schemas.card import Card, read_card
from schemas.codec import as_float32
from schemas.config import LimitsConfig, PreprocessConfig, SourcesConfig
from schemas.dataset import Dataset
from schemas.errors import EXIT_DONE, DatasetError
from schemas.index import read_index, read_quarantine, read_tensor
from schemas.load import load_config

_LISTED = 5
"""Samples named in an error."""


def run(
    dataset: str | Path,
    *,
    sample: str | None,
    output: Path | None,
    as_json: bool,
    config: Path | None = None,
    vae: str | None = None,
) -> int:
    """The subcommand: draw, then say where the picture is. `config` as of `rules_of`, `vae`
    where the dataset's video encoder is now."""
    result = inspect_sample(dataset, sample=sample, output=output, config=config, vae=vae)
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
    dataset: str | Path,
    *,
    sample: str | None = None,
    output: Path | None = None,
    columns: int = 8,
    config: Path | None = None,
    vae: str | None = None,
) -> dict[str, Any]:
    """Draw one sample to `output` (default: `inspect-<id>.png` in the current folder) and describe it.

    `sample` is the start of a sample id, or a source as the manifest gives it, its path or its file
    name; default: the first sample. `config` as of `rules_of`. DatasetError where there is no such sample
    or more than one.
    """
    card, (limits, sources) = read_card(dataset), rules_of(config)
    row = choose_sample(dataset, sample)
    clip = _clip_record(dataset, row)
    latents = read_tensor(dataset, row, card.latent_tensors[0])
    encoder = card_encoder(dataset, card, vae=vae)
    decoded = decode(encoder, as_float32(latents), tiled=card.is_tiled(row["bucket"]))
    with Redecoder(card, limits=limits, sources=sources) as redecoder:
        found = redecoder.frames(row)
    if not isinstance(found, str) and found.shape != decoded.shape:
        found = f"source now gives frames {found.shape}, the latents {decoded.shape}"
    source, notes = (None, [found]) if isinstance(found, str) else (found, [])
    notes += adoption_notes(dataset)
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


# ------------------------------------------------------------------------------ the sample


def rules_of(config: Path | None) -> tuple[LimitsConfig, SourcesConfig]:
    """How sources may be read again: as a preprocess config says, such as the dataset's, or by default."""
    if config is None:
        return LimitsConfig(), SourcesConfig()
    settings = load_config(config, PreprocessConfig)
    return settings.limits, settings.sources


def choose_sample(dataset: str | Path, sample: str | None) -> dict[str, Any]:
    """The index row of a sample, named as for `inspect_sample`."""
    table = read_index(dataset)
    rows: list[dict[str, Any]] = table.select(["sample_id", "source", "path"]).to_pylist()
    if not rows:
        raise DatasetError(f"{dataset} holds no samples; run `latentpress preprocess` with its config")
    if sample is None:
        named = [0]
    else:
        named = [i for i, row in enumerate(rows) if sample in _names(row)]
        named = named or [i for i, row in enumerate(rows) if row["sample_id"].startswith(sample)]
    found = {rows[i]["sample_id"]: i for i in named}
    if len(found) == 1:
        row: dict[str, Any] = table.slice(next(iter(found.values())), 1).to_pylist()[0]
        return row
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


def _clip_record(dataset: str | Path, row: dict[str, Any]) -> dict[str, Any]:
    """How the clip was decoded, from the commit record of its unit."""
    commit = Dataset(dataset).commit("latents", row["unit"])
    for sample in commit.samples if commit else ():
        if sample.key == row["sample_id"]:
            clip: dict[str, Any] = sample.meta["clip"]
            return clip
    raise DatasetError(
        f"unit {row['unit']} has no commit record of sample {row['sample_id']}; "
        f"run `latentpress verify {dataset}`"
    )


# ------------------------------------------------------------------------------- its words


def _facts(row: dict[str, Any], clip: dict[str, Any], card: Card) -> list[str]:
    stored = [
        f"{row['dtype']} latents {'x'.join(map(str, row['shape']))}",
        f"sample {row['sample_id'][:12]}",
    ]
    frames, resize = card.settings.frames, card.settings.resize
    if frames is None or resize is None:
        return [f"imported from {card.imported_from}", row["bucket"], *stored]
    turned = f" rotated {clip['rotation']}°" if clip["rotation"] else ""
    synthetic = {name: len(clip[name]) for name in ("interpolated", "duplicated", "repaired")}
    return [
        f"{clip['codec']} in {clip['container'].split(',')[0]}",
        f"{clip['source_width']}x{clip['source_height']}{turned}, {clip['source_fps']:.4g} fps, "
        f"{clip['duration_s']:.2f} s",
        f"{row['bucket']} {resize.mode}",
        f"{frames.policy} at {clip['effective_fps']:.3g} frames/s over {clip['coverage']:.0%} of the clip",
        *(f"{count} frames {name}" for name, count in synthetic.items() if count),
        *stored,
    ]


def _times(clip: dict[str, Any]) -> list[str]:
    """Source seconds per frame, and what is not a picture of the source."""
    marks = {i: name for name in ("duplicated", "interpolated", "repaired") for i in clip[name]}
    return [f"{seconds:.2f} s {marks.get(i, '')}".rstrip() for i, seconds in enumerate(clip["pts_s"])]
