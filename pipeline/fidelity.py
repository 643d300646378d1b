"""What stored latents are worth: one sample at a time, its source decoded again and held against them.

In: index rows of a dataset. Out: PSNR of what the latents decode to, and how far they lie from a fresh
encoding of the same source. The second number does not depend on how hard the content is, so it tells
latents that are stale or of other frames from latents of a difficult clip; the first also knows an encoder
that is wrong both times. A source is read only while it is, byte for byte, what was encoded.

F pixel frames, T latent frames, C channels, H, W pixels (frames) or latent cells.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.fetch import Fetcher
from pipeline.progress import say
from pipeline.sandbox import Clip, DecodeRequest, DecoderProcess
from pipeline.source import Source, same_content
from pipeline.starved import free_memory, is_starved
from pipeline.video_encode import VideoEncoder, load_video_encoder, stored_latents
from schemas.adoption import unlike_card
from schemas.bucket import clip_lengths
from schemas.card import Card
from schemas.codec import as_float32
from schemas.config import LimitsConfig, SourcesConfig
from schemas.errors import ClipError, ConfigError, DatasetError, RunError, StaleDatasetError
from schemas.history import positions
from schemas.index import index_rows, open_index, read_tensor
from schemas.scaling import scale
from schemas.store import is_url

PSNR_CEILING_DB = 100.0
"""Given to identical frames, whose PSNR is infinite."""
MAX_DIFFERENCE = 0.05
"""Largest accepted `Fidelity.difference`. Two neighbouring pictures of 17 in each other's place are above it
in 56 of 70 real clips at 192 x 288; the other 14 stand still there (below 0.022, six of them at 0)."""
MIN_PSNR_DB = 10.0
"""Lowest accepted mean PSNR of a sample by default. The codec `dct` gives white noise 10.8 dB and the worst
of 70 real clips 18.4 dB (192 x 288): what is below decodes to something else than its source."""


_NEEDED = (
    "sample_id",
    "source",
    "path",
    "source_digest",
    "start_s",
    "end_s",
    "clip",
    "shard",
    "dtype",
    "shape",
    "bucket",
)


@dataclass(frozen=True)
class Fidelity:
    """One sample against its source."""

    sample_id: str
    source: str
    psnr_db: float
    """Mean over its frames."""
    worst_frame_db: float
    difference: float
    """Stored against freshly encoded latents, as `latent_difference` has it; 1 where their shapes differ."""


@dataclass(frozen=True)
class NotCompared:
    """One sample whose source is not there any more, or cannot be read."""

    sample_id: str
    source: str
    note: str


class Redecoder:
    """Decodes the sources of a dataset again with its card's settings, in the sandbox; a context manager."""

    def __init__(self, card: Card, *, limits: LimitsConfig, sources: SourcesConfig) -> None:
        """`sources`: which remote videos may be fetched."""
        self._imported_from = card.imported_from
        self._fetcher = Fetcher(sources, limits)
        self._decoder = None if card.imported_from else _decoder(card, limits)
        self._held: Clip | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._decoder is not None:
            self._decoder.close()

    def frames(self, row: dict[str, Any]) -> np.ndarray | str:
        """uint8 [F, H, W, 3], valid until the next call; or why there are none."""
        if self._held is not None:
            self._held.release()
            self._held = None
        if self._decoder is None:
            return f"imported from a cache of {self._imported_from}, which does not say how frames were taken"
        path, listed = row["path"], Source(row["source_digest"], size=-1, mtime_ns=-1)
        if not is_url(path) and not Path(path).exists():
            return f"source file {path} is gone"
        try:
            if not is_url(path) and not same_content(path, listed):
                return "source file has changed since it was encoded"
            with self._fetcher.local(path, expect=listed) as local:
                self._decoder.submit(DecodeRequest(local.path, row["start_s"], row["end_s"], row["clip"]))
                self._held = self._decoder.result()
        except ClipError as error:
            return f"source cannot be decoded again: {error.message}"
        except (RunError, OSError) as error:
            return f"source cannot be read: {error}"
        return self._held.frames


def _decoder(card: Card, limits: LimitsConfig) -> DecoderProcess:
    """One that does what the card says; DatasetError where that is not known."""
    settings = card.settings
    frames, text = settings.frames, settings.text_encoder
    resize, picture, decode = settings.resize, settings.picture, settings.decode
    if frames is None or text is None or resize is None or picture is None or decode is None:
        raise DatasetError("the card of this dataset does not say how its frames were taken")
    return DecoderProcess(
        frames=frames,
        buckets=settings.buckets,
        lengths=clip_lengths(
            settings.buckets,
            card.geometry,
            frames=frames,
            target=settings.target,
            text_length=text.max_length,
        ),
        resize=resize,
        limits=limits,
        picture=picture,
        decode=decode,
        slots=1,
    )


def card_encoder(dataset: str | Path, card: Card, *, vae: str | None = None) -> VideoEncoder:
    """The encoder the card names, or the folder or hub id `vae`, where it now is; refused where its numbers
    mean something else."""
    # Where it ran, and whether compiled, is not what it means; image latents are not decoded.
    settings = card.settings.video_encoder.model_copy(
        update={"device": "auto", "compile": False, "image_latents": False}
    )
    if vae is not None:
        if settings.kind == "dct":
            raise ConfigError(
                f"--vae {vae}: {dataset} was encoded with dct, which has no files; leave it out"
            )
        settings = settings.model_copy(update={"model": vae, "revision": ""})
    try:
        encoder = load_video_encoder(settings)
    except ConfigError as error:
        raise DatasetError(
            f"{dataset}: its video encoder cannot be had: {error}; --vae FOLDER names where it is now"
        ) from error
    fields = {f"video_encoder.{field}": value for field, value in encoder.hard_fields().items()}
    for field, (made_with, value) in unlike_card(dataset, card, "latents", fields).items():
        raise StaleDatasetError(
            f"{dataset} was encoded with {field} = {made_with!r}, this is {value!r}: its latents cannot be "
            "decoded here; --vae FOLDER names the VAE they are of"
        )
    return encoder


