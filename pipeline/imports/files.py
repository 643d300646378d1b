"""One file of a cache -> its tensors: `.safetensors`, or `.pt` without running any code in it.

A file that is torn becomes a `ClipError`, which costs its row; one that only unpickling arbitrary objects
would open is refused, and so are a key nobody knows, a tensor whose numbers are not all in the file, and what
is no file: that is a matter of the whole cache. Payloads are mapped, not read, until `whole` asks for it:
then `.pt` is held against its checksums. Safetensors has none, so a changed number there goes unseen.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.imports.cache import refused
from schemas.codec import DTYPES, Tensor
from schemas.config import LimitsConfig
from schemas.errors import ClipError

if TYPE_CHECKING:
    import torch

ALONE = "(tensor)"
"""Key of the tensor of a `.pt` file that holds nothing else."""
_MOST_BYTES = LimitsConfig().max_bytes
_CARRIED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class CacheFile:
    """What one file holds."""

    path: Path
    values: dict[str, Any]
    metadata: dict[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    """Names of keys the user does without."""

    def only(self, *known: str) -> None:
        """ConfigError naming the keys that are neither `known` nor left out."""
        unknown = [key for key in self.values if key not in known and not self._is_left_out(key)]
        if unknown:
            names = ", ".join(map(repr, unknown))
            raise refused(
                self.path,
                f"holds {names}, which a dataset has no place for",
                f"import without it by --leave-out {unknown[0]}" if unknown != [ALONE] else "is it a cache?",
            )

    def tensor(self, key: str, *, dims: int) -> torch.Tensor:
        """A float tensor of so many dimensions; ConfigError where there is no such, ClipError where it is
        empty."""
        import torch

        value = self.values.get(key)
        if not isinstance(value, torch.Tensor) or value.ndim != dims:
            found = f"shape {list(value.shape)}" if isinstance(value, torch.Tensor) else sorted(self.values)
            raise refused(
                self.path, f"expected {key!r} with {dims} dimensions, found {found}", "check --format"
            )
        if not _is_held(value):
            what = f"{key!r} of shape {list(value.shape)} stands for more numbers than the file holds"
            raise refused(self.path, what, "expected a plain tensor: take the file out of the cache")
        if dtype_name(value) not in _CARRIED:
            raise refused(self.path, f"{key!r} is {value.dtype}", f"expected one of {', '.join(_CARRIED)}")
        if not value.numel():
            what = f"{self.path.name} holds {key!r} of shape {list(value.shape)}, which is empty"
            raise ClipError("empty", what, stage="import")
        return value

    def mask(self, key: str, *, shape: Sequence[int]) -> torch.Tensor | None:
        """A mask of this shape, or None where there is none; ConfigError for anything else."""
        value = self.values.get(key)
        if value is None:
            return None
        found = list(value.shape) if _is_held(value) else f"a {type(value).__name__}"
        if found != list(shape):
            raise refused(self.path, f"its mask is {found}", f"expected a tensor of {list(shape)}")
        mask: torch.Tensor = value
        return mask

    def _is_left_out(self, key: str) -> bool:
        return any(key == name or key.startswith(f"{name}_") for name in self.left_out)


def _is_held(value: Any) -> bool:
    """Whether this is a tensor whose numbers all are in memory: not expanded, not sparse, on no device."""
    import torch

    return (
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def read_file(path: Path, *, left_out: Sequence[str] = (), whole: bool = False) -> CacheFile:
    """ClipError where the file is torn, ConfigError where it holds more than tensors and plain values.

    `whole` reads every byte of a file that has checksums, and holds it against them.
    """
    try:
        _require_regular(path)
        if (size := path.stat().st_size) > _MOST_BYTES:
            raise ClipError(
                "limit_bytes", f"{path.name} has {size} bytes, over {_MOST_BYTES}", stage="import"
            )
        values, metadata = (_read_pt(path, whole=whole), {}) if path.suffix == ".pt" else _read_mapped(path)
    except OSError as error:
        raise _torn(path, error) from error
    return CacheFile(path, values, metadata, tuple(left_out))


def read_lines(path: Path) -> list[str]:
    """The lines of a list, as the trainers end them: captions may hold breaks that only Unicode knows.

    OSError or UnicodeDecodeError where it cannot be read.
    """
    _require_regular(path)
    return path.read_text(encoding="utf-8").split("\n")


def _require_regular(path: Path) -> None:
    """ConfigError for a pipe, a device or a folder; opening one may never return."""
    if path.exists() and not path.is_file():
        raise refused(path, "is no regular file", "take it out of the cache")


def _read_mapped(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise _torn(path, error) from error


def _read_pt(path: Path, *, whole: bool) -> dict[str, Any]:
    import torch

    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no archive as torch.save writes them")
        _check_archive(path, whole=whole)
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise refused(
            path,
            "holds objects that only running code in it would load, which is never done",
            "save it again as plain tensors",
        ) from error
    except (EOFError, ValueError, RuntimeError, KeyError, zipfile.BadZipFile) as error:
        raise _torn(path, error) from error
    if isinstance(value, torch.Tensor):
        return {ALONE: value}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return value
    raise refused(path, f"holds a {type(value).__name__}", "expected a tensor, or a dict of tensors")


def _check_archive(path: Path, *, whole: bool) -> None:
    """ValueError or BadZipFile where the parts of an archive are not those torch.save wrote."""
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        if sum(part.file_size for part in parts) > path.stat().st_size:
            raise ValueError("it claims to hold more bytes than it has")
        # torch.save can be told to leave checksums out, which are then 0.
        if whole and any(part.CRC for part in parts) and (spoilt := archive.testzip()):
            raise ValueError(f"{spoilt} does not match its checksum")


def _torn(path: Path, error: Exception) -> ClipError:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ClipError("unreadable", f"{path.name} cannot be read: {first}", stage="import")


def dtype_name(value: torch.Tensor) -> str:
    """Such as "bfloat16"."""
    return str(value.dtype).removeprefix("torch.")


def carried(value: torch.Tensor) -> Tensor:
    """A float tensor, bit for bit."""
    import torch

    tag = _CARRIED[dtype_name(value)]
    value = value.detach().contiguous()
    array = value.view(torch.int16).numpy() if tag == "BF16" else value.numpy()
    return Tensor(tag, np.ascontiguousarray(array).view(DTYPES[tag]))


def finite(tensors: Iterable[torch.Tensor], *, path: Path) -> None:
    """ClipError where one holds NaN or Inf."""
    if not all(bool(value.isfinite().all()) for value in tensors):
        raise ClipError("non_finite", f"{path.name} holds NaN or Inf", stage="import")
