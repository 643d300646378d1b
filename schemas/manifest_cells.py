"""Manifest files -> their rows as cells: JSONL, CSV and Parquet, streamed.

In: a file that may be hostile. Out: (number, cells) of every row in order, or in place of the cells a
sentence that says what is wrong with the row. ManifestError for a file in which the next row cannot be found
safely. Memory is bounded by the size of a row, which is bounded too: a row of text may have MAX_ROW_CHARS,
and of Parquet, where few bytes may stand for many, only columns of single values and lists of captions are
taken.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from schemas.errors import ManifestError

CAPTION_KEYS = ("caption", "text", "cap", "captions")
MAX_ROW_CHARS = 1 << 20
MAX_CAPTIONS = 64
"""Of one row, in a list."""
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"(\xb5/\xfd": "zstd",
}
"""First bytes of compressed files, which are not unpacked: a few may hold more than the disk does."""
_PARQUET_ROWS = 64
"""Read at once: one long cell may stand for that many."""

Cells = tuple[int, dict[str, Any] | str]


def read_cells(path: Path) -> Iterator[Cells]:
    """Every row of a manifest file; its number is the line (JSONL, CSV) or the row from 1 (Parquet)."""
    if path.suffix.lower() not in _READERS:
        raise ManifestError(f"manifest {path}: expected a file ending in {', '.join(_READERS)}")
    with path.open("rb") as file:
        head = file.read(6)
    for magic, kind in _PACKED.items():
        if head.startswith(magic):
            raise ManifestError(f"manifest {path} is a {kind} file; unpack it and give what it holds")
    yield from _READERS[path.suffix.lower()](path)


def _jsonl(path: Path) -> Iterator[Cells]:
    # newline="\n": a lone carriage return inside a caption must not split the row.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as lines:
        for number in range(1, sys.maxsize):
            line = lines.readline(MAX_ROW_CHARS + 1)
            if not line:
                return
            if len(line) > MAX_ROW_CHARS:
                while line and not line.endswith("\n"):
                    line = lines.readline(MAX_ROW_CHARS)
                yield number, f"is over {MAX_ROW_CHARS} characters"
            elif line.strip():
                yield number, _json_cells(line)


def _json_cells(line: str) -> dict[str, Any] | str:
    try:
        line.encode()
        cells = json.loads(line)
    except UnicodeEncodeError:
        return "is not UTF-8"
    except (ValueError, RecursionError) as error:
        return f"is not JSON: {error}"
    return cells if isinstance(cells, dict) else f"expected a JSON object, found {type(cells).__name__}"


def _csv(path: Path) -> Iterator[Cells]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        csv.field_size_limit(MAX_ROW_CHARS)
        lines = _RecordLines(path, file)
        reader = csv.reader(lines, strict=True)
        try:
            header = next(reader, [])
            lines.begin()
            if "captions" in header and not set(header).intersection(CAPTION_KEYS[:-1]):
                raise ManifestError(
                    f"{path}: CSV holds no lists, so none of captions; give each its own row, in a column "
                    "'caption', or write the manifest as JSON lines"
                )
            for cells in reader:
                lines.begin()
                if len(cells) > len(header):
                    yield reader.line_num, f"has more cells than the header's {len(header)}"
                elif cells:
                    yield reader.line_num, dict(zip(header, cells, strict=False))
        except (csv.Error, UnicodeDecodeError) as error:
            raise ManifestError(f"{path}: line {reader.line_num + 1} is not CSV: {error}") from error


class _RecordLines:
    """The lines of a CSV file; ManifestError where those of one record, which may be many, are too long."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self._path, self._file, self._number, self._chars = path, file, 0, 0

    def begin(self) -> None:
        """The next line begins a record."""
        self._chars = 0

    def __iter__(self) -> Iterator[str]:
        while line := self._file.readline(MAX_ROW_CHARS + 1):
            self._number += 1
            self._chars += len(line)
            if self._chars > MAX_ROW_CHARS:
                raise ManifestError(
                    f"{self._path}: the row that ends in line {self._number} or later is over "
                    f"{MAX_ROW_CHARS} characters; is a quote missing?"
                )
            yield line


