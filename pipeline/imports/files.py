"""One file of a cache -> its tensors: `.safetensors`, or `.pt` without running any code in it.

A file that is torn becomes a `ClipError`, which costs its row; one that only unpickling arbitrary objects
would open is refused, and so is a key nobody knows: that is a matter of the whole cache. Payloads are mapped,
not read.
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
from schemas.errors import ClipError

if TYPE_CHECKING:
    import torch

ALONE = "(tensor)"
"""Key of the tensor of a `.pt` file that holds nothing else."""
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
        """A float tensor of so many dimensions; ConfigError where there is no such."""
        import torch

        value = self.values.get(key)
        if not isinstance(value, torch.Tensor) or value.ndim != dims:
            found = f"shape {list(value.shape)}" if isinstance(value, torch.Tensor) else sorted(self.values)
            raise refused(
                self.path, f"expected {key!r} with {dims} dimensions, found {found}", "check --format"
            )
        if str(value.dtype).removeprefix("torch.") not in _CARRIED:
            raise refused(self.path, f"{key!r} is {value.dtype}", f"expected one of {', '.join(_CARRIED)}")
        return value

    def _is_left_out(self, key: str) -> bool:
        return any(key == name or key.startswith(f"{name}_") for name in self.left_out)


def read_file(path: Path, *, left_out: Sequence[str] = ()) -> CacheFile:
    """ClipError where the file is torn, ConfigError where it holds more than tensors and plain values."""
    values, metadata = (_read_pt(path), {}) if path.suffix == ".pt" else _read_safetensors(path)
    return CacheFile(path, values, metadata, tuple(left_out))


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _torn(path, error) from error


def _read_pt(path: Path) -> dict[str, Any]:
    import torch

    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no archive as torch.save writes them")
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise refused(
            path,
            "holds objects that only running code in it would load, which is never done",
            "save it again as plain tensors",
        ) from error
    except (OSError, EOFError, ValueError, RuntimeError, KeyError) as error:
        raise _torn(path, error) from error
    if isinstance(value, torch.Tensor):
        return {ALONE: value}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return value
    raise refused(path, f"holds a {type(value).__name__}", "expected a tensor, or a dict of tensors")


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
