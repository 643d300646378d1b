"""Samples -> one WebDataset shard: a USTAR tar whose bytes depend on its samples alone.

Members are written as they come (memory stays one sample), hashed on the way, and the tar gets its
content-hash name when whole. Fixed times, owners and order make equal samples equal shards. On its
way to an object store a shard is a local file, so $TMPDIR must hold one for every worker.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.commit import Committing, commit_once, publish, temp_path
from schemas.codec import Tensor, checksum, encode_sample
from schemas.dataset import Dataset
from schemas.errors import DatasetError
from schemas.load import sealed_json
from schemas.sample import FailureRecord, Family, SampleRecord, TensorRecord, UnitCommit, unit_name

MEMBER_SUFFIX: dict[Family, str] = {"latents": "latents", "prompts": "prompt_embeds"}


class _HashingFile(io.RawIOBase):
    """Passes bytes to a file and to sha256."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb", buffering=1 << 20)
        self._sha256 = hashlib.sha256()
        self.nbytes = 0

    def write(self, data: Any) -> int:
        self._sha256.update(data)
        self.nbytes += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self.nbytes

    def sync(self) -> str:
        """fsync; the sha256 of all bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._sha256.hexdigest()

    def close(self) -> None:
        try:
            self._file.close()
        finally:
            super().close()


class ShardWriter:
    """One unit's shard on its way; a context manager that leaves nothing behind unless committed."""

    def __init__(
        self,
        dataset: Dataset,
        *,
        family: Family,
        unit: int,
        fingerprint: str,
        committing: Committing = "link",
    ) -> None:
        """`committing` is what `open_store` found: where it is "coordinator", `commit` records nothing."""
        self._dataset, self._family, self._unit, self._fingerprint = dataset, family, unit, fingerprint
        self._committing = committing
        self._temp = temp_path(dataset.shard_folder(family, unit))
        self._file = _HashingFile(self._temp)
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
        self._samples: list[SampleRecord] = []
        self.was_first = True
        """False once `commit` has found another writer's record."""

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()
        finally:  # closing writes what is left, which fails on a full disk
            self._temp.unlink(missing_ok=True)

    def add(self, key: str, tensors: Mapping[str, Tensor], *, meta: dict[str, Any]) -> None:
        """Append one sample: `<key>.<family>.safetensors` and `<key>.json`."""
        payload, spans = encode_sample(tensors)
        start = self._add_member(f"{key}.{MEMBER_SUFFIX[self._family]}.safetensors", payload)
        self._add_member(f"{key}.json", _json_bytes({"key": key, **meta}))
        records = {
            name: TensorRecord(
                dtype=tensor.dtype,
                shape=tensor.shape,
                offset=start + spans[name].offset,
                nbytes=spans[name].nbytes,
                checksum=checksum(memoryview(payload)[spans[name].offset :][: spans[name].nbytes]),
            )
            for name, tensor in tensors.items()
        }
        self._samples.append(SampleRecord(key=key, tensors=records, meta=meta))

    def commit(self, *, quarantined: list[FailureRecord], seconds: dict[str, float]) -> UnitCommit:
        """Close, name and commit the unit; the record that counts, ours or that of whoever was first.

        For a coordinator the record is only returned: it calls `commit_once` with `record_bytes` of it.
        """
        shard, sha256 = None, None
        if self._samples:
            self._tar.close()
            sha256 = self._file.sync()
            name = f"{unit_name(self._family, self._unit)}-{sha256[:12]}.tar"
            final = self._dataset.shard_folder(self._family, self._unit) / name
            publish(self._temp, final)
            shard = final.relative_to(self._dataset.root).as_posix()
        record = UnitCommit(
            family=self._family,
            unit=self._unit,
            fingerprint=self._fingerprint,
            shard=shard,
            sha256=sha256,
            nbytes=self._file.nbytes if shard else 0,
            samples=tuple(self._samples),
            quarantined=tuple(quarantined),
            seconds={name: round(value, 4) for name, value in seconds.items()},
        )
        if self._committing == "coordinator":
            return record
        path = self._dataset.commit_path(self._family, self._unit)
        if commit_once(path, record_bytes(record)):
            return record
        self.was_first = False
        winner = self._dataset.commit(self._family, self._unit)
        if winner is None:
            raise DatasetError(
                f"commit record {path} was there a moment ago and is gone; nothing but a person removes "
                "one: run the same command again once nobody does"
            )
        return winner

    def uncommitted(self, record: UnitCommit) -> bytes | None:
        """What a coordinator is to record; None where `commit` did."""
        return record_bytes(record) if self._committing == "coordinator" else None

    def _add_member(self, name: str, data: bytes) -> int:
        """Write one regular file; the position of its first byte in the tar."""
        info = tarfile.TarInfo(name)
        info.size = len(data)
        info.mode = 0o644
        start = self._tar.offset + tarfile.BLOCKSIZE
        self._tar.addfile(info, io.BytesIO(data))
        return start


def record_bytes(record: UnitCommit) -> bytes:
    """What the commit record of a unit holds."""
    return sealed_json(record.model_dump(mode="json"))


def _json_bytes(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
