"""The reader: a row of the catalog in, one Segment out, by `preadv` at the offsets of the index.

No container is parsed and nothing is unpickled: a tensor is one read into a buffer that is used over
and over, and a window of the first latent frames is a shorter read, since payloads are time-major.
Checksums cover whole payloads, so a sample's first visit reads all of it, once a run; NaN and Inf are
looked for every time. One thread at a time.

T latent frames, C channels, H, W latent pixels, S prompt tokens, D prompt width.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from math import prod

import numpy as np
import torch

from schemas.codec import DTYPES, checksum
from schemas.errors import DatasetError
from schemas.scaling import scale
from trainer.catalog import Catalog
from trainer.order import keyed_generator
from trainer.packing import Segment

MAX_OPEN_SHARDS = 64
"""File descriptors kept: two groups of 16 shards in each of the two families."""

_TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LOGVAR_RANGE = (-30.0, 20.0)
"""Bounds of the posterior's log-variance, as in diffusers' DiagonalGaussianDistribution."""


class SampleReader:
    """Reads samples of one catalog; keeps shards open until `close`."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._files: OrderedDict[str, int] = OrderedDict()
        self._buffers: dict[str, torch.Tensor] = {}
        self._verified = {name: np.zeros(len(catalog), bool) for name in catalog.places}

    def segment(self, row: int, *, latent_frames: int, key: str) -> Segment:
        """The first `latent_frames` of a sample, float32 and scaled; `key` seeds its posterior draw."""
        card = self._catalog.card
        tensors = [self._tensor(name, row, length=latent_frames) for name in card.latent_tensors]
        latents = tensors[0].float()
        if card.stored == "moments":
            noise = torch.randn(latents.shape, generator=keyed_generator(key, "posterior"))
            latents = latents + torch.exp(0.5 * tensors[1].float().clamp(*_LOGVAR_RANGE)) * noise
        prompt_embeds = self._tensor("prompt_embeds", row, length=int(self._catalog.prompt_shapes[row, 0]))
        segment = Segment(
            sample_id=self._catalog.sample_id(row),
            key=key,
            latents=scale(latents, card.scaling),  # arithmetic, so never the buffer itself
            prompt_embeds=prompt_embeds.to(torch.float32, copy=True),
        )
        for name, values in (
            (card.latent_tensors[0], segment.latents),
            ("prompt_embeds", segment.prompt_embeds),
        ):
            if not np.isfinite(values.numpy()).all():  # thirty times faster than torch's
                raise self._damaged(name, row, "holds NaN or Inf")
        return segment

    def close(self) -> None:
        """Close every shard; the reader opens them again when used."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _tensor(self, name: str, row: int, *, length: int) -> torch.Tensor:
        """The first `length` entries along dim 0 as stored; valid until `name` is read again."""
        places = self._catalog.places[name]
        whole, *rest = places.shape[row].tolist()
        verified = bool(self._verified[name][row])
        window = length * prod(rest) * DTYPES[places.dtype].itemsize
        nbytes = window if verified else window // length * whole
        if name not in self._buffers or len(self._buffers[name]) < nbytes:
            self._buffers[name] = torch.empty(nbytes, dtype=torch.uint8)
        data = self._buffers[name][:nbytes]
        view = memoryview(data.numpy())  # type: ignore[arg-type]
        try:
            got = self._fill(view, places.shard_names[places.shard[row]], int(places.offset[row]))
        except OSError as error:
            raise self._damaged(name, row, f"cannot be read: {error.strerror}") from error
        if got != nbytes:
            raise self._damaged(name, row, f"ends after {got} of {nbytes} bytes")
        if not verified:
            expected, found = places.checksum[row].as_py(), checksum(view)
            if found != expected:
                raise self._damaged(name, row, f"has {found}, the index says {expected}")
            self._verified[name][row] = True
        return data[:window].view(_TORCH[places.dtype]).view(length, *rest)

    def _fill(self, view: memoryview, shard: str, offset: int) -> int:
        """Read until `view` is full or the file ends; a single read may stop early."""
        fd = self._open(shard)
        got = 0
        while got < len(view) and (read := os.preadv(fd, [view[got:]], offset + got)):
            got += read
        return got

    def _open(self, shard: str) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        if len(self._files) == MAX_OPEN_SHARDS:
            os.close(self._files.popitem(last=False)[1])
        self._files[shard] = os.open(self._catalog.dataset / shard, os.O_RDONLY | os.O_CLOEXEC)
        return self._files[shard]

    def _damaged(self, name: str, row: int, what: str) -> DatasetError:
        places = self._catalog.places[name]
        return DatasetError(
            f"shard {places.shard_names[places.shard[row]]}, sample {self._catalog.sample_id(row)}: "
            f"{name} {what}; run `latentpress verify {self._catalog.dataset}`"
        )
