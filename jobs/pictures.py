"""Samples as pictures: latents of a model and of the clips it was asked for in; a PNG sheet and an MP4 out.

Decoded by the encoder that the dataset's card names, as `inspect` does, and only while the pictures are made:
it is loaded anew each time, so that a training model has the memory to itself in between.

F pixel frames, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, ImageDraw

from jobs.console import count_of
from jobs.page import INK, PAPER, SOFT, Page, cell_size, enlarged, fitted, row_width, sheet_font, spread
from pipeline.fidelity import card_encoder, decode
from pipeline.starved import free_memory
from pipeline.video_encode import VideoEncoder
from schemas.card import Card, read_card
from schemas.index import read_index
from schemas.scaling import unscale
from schemas.train_config import TrainConfig
from trainer.packing import Segment
from trainer.sample import Sample

SHEET_NAME, VIDEO_NAME = "samples.png", "samples.mp4"
_COLUMNS = 8
"""Frames of a clip on the sheet."""
_GAP, _LINE, _MOST_FPS = 8, 24, 30
_MOST_CLIPS = 16
"""In a video: four by four, which any player takes. The sheet has them all."""
_UNTIMED_FPS = 8


@dataclass(frozen=True)
class Shown:
    """One clip and its sample, decoded."""

    caption: str
    source: str
    reference: np.ndarray
    """uint8 [F, H, W, 3]."""
    sample: np.ndarray
    """As `reference`."""
    fps: float
    """Frames per second of source time."""


def make_pictures(config: TrainConfig) -> DatasetPictures | None:
    """What shows a run's samples; None where it draws none. DatasetError where its encoder cannot be had."""
    if not config.validation.samples:
        return None
    return DatasetPictures([dataset.path for dataset in config.mixture])


class DatasetPictures:
    """Shows samples of clips of some datasets, whose latents mean the same."""

    def __init__(self, datasets: Sequence[str | Path]) -> None:
        self._datasets = datasets
        self._card = read_card(datasets[0])
        card_encoder(datasets[0], self._card)  # an encoder that is not there is told now, not after an hour

    def write(self, folder: Path, samples: Sequence[Sample]) -> None:
        """`samples.png` and `samples.mp4` in `folder`."""
        encoder = card_encoder(self._datasets[0], self._card)
        words = captions(self._datasets, [sample.reference for sample in samples])
        shown = []
        for sample, (caption, source) in zip(samples, words, strict=True):
            reference = _decoded(encoder, self._card, sample.reference.latents.numpy())
            seconds = sample.reference.seconds
            shown.append(
                Shown(
                    caption=caption,
                    source=source,
                    reference=reference,
                    sample=_decoded(encoder, self._card, sample.latents.numpy()),
                    fps=(len(reference) - 1) / seconds if seconds else _UNTIMED_FPS,
                )
            )
        del encoder
        free_memory()
        folder.mkdir(parents=True, exist_ok=True)
        draw_samples(shown, title=folder.name).save(folder / SHEET_NAME)
        write_video(shown, folder / VIDEO_NAME)


def captions(datasets: Sequence[str | Path], segments: Sequence[Segment]) -> list[tuple[str, str]]:
    """Caption and source of each segment; of a clip with several captions the one that its key names."""
    wanted = list({segment.sample_id for segment in segments})
    rows: dict[str, list[dict[str, Any]]] = {}
    for dataset in datasets:
        table = read_index(dataset, columns=["sample_id", "caption_digest", "caption", "source"])
        for row in table.filter(pc.is_in(table["sample_id"], pa.array(wanted))).to_pylist():
            rows.setdefault(row["sample_id"], []).append(row)
    found = []
    for segment in segments:
        known = rows[segment.sample_id]
        named = [row for row in known if row["caption_digest"] in segment.key]
        found.append(((named or known)[0]["caption"], (named or known)[0]["source"]))
    return found


def _decoded(encoder: VideoEncoder, card: Card, latents: np.ndarray) -> np.ndarray:
    """uint8 [F, H, W, 3] of scaled latents; in tiles where clips of this size were encoded in tiles."""
    spatial = card.geometry.spatial
    size = f"x{latents.shape[2] * spatial}x{latents.shape[3] * spatial}"
    buckets = card.hard["latents"].get("video_encoder.tiling") or {}
    tiled = any(name.endswith(size) and card.is_tiled(name) for name in buckets)
    return decode(encoder, unscale(latents, card.scaling), tiled=tiled)


def draw_samples(shown: Sequence[Shown], *, title: str) -> Image.Image:
    """The sheet: of each clip its caption, its frames, and the sample's under them."""
    rows = [
        (clip, spread(len(clip.reference), _COLUMNS), cell_size(*clip.reference.shape[2:0:-1]))
        for clip in shown
    ]
    page = Page(max(row_width(cell, columns=len(chosen)) for _, chosen, cell in rows))
    page.ends(title, count_of(len(shown), "clip"), size=24)
    page.paragraph(
        "Reference: the clip's own latents, decoded. Sample: drawn from its caption and noise.",
        size=15,
        color=SOFT,
        max_lines=2,
    )
    for clip, chosen, cell in rows:
        page.skip(14)
        page.paragraph(clip.caption, size=17, color=INK, max_lines=3)
        page.paragraph(f"{clip.source}, {clip.fps:.3g} frames/s", size=14, color=SOFT, max_lines=1)
        page.frames("reference", clip.reference[chosen], cell=cell)
        page.frames("sample", clip.sample[chosen], cell=cell)
        page.labels([f"{i / clip.fps:.2f} s" for i in chosen], cell=cell)
    return page.picture()


def write_video(shown: Sequence[Shown], path: Path) -> None:
    """The first clips, each beside its sample (right) at its own speed; short ones wait at their end."""
    shown = shown[:_MOST_CLIPS]
    cells = [cell_size(*clip.reference.shape[2:0:-1]) for clip in shown]
    width = 2 * max(cell[0] for cell in cells) + _GAP
    height = max(cell[1] for cell in cells) + _LINE
    columns = 1 if len(shown) < 3 else 2 if len(shown) < 9 else 4
    lines = -(-len(shown) // columns)
    size = (columns * (width + _GAP) + _GAP, lines * (height + _GAP) + _GAP)
    size = (size[0] + size[0] % 2, size[1] + size[1] % 2)  # what 4:2:0 takes
    fps = Fraction(min(_MOST_FPS, max(clip.fps for clip in shown))).limit_denominator(1000)
    seconds = max(len(clip.reference) / clip.fps for clip in shown)
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "18", "preset": "veryfast"})
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for number in range(max(1, round(seconds * fps))):
            picture = Image.new("RGB", size, PAPER)
            pen = ImageDraw.Draw(picture)
            for i, (clip, cell) in enumerate(zip(shown, cells, strict=True)):
                left = _GAP + i % columns * (width + _GAP)
                top = _GAP + i // columns * (height + _GAP)
                at = min(len(clip.reference) - 1, int(number / fps * clip.fps + 1e-6))
                font = sheet_font(14)
                pen.text((left, top), fitted(clip.caption, font, width), INK, font)
                picture.paste(enlarged(clip.reference[at], cell), (left, top + _LINE))
                picture.paste(enlarged(clip.sample[at], cell), (left + cell[0] + _GAP, top + _LINE))
            frame = av.VideoFrame.from_ndarray(np.asarray(picture))
            frame.pts, frame.time_base = number, 1 / fps
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
