"""The reader: a visit of the plan in, one Segment out, by one read a tensor at the offsets of the index.

No container is parsed and nothing is unpickled: a tensor is one read into a buffer that its thread uses
over and over, and a window is a shorter read further in, since payloads are time-major. Checksums cover
whole payloads: the first visit of half a payload or more reads all of it, once a run, and smaller windows are
not held against them, which would cost many times their own bytes. NaN and Inf are looked for every time. Any
number of threads reads at once. The price of exactness is the posterior draw: normal numbers that depend on
the visit alone cost several times what reading does.

T latent frames, C channels, H, W latent pixels, S prompt tokens, D prompt width.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable
from math import prod

import numpy as np
import torch

from schemas.card import Card
from schemas.codec import DTYPES, as_float32, checksum
from schemas.errors import ConfigError, DatasetError, RunError
from schemas.index import read_empty_prompt
from schemas.scaling import scale, scale_image
from schemas.train_config import StageConfig
from trainer.catalog import Catalog
from trainer.order import keyed_generator
from trainer.packing import Segment
from trainer.remote import open_shards
from trainer.shards import Part, Payload
from trainer.visit import Visit

_TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LOGVAR_RANGE = (-30.0, 20.0)
"""Bounds of the posterior's log-variance, as in diffusers' DiagonalGaussianDistribution."""
_BLOCK = 2**16
"""Numbers drawn at a time, in whole latent frames: few enough to stay in a core's cache from step to step."""


class Unreadable:
    """The samples that this process could not read since it started, over all its datasets. Thread-safe."""

    def __init__(self, limit: int, *, shared: bool = False) -> None:
        """`limit`: data.max_unreadable. `shared`: ranks share packs, each reading for itself; where one of
        them put zeros, the others may have read the sample, so the limit is 0.
        """
        self._limit = 0 if shared else limit
        self._why = ""
        if limit and shared:
            self._why = (
                f"; data.max_unreadable = {limit} counts as 0 in a run with mesh.sp or mesh.tp above 1, "
                "since what one rank cannot read its peers might"
            )
        self._lock = threading.Lock()
        self.samples: dict[str, str] = {}
        """sample_id -> what is wrong with it."""

    def add(self, sample_id: str, error: DatasetError) -> None:
        """Note a sample, and say so once on stderr; RunError above the limit, `error` where that is 0."""
        with self._lock:
            known = sample_id in self.samples
            self.samples[sample_id] = str(error)
            found = len(self.samples)
        if found > self._limit:
            if self._limit == 0:
                raise DatasetError(f"{error}{self._why}") from error
            raise RunError(
                f"{found} samples cannot be read, data.max_unreadable = {self._limit}; the last: {error}"
            ) from error
        if not known:
            print(f"left out, {found} of at most {self._limit}: {error}", file=sys.stderr, flush=True)

    def found(self) -> list[tuple[str, str]]:
        """`samples`, while others add to them."""
        with self._lock:
            return list(self.samples.items())

    def together(self, found: Iterable[tuple[str, str]]) -> int:
        """How many samples `found` by all ranks are; RunError where they are more than the limit."""
        samples = dict(found)
        if len(samples) > self._limit:
            raise RunError(
                f"{len(samples)} samples cannot be read, on all ranks together, data.max_unreadable = "
                f"{self._limit}; the last: {[*samples.values()][-1]}"
            )
        return len(samples)


