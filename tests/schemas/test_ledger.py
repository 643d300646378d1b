"""The index of a manifest on disk: what was there before, exactly."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import RunError
from schemas.ledger import Finding, Ledger

KEYS = st.tuples(st.sampled_from(["/a", "/b"]), st.sampled_from([None, 0.0, 1.5]), st.sampled_from("xy"))


@given(st.lists(KEYS, max_size=30))
def test_the_first_row_of_a_key_is_remembered(keys: list[tuple[object, ...]]) -> None:
    with Ledger() as ledger:
        seen: dict[tuple[object, ...], int] = {}
        for number, key in enumerate(keys):
            assert ledger.first_row("asked", key, number) == seen.get(key)
            seen.setdefault(key, number)
        for key in seen:
            assert ledger.first_row("stored", key, 99) is None


def test_findings_come_back_by_row_even_with_names_that_are_no_text() -> None:
    with Ledger() as ledger:
        for number, source in ((7, "b"), (2, None), (7, "\udcff.mp4")):
            ledger.add_finding("problem", Finding(number, source, "bad", f"no: {source}"))
        ledger.add_finding("warning", Finding(1, "a", "odd", ""))
        assert [(f.number, f.source) for f in ledger.findings("problem")] == [
            (2, None),
            (7, "b"),
            (7, "\udcff.mp4"),
        ]
        assert list(ledger.findings("warning")) == [Finding(1, "a", "odd", "")]


def test_only_files_of_equal_size_are_read_and_the_first_of_a_content_stands_for_it() -> None:
    with Ledger() as ledger:
        sizes = {"/a": 1, "/b": 2, "/c": 1, "/d": 1}
        assert all(ledger.add_file(path) for path in sizes)
        assert not ledger.add_file("/a")
        assert [ledger.to_compare(path, size) for path, size in sizes.items()] == [
            [],
            [],
            ["/a", "/c"],
            ["/d"],
        ]
        for path, digest in (("/a", "1"), ("/c", "2"), ("/d", "1")):
            ledger.note_content(path, digest)
        assert [ledger.first_copy(path) for path in sizes] == ["/a", "/b", "/c", "/a"]


def test_a_full_disk_says_what_to_do() -> None:
    def fill() -> None:
        with Ledger() as ledger:
            ledger._db.execute("PRAGMA max_page_count = 20")
            for number in range(10_000):
                ledger.first_row("asked", (number,), number)

    with pytest.raises(RunError, match=r"temporary folder .* full; .* TMPDIR"):
        fill()
