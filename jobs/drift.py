"""`latentpress inspect --drift`: what windows cut out of one clip's latents are worth for training.

In: a dataset folder and (optionally) a sample. Out: for every window of the curriculum that is shorter than
the clip, as the trainer would read it, its numbers, and a sentence for each kind of window. The source is
decoded and encoded again, so this also works where latents are stored rounded or as a draw.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from jobs.console import console, print_json, table
from jobs.inspect import choose_sample, rules_of
from pipeline.fidelity import Redecoder, card_encoder
from pipeline.windows import PLACES, SECONDS, Drift, drifts
from schemas.card import Card, read_card
from schemas.errors import EXIT_DONE, DatasetError
from schemas.windows import prefix_frames

_NO_MATTER = 1e-3
"""A difference far below the noise that training adds."""


def run(
    dataset: str | Path,
    *,
    sample: str | None,
    as_json: bool,
    config: Path | None = None,
    vae: str | None = None,
) -> int:
    """The subcommand's other face: measure, then say it. `config` and `vae` as of `jobs.inspect.run`."""
    result = measure(dataset, sample=sample, config=config, vae=vae)
    print_json(result) if as_json else _print(result)
    return EXIT_DONE


def measure(
    dataset: str | Path, *, sample: str | None = None, config: Path | None = None, vae: str | None = None
) -> dict[str, Any]:
    """The drift of one sample (`jobs.inspect.choose_sample`), JSON-able; DatasetError where its source cannot
    be read any more, or is shorter than every window."""
    card, (limits, sources) = read_card(dataset), rules_of(config)
    row = choose_sample(dataset, sample)
    encoder = card_encoder(dataset, card, vae=vae)
    with Redecoder(card, limits=limits, sources=sources) as redecoder:
        frames = redecoder.frames(row)
        if isinstance(frames, str):
            raise DatasetError(f"{row['source']}: {frames}; drift is measured on its frames")
        windows = {seconds: window_frames(row, card, seconds) for seconds in SECONDS}
        found = list(drifts(encoder, frames, windows=windows, tiled=card.is_tiled(row["bucket"])))
    if not found:
        raise DatasetError(
            f"sample {row['sample_id']} ({row['source']}) has {row['num_frames']} frames, and its window of "
            f"{SECONDS[0]:g} s holds all of them; name a longer one"
        )
    return {
        "sample_id": row["sample_id"],
        "source": row["source"],
        "encoder": encoder.name,
        "num_frames": row["num_frames"],
        "shape": row["shape"],
        "fps": row["effective_fps"],
        "windows": [asdict(each) for each in found],
        "meaning": meaning(found, segment_frames=card.geometry.segment_frames),
    }


def window_frames(row: dict[str, Any], card: Card, seconds: float) -> int:
    """Pixel frames that the trainer reads of a sample, by its index row, with `max_s` = `seconds`."""
    return int(
        prefix_frames(
            np.array(row["pts_s"]),
            np.array([0, row["num_frames"]]),
            fps=np.array([row["effective_fps"]]),
            max_s=seconds,
            frames=card.settings.frames,
            geometry=card.geometry,
        )[0]
    )


def meaning(found: list[Drift], *, segment_frames: int) -> dict[str, str]:
    """A sentence for each kind of window: what training on it would see. `segment_frames` as in Geometry."""
    inexact = [each for each in found if each.prefix]
    worst = max(each.prefix for each in found)
    if not inexact:
        prefix = "exact: at these lengths the start of the clip has the numbers that encoding it alone gives"
    else:
        lengths = ", ".join(f"{each.seconds:g} s" for each in inexact)
        prefix = f"not exact at {lengths}: up to {worst:.2g} from encoding the start alone"
        if worst > _NO_MATTER:
            prefix += "; the encoder takes its frames in other groups there, see docs/long.md for clip "
            prefix += "lengths that agree"
    interior = max(max(each.interior) for each in found)
    if segment_frames:
        exact = "exact" if not interior else f"up to {interior:.2g} from encoding them alone"
        return {
            "prefix": prefix,
            "slice": "not measured: only a window of whole pieces is one that encoding it alone could give",
            "segments": f"{exact}: pieces of {segment_frames} frames are encoded alone, so any window of "
            "whole pieces can be cut out",
        }
    firsts, lasts = zip(*((each.interior[0], each.interior[-1]) for each in found), strict=True)
    fades = "then it is the same" if max(lasts) < _NO_MATTER else f"at its last one {max(lasts):.2g}"
    return {
        "prefix": prefix,
        "slice": f"a window from the middle is {max(firsts):.2g} (root mean square) from encoding it alone "
        f"at its first latent frame, {fades}; what came before it is in those numbers",
        "segments": "not in this dataset: set video_encoder.segment_frames to cut anywhere between pieces",
    }


def _print(result: dict[str, Any]) -> None:
    frames, fps = result["num_frames"], result["fps"]
    console.print(
        f"{result['source']}  sample {result['sample_id']}: {frames} frames at {fps:.3g} frames/s, "
        f"{frames / fps:.1f} s, {result['shape'][0]} latent frames of {result['encoder']}"
    )
    rows = table(
        "window",
        ">frames",
        ">latent frames",
        ">prefix, largest",
        ">from the middle, at latent frame",
        *(f">{place}" for place in PLACES),
    )
    for each in (Drift(**{**window, "interior": tuple(window["interior"])}) for window in result["windows"]):
        shown = [f"{each.places[place]:.3g}" if place in each.places else "" for place in PLACES]
        prefix = f"{each.prefix:.3g}" if each.prefix else "exact"
        rows.add_row(
            f"{each.seconds:g} s",
            str(each.num_frames),
            str(each.latent_frames),
            prefix,
            str(each.first),
            *shown,
        )
    console.print(rows)
    console.print("1 is one standard deviation of the clip's latents; as training sees it:")
    for kind, sentence in result["meaning"].items():
        console.print(f'window = "{kind}": {sentence}')