class SampleReader:
    """Reads samples of one catalog; keeps shards open until `close`. Thread-safe."""

    def __init__(
        self,
        catalog: Catalog,
        *,
        images: bool = False,
        unreadable: Unreadable | None = None,
        cache: str = "",
        cache_gb: float = 100.0,
    ) -> None:
        """`images`: with the condition of image to video; ConfigError where the dataset has none.

        `unreadable` is shared by the readers of a run; without it the first unreadable sample is an error.
        `cache`, `cache_gb`: as in the config's data, for a dataset in an object store.
        """
        if images and catalog.card.image == "none":
            raise ConfigError(
                f"{catalog.dataset} holds no image latents, which the model takes: expected a dataset that "
                "was preprocessed with video_encoder.image_latents = true"
            )
        self._catalog, self._images = catalog, images
        self._unreadable = unreadable or Unreadable(0)
        self._shards = open_shards(catalog.dataset, cache=cache, cache_bytes=int(cache_gb * 1e9))
        self._verified = {name: np.zeros(len(catalog), bool) for name in catalog.places}
        self._mine = threading.local()
        self._empty: torch.Tensor | None = None

    @property
    def empty_prompt(self) -> torch.Tensor:
        """[S, D] float32, what stands for a dropped caption; DatasetError where the dataset has none."""
        if self._empty is None:
            stored = read_empty_prompt(self._catalog.dataset)["prompt_embeds"]
            self._empty = torch.from_numpy(as_float32(stored).copy())
        return self._empty

    def segment(self, visit: Visit) -> Segment:
        """The window of a visit, float32 and scaled; zeros of weight 0 where its sample cannot be read.

        Then `Unreadable.add` raises above its limit.
        """
        sample_id = self._catalog.sample_id(visit.row)
        prompt = self.empty_prompt if visit.empty_prompt else None
        try:
            values, weight = self._values(visit), 1.0
        except DatasetError as error:
            self._unreadable.add(sample_id, error)
            values, weight = self._zeros(visit), 0.0
        return Segment(
            sample_id=sample_id,
            key=visit.key,
            latents=values["latents"],
            prompt_embeds=values["prompt_embeds"] if prompt is None else prompt,
            image_latents=values.get("image_latents"),
            frame_weights=None if visit.frame_weights is None else torch.tensor(visit.frame_weights),
            weight=weight,
            seconds=visit.seconds,
        )

    def prompt(self, visit: Visit) -> torch.Tensor | None:
        """The caption [S, D] of a visit alone, float32; None where it cannot be read, see `segment`."""
        row = visit.row
        window = (0, int(self._catalog.prompt_shapes[row, 0]))
        try:
            stored = self._stored(row, {"prompt_embeds": window})["prompt_embeds"]
            values = self._finite({"prompt_embeds": stored.to(torch.float32, copy=True)}, row)
        except DatasetError as error:
            self._unreadable.add(self._catalog.sample_id(row), error)
            return None
        return values["prompt_embeds"]

    def stored(self, visit: Visit) -> dict[str, torch.Tensor]:
        """The tensors that a visit needs, windows of them as stored; valid until this thread's next call.

        DatasetError names shard and sample where one is damaged or cannot be read.
        """
        return self._stored(visit.row, self._windows(visit))

    def close(self) -> None:
        """Close every shard; the reader opens them again when used."""
        self._shards.close()

    def _windows(self, visit: Visit) -> dict[str, tuple[int, int]]:
        """First entry and number of entries along dim 0 of each tensor that a visit needs."""
        card = self._catalog.card
        windows = dict.fromkeys(card.latent_tensors, (visit.first, visit.latent_frames))
        if self._images and not visit.drop_image:
            if not _starts_with_image(card, visit.first):
                raise ValueError(f"no image latents are stored for latent frame {visit.first}: {visit}")
            windows |= dict.fromkeys(card.image_tensors, (0, 1))
        if not visit.empty_prompt:
            windows["prompt_embeds"] = (0, int(self._catalog.prompt_shapes[visit.row, 0]))
        return windows

    def _stored(self, row: int, windows: dict[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
        parts = [self._part(name, row, *window) for name, window in windows.items()]
        tensors = {}
        for (name, window), part, got in zip(windows.items(), parts, self._shards.fill(parts), strict=True):
            if isinstance(got, OSError):
                raise self._damaged(name, row, f"cannot be read: {got.strerror or got}") from got
            if got < len(part.into):
                raise self._damaged(name, row, f"ends after {got} of {len(part.into)} bytes")
            tensors[name] = self._tensor(name, row, part, *window)
        return tensors

    def _part(self, name: str, row: int, first: int, length: int) -> Part:
        """What is to be read of a tensor: its window, or all of it where that is at most twice as much and
        its checksum was not seen yet."""
        places = self._catalog.places[name]
        whole, *rest = places.shape[row].tolist()
        entry = prod(rest) * DTYPES[places.dtype].itemsize
        verify = not self._verified[name][row] and 2 * length >= whole
        start, nbytes = (0, whole * entry) if verify else (first * entry, length * entry)
        payload = Payload(
            shard=places.shard_names[places.shard[row]],
            offset=int(places.offset[row]),
            nbytes=whole * entry,
            checksum=places.checksum[row].as_py(),
        )
        buffer = self._buffer(name, nbytes, torch.uint8)
        return Part(payload, start, memoryview(buffer.numpy()))  # type: ignore[arg-type]

    def _tensor(self, name: str, row: int, part: Part, first: int, length: int) -> torch.Tensor:
        """The window in what was read, checked where that is the whole payload for the first time."""
        places = self._catalog.places[name]
        _, *rest = places.shape[row].tolist()
        if not self._verified[name][row] and len(part.into) == part.payload.nbytes:
            if (found := checksum(part.into)) != part.payload.checksum:
                raise self._damaged(name, row, f"has {found}, the index says {part.payload.checksum}")
            self._verified[name][row] = True
        entry = prod(rest) * DTYPES[places.dtype].itemsize
        data = self._buffer(name, len(part.into), torch.uint8)
        window = data[first * entry - part.start :][: length * entry]
        return window.view(_TORCH[places.dtype]).view(length, *rest)

    def _values(self, visit: Visit) -> dict[str, torch.Tensor]:
        """The tensors of a Segment, by its names."""
        card, stored = self._catalog.card, self.stored(visit)
        video = [stored[name] for name in card.latent_tensors]
        values = {"latents": scale(self._draw(video, visit.key, "posterior"), card.scaling)}
        if self._images and visit.drop_image:
            values["image_latents"] = torch.zeros_like(values["latents"][:1])
        elif self._images:
            # A draw of its own, also from the video's moments: as when a picture is encoded for a sample.
            image = [stored[name] for name in card.image_tensors] or [tensor[:1] for tensor in video]
            drawn = self._draw(image, visit.key, "image")
            values["image_latents"] = scale_image(drawn, card.scaling, card.image_scaling)
        if "prompt_embeds" in stored:
            values["prompt_embeds"] = stored["prompt_embeds"].to(torch.float32, copy=True)
        return self._finite(values, visit.row)

    def _finite(self, values: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
        """The same tensors of a Segment, by its names; DatasetError where one is not finite."""
        card = self._catalog.card
        sources = {
            "latents": card.latent_tensors[0],
            "image_latents": (*card.image_tensors, *card.latent_tensors)[0],
            "prompt_embeds": "prompt_embeds",
        }
        for name, tensor in values.items():
            if not np.isfinite(tensor.numpy()).all():  # thirty times faster than torch's
                raise self._damaged(sources[name], row, "holds NaN or Inf")
        return values

    def _zeros(self, visit: Visit) -> dict[str, torch.Tensor]:
        """As `_values`, of the same shapes."""
        frame = self._catalog.shapes[visit.row].tolist()[1:]
        values = {
            "latents": torch.zeros(visit.latent_frames, *frame),
            "prompt_embeds": torch.zeros(*self._catalog.prompt_shapes[visit.row].tolist()),
        }
        return values | {"image_latents": torch.zeros(1, *frame)} if self._images else values

    def _draw(self, tensors: list[torch.Tensor], key: str, purpose: str) -> torch.Tensor:
        """Stored latents as they are, float32, or a draw from their moments; in this thread's buffers."""
        mean, *logvar = tensors
        if not logvar:
            return mean.float()
        generator = keyed_generator(key, purpose)
        whole = self._buffer("drawn", mean.numel(), torch.float32).view(mean.shape)
        frames = max(1, _BLOCK // mean[0].numel())
        for drawn, middle, spread in zip(
            whole.split(frames), mean.split(frames), logvar[0].split(frames), strict=True
        ):
            deviation = self._buffer("deviation", drawn.numel(), torch.float32).view(drawn.shape)
            deviation.copy_(spread).clamp_(*_LOGVAR_RANGE).mul_(0.5).exp_()
            torch.randn(drawn.shape, generator=generator, out=drawn)
            drawn.mul_(deviation).add_(middle)
        return whole

    def _buffer(self, name: str, size: int, dtype: torch.dtype) -> torch.Tensor:
        """The first `size` entries of this thread's buffer of that name: new memory each time costs more
        than the arithmetic on it."""
        buffers: dict[str, torch.Tensor] = self._mine.__dict__
        if name not in buffers or len(buffers[name]) < size:
            buffers[name] = torch.empty(size, dtype=dtype)
        return buffers[name][:size]

    def _damaged(self, name: str, row: int, what: str) -> DatasetError:
        places = self._catalog.places[name]
        return DatasetError(
            f"shard {places.shard_names[places.shard[row]]}, sample {self._catalog.sample_id(row)}: "
            f"{name} {what}; run `latentpress verify {self._catalog.dataset}`"
        )


def check_windows(card: Card, stage: StageConfig, *, images: bool) -> None:
    """ConfigError where windows of a stage that begin within a clip would not be what they are taken for."""
    if stage.window == "prefix" or (stage.max_s is None and stage.max_frames is None):
        return
    where = f"stage {stage.name!r}, window = {stage.window!r}"
    if card.scaling.rule == "per_channel_and_frame":
        raise ConfigError(
            f"{where}: the dataset's latents are scaled by their place in the clip, so a window within it is "
            "not what a clip of its own would be; set window = 'prefix'"
        )
    piece = card.geometry.latent_frames(card.geometry.segment_frames) if card.geometry.segment_frames else 0
    if images and not (stage.window == "segments" and piece and _starts_with_image(card, piece)):
        also = ", or 'segments' where its image latents are first latent frames" if piece else ""
        raise ConfigError(
            f"{where}: image latents of the dataset are those of a clip's first frame, none are stored for "
            f"a window that begins later; set window = 'prefix'{also}"
        )


def _starts_with_image(card: Card, first: int) -> bool:
    """Whether the encoding of its frame alone is stored for latent frame `first`.

    A clip's first frame: always. The first one of a later piece is encoded alone if the clip's is, as its
    first latent frame; where image latents are stored apart there is one a clip.
    """
    geometry = card.geometry
    if first == 0:
        return True
    whole_pieces = geometry.segment_frames and first % geometry.latent_frames(geometry.segment_frames) == 0
    return bool(whole_pieces) and card.image == "first_latent"
