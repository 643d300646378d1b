"""Sealed Parquet: a table in, a file that knows each of its bytes out, and the reader that holds it to them.

The sha256 of the whole file stands in the file's own key-value metadata (`latentpress.sha256`); it is taken
with 64 zeros in its place. Any Parquet reader reads such a file; ours refuses one whose bytes changed. The
trade-off: opening a table costs one pass over its bytes.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import DatasetError
from schemas.patience import read_bytes
from schemas.store import is_remote

_NAME = b"latentpress.sha256"
_BLANK = b"0" * 64
_ENTRY = _NAME + b"\x18\x40"
"""How Thrift's compact protocol spells the name, a second string field, and its length of 64."""
_CHUNK = 1 << 20


class SealedWriter:
    """Writes a sealed file table by table, a row group each; a context manager.

    `file` is a new local file, open for writing and reading; it is sealed when the block ends without
    an error, and left open, for the caller to make durable.
    """

    def __init__(self, file: BinaryIO, schema: pa.Schema) -> None:
        self._file, self._hashed = file, _Hashed(file)
        self._sink = pa.PythonFile(self._hashed, mode="w")
        self._writer = pq.ParquetWriter(self._sink, schema, compression="zstd")

    def __enter__(self) -> Self:
        return self

    def write(self, table: pa.Table) -> None:
        if table.num_rows:
            self._writer.write_table(table, row_group_size=table.num_rows)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if error is None:
            self._writer.add_key_value_metadata({_NAME.decode(): _BLANK.decode()})
        self._writer.close()
        self._sink.close()
        if error is None:
            self._file.seek(max(0, self._hashed.nbytes - _CHUNK))
            start, tail = self._file.tell(), self._file.read()
            self._file.seek(start + tail.rindex(_ENTRY + _BLANK) + len(_ENTRY))
            self._file.write(self._hashed.sha256.hexdigest().encode())


class _Hashed(io.RawIOBase):
    """Passes bytes to a file and to sha256; closing it leaves the file open."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.sha256, self.nbytes = file, hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        self._file.write(data)
        self.nbytes += len(data)
        return len(data)

    def tell(self) -> int:
        return self.nbytes


def sealed_parquet(table: pa.Table) -> bytes:
    """`table` as the bytes of a sealed Parquet file."""
    file = io.BytesIO()
    with SealedWriter(file, table.schema) as writer:
        writer.write(table)
    return file.getvalue()


def read_sealed(path: Path, *, columns: Sequence[str] | None = None, remedy: str) -> pa.Table:
    """The table of a sealed file; FileNotFoundError where there is none, DatasetError, which ends with
    `remedy`, where it is damaged."""
    return _opened(path, lambda file: pq.read_table(file, columns=columns and list(columns)), remedy)


def open_sealed(path: Path, *, remedy: str) -> pq.ParquetFile:
    """A sealed file, its seal checked, to be read row group by row group; errors as of `read_sealed`."""
    return _opened(path, pq.ParquetFile, remedy)


def seal_of(path: Path) -> str:
    """What a sealed file says it hashes to; ValueError where it holds no seal. Nothing is checked."""
    if is_remote(path):
        return _find_seal(read_bytes(path)[-_CHUNK:])[1].decode()
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, io.SEEK_END) - _CHUNK))
        return _find_seal(file.read())[1].decode()


def _find_seal(tail: bytes) -> tuple[int, bytes]:
    """Where the entry of the seal begins in the last bytes of a file, and the seal."""
    at = tail.rfind(_ENTRY)
    said = tail[at + len(_ENTRY) :][: len(_BLANK)]
    if at < 0 or len(said) < len(_BLANK):
        raise ValueError("it holds no seal")
    return at, said


def _opened(path: Path, read: Callable[[pa.NativeFile], Any], remedy: str) -> Any:
    try:
        # Arrow's own files only: it reads from threads that outlive a Python file at the interpreter's end.
        is_plain = not is_remote(path) and str(path).isprintable()  # Arrow takes no name that is not UTF-8
        file = pa.OSFile(str(path)) if is_plain else pa.BufferReader(read_bytes(path))
        _check_seal(file)
        return read(file)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DatasetError(f"{path} cannot be read: {error}; {remedy}") from error


def _check_seal(file: pa.NativeFile) -> None:
    """ValueError where the file's bytes are not those that were sealed."""
    start = max(0, file.size() - _CHUNK)
    file.seek(start)
    tail = file.read()
    at, said = _find_seal(tail)
    state = hashlib.sha256()
    file.seek(0)
    while start > 0:
        data = file.read(min(_CHUNK, start))
        state.update(data)
        start -= len(data)
    state.update(tail[: at + len(_ENTRY)] + _BLANK + tail[at + len(_ENTRY) + len(_BLANK) :])
    if state.hexdigest().encode() != said:
        raise ValueError(f"its content hashes to {state.hexdigest()[:12]}, it says {said[:12]!r}")
    file.seek(0)
