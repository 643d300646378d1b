"""Verification: every claim of a dataset held against its bytes. Repairs nothing.

Card, generations, commit records, shards (sha256, members, tensors), index and quarantine; each
finding names the file, the sample and what to do.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from schemas.card import Card, read_card
from schemas.codec import Tensor, as_float32, checksum, decode_sample
from schemas.config import BucketConfig
from schemas.dataset import Dataset, planned_units
from schemas.errors import DatasetError
from schemas.index import build_tables, read_index, read_quarantine
from schemas.sample import Family, SampleRecord, UnitCommit, unit_name

_RERUN = "run `latentpress preprocess` with its config again"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    file: str
    """Relative to the dataset."""
    sample: str | None
    problem: str
    remedy: str

    def __str__(self) -> str:
        sample = f", sample {self.sample}" if self.sample else ""
        return f"{self.file}{sample}: {self.problem}; {self.remedy}"


@dataclass
class Verdict:
    """What `verify` found."""

    units: int = 0
    samples: int = 0
    prompts: int = 0
    quarantined: int = 0
    nbytes: int = 0
    unfinished: int = 0
    """Units asked for and not committed yet."""
    findings: list[Finding] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not self.findings and not self.unfinished

    def as_dict(self) -> dict[str, Any]:
        return {"clean": self.clean, **asdict(self)}


def check_dataset(root: Path, *, progress: Callable[[int, int], None] = lambda done, total: None) -> Verdict:
    """Check everything; DatasetError only where there is no readable card or manifest generation."""
    dataset, verdict = Dataset(root), Verdict()
    card = read_card(dataset.root)
    rows = dataset.live_rows()
    families: tuple[Family, ...] = ("prompts", "latents")
    todo = [(family, unit) for family in families for unit in sorted(planned_units(rows, family))]

    seen: Counter[str] = Counter()
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        results = pool.map(lambda item: _check_unit(dataset, card, *item), todo)
        for done, ((family, _), (commit, findings)) in enumerate(zip(todo, results, strict=True), 1):
            verdict.findings += findings
            progress(done, len(todo))
            if commit is None:
                verdict.unfinished += not findings
                continue
            verdict.units += 1
            verdict.nbytes += commit.nbytes
            if family == "latents":
                verdict.samples += len(commit.samples)
                verdict.quarantined += len(commit.quarantined)
            else:
                verdict.prompts += len(commit.samples)
            seen.update(sample.key for sample in commit.samples)
            seen.update(failure.key for failure in commit.quarantined)
    verdict.findings += [
        Finding("commits", key, f"is committed {count} times", "remove the dataset's newest commit of it")
        for key, count in seen.items()
        if count > 1
    ]
    if not verdict.findings and not verdict.unfinished:
        verdict.findings += _check_rows(rows, seen)
        verdict.findings += _check_tables(dataset, card)
    return verdict


def _check_unit(
    dataset: Dataset, card: Card, family: Family, unit: int
) -> tuple[UnitCommit | None, list[Finding]]:
    record = dataset.commit_path(family, unit).relative_to(dataset.root).as_posix()
    remedy = f"delete {record} and {_RERUN}"
    try:
        commit = dataset.commit(family, unit)
    except DatasetError as error:
        return None, [Finding(record, None, str(error), remedy)]
    if commit is None:
        return None, []
    findings = []
    if commit.fingerprint != card.family_fingerprint(family):
        findings.append(Finding(record, None, "was made with other settings than the card says", remedy))
    if (commit.family, commit.unit) != (family, unit):
        findings.append(
            Finding(record, None, f"claims to be {unit_name(commit.family, commit.unit)}", remedy)
        )
    if commit.shard is None:
        if commit.samples:
            findings.append(Finding(record, None, "names samples but no shard", remedy))
        return commit, findings
    try:
        problems = list(_shard_problems(dataset.root / commit.shard, commit, card))
    except (OSError, tarfile.TarError) as error:
        problems = [(None, f"cannot be read: {error}")]
    return commit, [*findings, *(Finding(commit.shard, sample, text, remedy) for sample, text in problems)]


def _shard_problems(path: Path, commit: UnitCommit, card: Card) -> Iterator[tuple[str | None, str]]:
    """(sample, problem) of one shard, from its bytes as a whole down to its tensors."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if size != commit.nbytes or sha256 != commit.sha256:
            yield None, f"does not hash to what its commit says ({size} bytes, expected {commit.nbytes})"
        if commit.sha256 is not None and commit.sha256[:12] not in path.name:
            yield None, "is not named by its content hash"
        with tarfile.open(fileobj=_at_start(file), mode="r:") as tar:
            members = {member.name: member for member in tar}
            if not all(member.isreg() for member in members.values()):
                yield None, "holds members that are not regular files"
        suffix = "latents" if commit.family == "latents" else "prompt_embeds"
        expected = {f"{s.key}.{kind}" for s in commit.samples for kind in (f"{suffix}.safetensors", "json")}
        if members.keys() != expected:
            yield None, f"holds other members than its commit names: {sorted(members.keys() ^ expected)[:3]}"
        for sample in commit.samples:
            member = members.get(f"{sample.key}.{suffix}.safetensors")
            if member is not None:
                data = os.pread(file.fileno(), member.size, member.offset_data)
                for problem in _sample_problems(data, member.offset_data, sample, commit.family, card):
                    yield sample.key, problem


