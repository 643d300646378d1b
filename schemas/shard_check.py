"""One shard held against its commit record and the card, from its bytes as a whole down to its numbers.

In: a shard, wherever the dataset lies. Out: what is wrong, each with the sample concerned. The file is read
once, front to back; memory is one sample.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from schemas.card import Card
from schemas.codec import TAGS, as_float32, checksum, decode_sample
from schemas.config import BucketConfig
from schemas.errors import DatasetError
from schemas.sample import Family, SampleRecord, UnitCommit

_READ_BYTES = 1 << 20
_MEMBER: dict[Family, str] = {"latents": "latents", "prompts": "prompt_embeds"}

Problem = tuple[str | None, str]
"""(key of the sample, if one is concerned; what is wrong with it)."""


class _Hashed:
    """What `tarfile` reads from; sees every byte."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._sha256, self.nbytes = file, hashlib.sha256(), 0

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._sha256.update(data)
        self.nbytes += len(data)
        return data

    def finish(self) -> str:
        """The sha256 of the whole file."""
        while self.read(_READ_BYTES):
            pass
        return self._sha256.hexdigest()


def shard_problems(path: Path, commit: UnitCommit, card: Card) -> list[Problem]:
    """Everything wrong with the shard of `commit`; empty for a sound one."""
    problems: list[Problem] = []
    try:
        with path.open("rb") as file:
            hashed = _Hashed(file)
            try:
                with tarfile.open(fileobj=hashed, mode="r|", bufsize=_READ_BYTES) as tar:  # type: ignore[call-overload]
                    problems += _member_problems(tar, commit, card)
            except (tarfile.TarError, EOFError, ValueError) as error:
                problems.append((None, f"is no sound tar: {error}"))
            sha256 = hashed.finish()
    except FileNotFoundError:
        return [(None, "is missing")]
    except OSError as error:
        return [(None, f"cannot be read: {error}")]
    if sha256 != commit.sha256 or hashed.nbytes != commit.nbytes:
        text = f"does not hash to what its commit says ({hashed.nbytes} bytes, expected {commit.nbytes})"
        problems.insert(0, (None, text))
    if commit.sha256 is None or commit.sha256[:12] not in path.name:
        problems.append((None, "is not named by its content hash"))
    return problems


def _member_problems(tar: tarfile.TarFile, commit: UnitCommit, card: Card) -> Iterator[Problem]:
    suffix = f".{_MEMBER[commit.family]}.safetensors"
    tensors = {f"{sample.key}{suffix}": sample for sample in commit.samples}
    texts = {f"{sample.key}.json": sample for sample in commit.samples}
    missing = {*tensors, *texts}
    for member in tar:
        content = tar.extractfile(member) if member.isreg() and member.name in missing else None
        if content is None:
            yield None, f"holds {member.name!r}, which its commit does not name"
            continue
        missing.discard(member.name)
        data = content.read()
        if sample := tensors.get(member.name):
            for problem in _sample_problems(data, member.offset_data, sample, commit.family, card):
                yield sample.key, problem
        elif not _says(data, texts[member.name]):
            yield texts[member.name].key, "its .json says something else than its commit"
    if missing:
        yield None, f"lacks {len(missing)} members that its commit names, such as {min(missing)}"


def _says(data: bytes, sample: SampleRecord) -> bool:
    try:
        return bool(json.loads(data) == {"key": sample.key, **sample.meta})
    except ValueError:
        return False


def _sample_problems(
    data: bytes, start: int, sample: SampleRecord, family: Family, card: Card
) -> Iterator[str]:
    try:
        tensors = decode_sample(data)
    except DatasetError as error:
        yield str(error)
        return
    names = (
        (*card.latent_tensors, *card.image_tensors)
        if family == "latents"
        else ("prompt_embeds", "prompt_mask")
    )
    if set(tensors) != set(names) or set(sample.tensors) != set(names):
        yield f"holds the tensors {sorted(tensors)}, expected {sorted(names)}"
        return
    for name, tensor in tensors.items():
        record = sample.tensors[name]
        if (tensor.dtype, tensor.shape) != (record.dtype, record.shape):
            yield f"{name} is {tensor}, its commit says {record.dtype} {list(record.shape)}"
        offset = record.offset - start
        if offset < 0 or checksum(data[offset : offset + record.nbytes]) != record.checksum:
            yield f"{name} does not match its checksum"
        if tensor.dtype in TAGS.values() and not np.isfinite(as_float32(tensor)).all():
            yield f"{name} holds NaN or Inf"
        if family == "latents":
            shape = _shape(sample.meta, card)
            shape = (1, *shape[1:]) if name in card.image_tensors else shape
            expected = TAGS[card.settings.video_encoder.dtype], shape
            if (tensor.dtype, tensor.shape) != expected:
                yield f"{name} is {tensor}, the card and its bucket give {expected[0]} {list(expected[1])}"


def _shape(meta: dict[str, Any], card: Card) -> tuple[int, ...]:
    names = ("num_frames", "height", "width")
    return card.geometry.latent_shape(BucketConfig(**{name: meta[name] for name in names}))