def _parquet(path: Path) -> Iterator[Cells]:
    """Texts are read as dictionaries: a long one that stands in a million rows is then held once."""
    try:
        texts = _text_columns(path)
        with pq.ParquetFile(path, read_dictionary=texts) as file:
            number = 0
            for batch in file.iter_batches(_PARQUET_ROWS):
                for column in batch.columns:
                    if _is_list(column.type):
                        _refuse_long_list(path, column)
                        column = column.values
                    if pa.types.is_dictionary(column.type):
                        _refuse_long_text(path, column.dictionary)
                # A list may hold one long text many times: such rows are made one by one.
                lists = any(_is_list(column.type) for column in batch.columns)
                step = 1 if lists else batch.num_rows
                for start in range(0, batch.num_rows, step):
                    for cells in batch.slice(start, step).to_pylist():
                        number += 1
                        yield number, cells
    # Beside Arrow's own: text that is not UTF-8, dates and time zones that Python does not have.
    except (pa.ArrowException, OSError, ValueError, OverflowError, KeyError) as error:
        raise ManifestError(f"{path} is not a Parquet file that can be read: {error}") from error


def _text_columns(path: Path) -> list[str]:
    """Names of the columns of texts and bytes; ManifestError where a row may be too large."""
    with pq.ParquetFile(path) as file:
        columns = [file.schema.column(i) for i in range(len(file.schema))]
        nested = {
            name
            for name, kind in _kinds(file.schema_arrow)
            if pa.types.is_nested(kind) and not (name in CAPTION_KEYS and _is_list_of_texts(kind))
        }
        if nested:
            raise ManifestError(
                f"{path}: the columns {', '.join(sorted(nested))} hold lists, maps or structs; columns of "
                "single values, and lists of captions, are taken from Parquet: leave these out, or write the "
                "manifest as JSON lines"
            )
        for group in map(file.metadata.row_group, range(file.metadata.num_row_groups)):
            most = max((group.column(i).num_values for i in range(group.num_columns)), default=0)
            if most > max(group.num_rows, _PARQUET_ROWS) * MAX_CAPTIONS:
                raise ManifestError(
                    f"{path}: {most} values in {group.num_rows} rows; at most {MAX_CAPTIONS} captions a row "
                    "are taken"
                )
            if group.total_byte_size > max(group.num_rows, _PARQUET_ROWS) * MAX_ROW_CHARS:
                raise ManifestError(
                    f"{path}: {group.num_rows} rows unpack to {group.total_byte_size} bytes; "
                    f"at most {MAX_ROW_CHARS} bytes a row are taken"
                )
    longest = max((column.length for column in columns), default=0)
    if longest > MAX_ROW_CHARS:
        raise ManifestError(f"{path}: a column of {longest} bytes a row; at most {MAX_ROW_CHARS} are taken")
    return [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]


def _kinds(schema: pa.Schema) -> list[tuple[str, pa.DataType]]:
    return list(zip(schema.names, schema.types, strict=True))


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _is_list_of_texts(kind: pa.DataType) -> bool:
    return _is_list(kind) and (
        pa.types.is_string(kind.value_type) or pa.types.is_large_string(kind.value_type)
    )


def _refuse_long_list(path: Path, lists: pa.Array) -> None:
    longest = pc.max(pc.list_value_length(lists)).as_py() or 0
    if longest > MAX_CAPTIONS:
        raise ManifestError(f"{path}: a row of {longest} captions; at most {MAX_CAPTIONS} are taken")


def _refuse_long_text(path: Path, texts: pa.Array) -> None:
    if pa.types.is_string(texts.type) or pa.types.is_binary(texts.type):
        longest = pc.max(pc.binary_length(texts)).as_py() or 0
        if longest > MAX_ROW_CHARS:
            raise ManifestError(f"{path}: a text of {longest} bytes; at most {MAX_ROW_CHARS} are taken")


_READERS = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
SUFFIXES = tuple(_READERS)