def decode(encoder: VideoEncoder, latents: np.ndarray, *, tiled: bool) -> np.ndarray:
    """`encoder.decode`; in tiles, and with a note on stderr, where memory runs out without. RunError where
    that does not help."""
    for as_tiles in (False, True) if encoder.tiling_fields() and not tiled else (tiled,):
        try:
            return encoder.decode(latents, tiled=as_tiles)
        except Exception as error:
            if not is_starved(error):
                raise
            why = (str(error) or type(error).__name__).splitlines()[0]
        free_memory()  # outside of the handler, where nothing holds the error's tensors
        if not as_tiles and encoder.tiling_fields():
            say(f"note: decoding ran out of memory ({why}); decoded in tiles, which differ at their seams")
    raise RunError(
        f"decoding {'x'.join(map(str, latents.shape))} latents ran out of memory ({why}); free some, or run "
        "this with CUDA_VISIBLE_DEVICES= (empty), which gives video_encoder.device = 'cpu'"
    )


def choose_samples(
    dataset: str | Path, card: Card, count: int, *, also: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Index rows of `count` samples (all where there are fewer): the same ones every time, and as good as
    drawn by lot. Of columns what `compare` and `Redecoder` need, and `also`."""
    file = open_index(dataset)
    ids = file.read(columns=["sample_id"])["sample_id"]
    unique = pc.unique(ids)
    # An id is a hash, so its digits are the lot; the key makes it another one under another fingerprint.
    digits = pc.utf8_slice_codeunits(unique, 0, 8).to_numpy(zero_copy_only=False).astype("S8").view(">u8")
    key = int(hashlib.sha256(card.fingerprint.encode()).hexdigest()[:16], 16)
    chosen = unique.take(pa.array(np.argsort(digits ^ np.uint64(key), kind="stable")[:count]))
    names = [f"{card.latent_tensors[0]}_{field}" for field in ("offset", "nbytes", "checksum")]
    return index_rows(file, positions(chosen, among=ids), columns=[*_NEEDED, *names, *also])


def compare(
    dataset: str | Path,
    card: Card,
    rows: list[dict[str, Any]],
    *,
    limits: LimitsConfig,
    sources: SourcesConfig,
    encoder: VideoEncoder | None = None,
) -> Iterator[Fidelity | NotCompared]:
    """Every row against its source, in order; memory is that of one sample. `encoder`: unset, the card's."""
    encoder = encoder or card_encoder(dataset, card)
    with Redecoder(card, limits=limits, sources=sources) as redecoder:
        for row in rows:
            names = row["sample_id"], row["source"]
            frames = redecoder.frames(row)
            if isinstance(frames, str):
                yield NotCompared(*names, note=frames)
                continue
            stored = as_float32(read_tensor(dataset, row, card.latent_tensors[0]))
            fresh = _encoded(encoder, frames, card, row)
            if fresh.shape != stored.shape:
                yield Fidelity(*names, psnr_db=0.0, worst_frame_db=0.0, difference=1.0)
                continue
            psnr = frame_psnr(frames, decode(encoder, stored, tiled=card.is_tiled(row["bucket"])))
            mean = round(float(np.mean(psnr)), 2)
            yield Fidelity(*names, mean, min(psnr), latent_difference(stored, fresh, card))


def _encoded(encoder: VideoEncoder, frames: np.ndarray, card: Card, row: dict[str, Any]) -> np.ndarray:
    """What would be stored of `frames` today, float32 [T, C, H, W]."""
    moments = encoder.encode(frames[None], tiled=card.is_tiled(row["bucket"]))
    tensors = stored_latents(
        {name: value[0] for name, value in moments.items()},
        config=card.settings.video_encoder,
        seed=card.hard["latents"].get("seed", 0),
        sample_id=row["sample_id"],
    )
    return as_float32(tensors[card.latent_tensors[0]])


def latent_difference(stored: np.ndarray, fresh: np.ndarray, card: Card) -> float:
    """Root mean square difference of the worst latent frame of [T, C, H, W], after scaling.

    Scaled latents have about unit variance over many clips, so 1 is as far apart as unrelated clips are,
    and a still or grey clip is measured by the same ruler as any other.
    """
    error = scale(stored, card.scaling) - scale(fresh, card.scaling)
    return round(float(np.sqrt(np.mean(error**2, axis=(1, 2, 3))).max()), 5)


def frame_psnr(source: np.ndarray, decoded: np.ndarray) -> list[float]:
    """Decibels of each frame of uint8 [F, H, W, 3] against its source."""
    result = []
    for a, b in zip(source, decoded, strict=True):
        error = float(np.mean((a.astype(np.float32) - b) ** 2))
        result.append(min(PSNR_CEILING_DB, 10 * np.log10(255**2 / error)) if error else PSNR_CEILING_DB)
    return [round(float(value), 2) for value in result]
