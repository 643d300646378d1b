"""`latentpress inspect`: one sample as a picture, source frames over what its latents decode to.

In: a dataset folder and (optionally) a sample. Out: a PNG and a JSON-able description, of what
`jobs.looking` saw.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jobs.console import print_json
from jobs.looking import Looker
from jobs.sheet import draw_sheet
from schemas.adoption import adoption_notes
from schemas.card import read_card
from schemas.config import LimitsConfig, PreprocessConfig, SourcesConfig
from schemas.errors import EXIT_DONE, DatasetError
from schemas.index import read_index, read_quarantine
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
    with Looker(dataset, card, limits=limits, sources=sources, vae=vae) as looker:
        look = looker.look(row)
        notes = [*look.notes, *adoption_notes(dataset)]
        output = Path(output or f"inspect-{row['sample_id'][:12]}.png")
        sheet = look.sheet(
            title=row["source"],
            details=" · ".join([*look.facts, *notes, *look.clip["notes"]]),
            caption=row["caption"],
        )
        output.parent.mkdir(parents=True, exist_ok=True)
        draw_sheet(sheet, columns=columns).save(output)
    psnr = look.psnr
    return {
        "sample_id": row["sample_id"],
        "source": row["source"],
        "caption": row["caption"],
        "shape": list(row["shape"]),
        "dtype": row["dtype"],
        "bucket": row["bucket"],
        "psnr": {"mean": float(np.mean(psnr)), "min": min(psnr), "per_frame": psnr} if psnr else None,
        "clip": look.clip,
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
