"""Sealed Parquet: what was written comes back, and every byte of it is held to the seal."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.errors import DatasetError
from schemas.tables import SealedWriter, open_sealed, read_sealed, seal_of, sealed_parquet

TABLE = pa.table({"name": [f"row {i}" for i in range(300)], "at": list(range(300))})


def test_a_sealed_table_comes_back_and_any_reader_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    path.write_bytes(sealed_parquet(TABLE))
    assert read_sealed(path, remedy="").equals(TABLE)
    assert read_sealed(path, columns=["at"], remedy="").equals(TABLE.select(["at"]))
    assert pq.read_table(path).equals(TABLE)
    assert sealed_parquet(TABLE) == path.read_bytes()


def test_tables_written_one_by_one_are_row_groups(tmp_path: Path) -> None:
    file = io.BytesIO()
    with SealedWriter(file, TABLE.schema) as writer:
        for part in (TABLE.slice(0, 100), TABLE.slice(0, 0), TABLE.slice(100)):
            writer.write(part)
    (tmp_path / "t.parquet").write_bytes(file.getvalue())
    opened = open_sealed(tmp_path / "t.parquet", remedy="")
    assert opened.num_row_groups == 2
    assert opened.read().equals(TABLE)


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    path, data = tmp_path / "t.parquet", sealed_parquet(TABLE.slice(0, 20))
    for at in range(len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << at % 8
        path.write_bytes(flipped)
        with pytest.raises(DatasetError, match=r"t\.parquet cannot be read: .*; call for help"):
            read_sealed(path, remedy="call for help")


def test_a_table_without_a_seal_or_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(TABLE, path)
    with pytest.raises(DatasetError, match="holds no seal"):
        read_sealed(path, remedy="")
    path.write_bytes(sealed_parquet(TABLE)[:-100])
    with pytest.raises(DatasetError, match="cannot be read"):
        read_sealed(path, remedy="")
    with pytest.raises(FileNotFoundError):
        read_sealed(tmp_path / "none.parquet", remedy="")


def test_a_folder_whose_name_is_no_text_is_read_alike(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"f\xef")
    folder.mkdir()
    table = pa.table({"a": [1, 2]})
    (folder / "a.parquet").write_bytes(sealed_parquet(table))
    assert read_sealed(folder / "a.parquet", remedy="").equals(table)


def test_the_seal_of_a_file_is_what_it_hashes_to_with_zeros_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(sealed_parquet(pa.table({"a": list(range(1000))})))
    seal = seal_of(path)
    assert hashlib.sha256(path.read_bytes().replace(seal.encode(), b"0" * 64)).hexdigest() == seal
