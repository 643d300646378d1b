"""Files of the same bytes: the earlier row is named, and only files that may be the same are read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import copies as module
from pipeline.copies import Copies
from pipeline.source import content_digest
from schemas.ledger import Ledger
from schemas.manifest import ManifestRow

CONTENTS = {"a": b"one", "b": b"two", "c": b"one", "d": b"three", "e": b"one", "f": b"two"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copies")
    for name, content in CONTENTS.items():
        (folder / name).write_bytes(content)
    return folder


def row(number: int, folder: Path, name: str, caption: str = "x") -> ManifestRow:
    return ManifestRow(number, name, str(folder / name), caption)


@given(
    st.lists(st.tuples(st.sampled_from(sorted(CONTENTS)), st.sampled_from("xy")), unique=True, max_size=12),
    st.integers(0, 6),
)
def test_the_earlier_row_of_the_same_content_is_found(
    folder: Path, asked: list[tuple[str, str]], ahead: int
) -> None:
    """However far the reader is ahead."""
    rows = [row(number, folder, name, caption) for number, (name, caption) in enumerate(asked, 1)]
    with Ledger() as ledger, Copies(ledger) as copies:
        first: dict[tuple[bytes, str], int] = {}
        stands: dict[bytes, str] = {}
        watched = 0
        for position, each in enumerate(rows):
            while watched < min(len(rows), position + 1 + ahead):
                copies.watch(rows[watched])
                watched += 1
            content = CONTENTS[each.source]
            expected = (
                first.get((content, each.caption)),
                stands.setdefault(content, each.path),
            )
            assert copies.first_row(each) == expected
            first.setdefault((content, each.caption), each.number)


def test_a_file_is_read_only_where_another_has_its_size(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def counted(path: str) -> str:
        read.append(os.path.basename(path))
        return content_digest(path)

    monkeypatch.setattr(module, "content_digest", counted)
    rows = [row(number, folder, name) for number, name in enumerate("adbaec", 1)]
    with Ledger() as ledger, Copies(ledger) as copies:
        for each in rows:
            copies.watch(each)
        found = [copies.first_row(each)[0] for each in rows]
    assert sorted(read) == ["a", "b", "c", "e"]
    assert found == [None, None, None, 1, 1, 1]


def test_a_file_that_goes_away_is_no_copy_of_another(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "g").write_bytes(b"one")
    rows = [row(1, folder, "a"), row(2, tmp_path, "g"), row(3, tmp_path, "h")]
    with Ledger() as ledger, Copies(ledger) as copies:
        copies.watch(rows[0])
        os.unlink(tmp_path / "g")
        copies.watch(rows[1])
        copies.watch(rows[2])
        assert [copies.first_row(each)[0] for each in rows] == [None, None, None]


def test_rows_that_turn_out_bad_leave_nothing_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody asks for their first row, however many files of one size there are."""
    monkeypatch.setattr(module, "_MOST_READING", 2)
    with Ledger() as ledger, Copies(ledger) as copies:
        for number, name in enumerate("abcef", 1):
            copies.watch(row(number, folder, name))
            assert len(copies._reading) <= 2
        assert copies.first_row(row(6, folder, "e", "other")) == (None, str(folder / "a"))
