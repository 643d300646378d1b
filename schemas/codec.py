"""The sample-to-bytes codec: named arrays <-> one safetensors file, with the place of every payload.

The writer stores `offset` in the index, so that a reader fetches any tensor, or any leading part of
one (arrays are time-major), with a single `preadv` and never parses a container. Only numpy is
needed: bfloat16 travels as uint16 under its own tag. Format: https://github.com/huggingface/safetensors
(8-byte little-endian header length, JSON header, payloads).
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from schemas.errors import DatasetError

DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "I64": np.dtype("<i8"),
}
"""safetensors tag -> the numpy type that carries it."""

TAGS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""Config name of a dtype -> its safetensors tag."""

_ALIGN = 64
"""Payloads start at multiples of this inside the file, so that vector loads stay aligned."""
_MAX_HEADER_BYTES = 1 << 20


class Span(NamedTuple):
    """Where a payload lies: bytes from the start of its file."""

    offset: int
    nbytes: int


@dataclass(frozen=True)
class Tensor:
    """A C-contiguous array and its safetensors tag; `data` is uint16 for BF16."""

    dtype: str
    data: np.ndarray

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"expected a dtype of {sorted(DTYPES)}, found {self.dtype!r}")
        if self.data.dtype != DTYPES[self.dtype]:
            raise ValueError(f"{self.dtype} is carried as {DTYPES[self.dtype]}, found {self.data.dtype = }")
        if not self.data.flags.c_contiguous:
            raise ValueError(f"expected a C-contiguous array, found {self.data.strides = }")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    def __repr__(self) -> str:
        return f"Tensor({self.dtype}, {list(self.shape)})"


def encode_sample(
    tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, Span]]:
    """A safetensors file of `tensors` in their order, and the span of each payload inside it."""
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    position = 0
    for name, tensor in tensors.items():
        end = position + tensor.data.nbytes
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGN)
    parts = [len(text).to_bytes(8, "little"), text]
    spans = {}
    for name, tensor in tensors.items():
        spans[name] = Span(8 + len(text) + header[name]["data_offsets"][0], tensor.data.nbytes)
        parts.append(tensor.data.tobytes())
    return b"".join(parts), spans


def decode_sample(buffer: bytes | memoryview) -> dict[str, Tensor]:
    """The tensors of a safetensors file, as views of `buffer`; DatasetError where it is malformed."""
    view = memoryview(buffer)
    size = int.from_bytes(view[:8], "little")
    if len(view) < 8 or size > min(_MAX_HEADER_BYTES, len(view) - 8):
        raise DatasetError(f"not a safetensors file: header of {size} bytes in a file of {len(view)} bytes")
    try:
        header = json.loads(bytes(view[8 : 8 + size]))
        header.pop("__metadata__", None)
        payload = view[8 + size :]
        return {name: _tensor(payload, entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f"not a safetensors file: {error}") from error


def _tensor(payload: memoryview, entry: dict[str, Any]) -> Tensor:
    start, end = entry["data_offsets"]
    if not 0 <= start <= end <= len(payload):
        raise ValueError(f"payload [{start}, {end}) lies outside of {len(payload)} bytes")
    return tensor_from(payload[start:end], dtype=entry["dtype"], shape=entry["shape"])


def tensor_from(buffer: bytes | bytearray | memoryview, *, dtype: str, shape: list[int]) -> Tensor:
    """A Tensor over raw payload bytes, without a copy; ValueError where sizes disagree."""
    return Tensor(dtype, np.frombuffer(buffer, DTYPES[dtype]).reshape(shape))


def as_float32(tensor: Tensor) -> np.ndarray:
    """The values as float32; exact for every float tag."""
    if tensor.dtype == "BF16":
        return (tensor.data.astype(np.uint32) << 16).view(np.float32)
    return np.asarray(tensor.data, np.float32)


def from_float32(values: np.ndarray, *, dtype: str) -> Tensor:
    """float32 values as a Tensor of a float tag; bfloat16 rounds to nearest even, as torch does."""
    values = np.ascontiguousarray(values, np.float32)
    if dtype == "BF16":
        bits = values.view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return Tensor(dtype, np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16))
    return Tensor(dtype, values.astype(DTYPES[dtype], copy=False))


def checksum(buffer: bytes | bytearray | memoryview) -> str:
    """CRC-32 of the bytes; every single-bit and single-byte change alters it."""
    return f"crc32:{zlib.crc32(buffer):08x}"