def _at_start(file: Any) -> Any:
    file.seek(0)
    return file


def _sample_problems(
    data: bytes, start: int, sample: SampleRecord, family: Family, card: Card
) -> Iterator[str]:
    try:
        tensors = decode_sample(data)
    except DatasetError as error:
        yield str(error)
        return
    names = card.latent_tensors if family == "latents" else ("prompt_embeds", "prompt_mask")
    if set(tensors) != set(names) or set(sample.tensors) != set(names):
        yield f"holds the tensors {sorted(tensors)}, expected {sorted(names)}"
        return
    for name, tensor in tensors.items():
        record = sample.tensors[name]
        if (tensor.dtype, tensor.shape) != (record.dtype, record.shape):
            yield f"{name} is {tensor}, its commit says {record.dtype} {list(record.shape)}"
        offset = record.offset - start
        if checksum(data[offset : offset + record.nbytes]) != record.checksum:
            yield f"{name} does not match its checksum"
        if tensor.dtype in ("F32", "F16", "BF16") and not np.isfinite(as_float32(tensor)).all():
            yield f"{name} holds NaN or Inf"
        if family == "latents":
            yield from _shape_problems(name, tensor, sample, card)


def _shape_problems(name: str, tensor: Tensor, sample: SampleRecord, card: Card) -> Iterator[str]:
    meta = sample.meta
    bucket = BucketConfig(num_frames=meta["num_frames"], height=meta["height"], width=meta["width"])
    expected = card.geometry.latent_shape(bucket)
    if tensor.shape != expected:
        yield f"{name} has the shape {list(tensor.shape)}, its bucket gives {list(expected)}"


def _check_rows(rows: list[dict[str, Any]], seen: Counter[str]) -> list[Finding]:
    """Every row asked for is kept or quarantined, once."""
    return [
        Finding("commits", row["sample_id"], f"{row['source']} is neither kept nor quarantined", _RERUN)
        for row in rows
        if row["sample_id"] not in seen or row["caption_digest"] not in seen
    ]


def _check_tables(dataset: Dataset, card: Card) -> list[Finding]:
    """The rebuildable tables say what the commit records say."""
    findings = []
    index, quarantine = build_tables(dataset, card)
    for path, read, expected in (
        (dataset.index_path, read_index, index),
        (dataset.quarantine_path, read_quarantine, quarantine),
    ):
        try:
            table: pa.Table = read(dataset.root)
        except DatasetError as error:
            findings.append(Finding(path.name, None, str(error), _RERUN))
            continue
        if not table.equals(expected):
            findings.append(Finding(path.name, None, "differs from the commit records", _RERUN))
    return findings
