"""Manifests: three file types, aliases, relative paths, and a sentence for every bad row."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.errors import ManifestError
from schemas.ledger import Ledger
from schemas.manifest import ManifestRow, RowProblem, checked_rows, read_manifest, split_rows, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def rows_of(path: Path) -> tuple[list[ManifestRow], list[RowProblem]]:
    return split_rows(read_manifest(path))


def write_jsonl(path: Path, rows: list[dict[str, Any]], *, bom: bool = False, newline: str = "\n") -> Path:
    text = newline.join(json.dumps(row) for row in rows) + newline
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + text.encode())
    return path


ROWS: list[dict[str, Any]] = [
    {"video": "a.mp4", "caption": "one", "start_s": 1.5, "end_s": 9.0, "tags": "x"},
    {"video": "b.mp4", "caption": "two"},
]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl-bom-crlf", "csv", "parquet"])
def test_the_three_kinds_give_the_same_rows(folder: Path, kind: str) -> None:
    if kind.startswith("jsonl"):
        crlf = kind != "jsonl"
        path = write_jsonl(folder / "m.jsonl", ROWS, bom=crlf, newline="\r\n" if crlf else "\n")
    elif kind == "csv":
        path = folder / "m.csv"
        path.write_text("video,caption,start_s,end_s,tags\na.mp4,one,1.5,9.0,x\nb.mp4,two,,,\n")
    else:
        path = folder / "m.parquet"
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    rows, problems = rows_of(path)
    assert problems == []
    first, second = rows
    assert (first.source, first.caption, first.start_s, first.end_s) == ("a.mp4", "one", 1.5, 9.0)
    assert first.path == str(folder / "a.mp4")
    assert first.extra == {"tags": "x"}
    assert (second.source, second.start_s, second.end_s) == ("b.mp4", None, None)


@pytest.mark.parametrize("video", ["video", "video_path", "path", "media_path", "file_name"])
@pytest.mark.parametrize("caption", ["caption", "text", "cap"])
def test_aliases(folder: Path, video: str, caption: str) -> None:
    rows, problems = rows_of(write_jsonl(folder / "m.jsonl", [{video: "a.mp4", caption: "hi"}]))
    assert problems == []
    assert (rows[0].source, rows[0].caption) == ("a.mp4", "hi")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"caption": "x"}, "no_video"),
        ({"video": "a.mp4"}, "no_caption"),
        ({"video": "a.mp4", "caption": "  "}, "no_caption"),
        ({"video": "a.mp4", "caption": 3}, "no_caption"),
        ({"video": "a.mp4", "caption": "a\0b"}, "bad_caption"),
        ({"video": "a.mp4", "caption": "\ud800"}, "bad_caption"),
        ({"video": "a.mp4", "caption": "x" * 70_000}, "bad_caption"),
        ({"video": "a\0.mp4", "caption": "x"}, "bad_path"),
        ({"video": "https://example.com/a.mp4", "caption": "x"}, "remote"),
        ({"video": "a.mp4", "caption": "x", "start_s": -1}, "bad_window"),
        ({"video": "a.mp4", "caption": "x", "start_s": "soon"}, "bad_window"),
        ({"video": "a.mp4", "caption": "x", "start_s": 10**400}, "bad_window"),
        ({"video": "a.mp4", "caption": "x", "start_s": 5, "end_s": 5}, "bad_window"),
        ({"video": "gone.mp4", "caption": "x"}, "missing_file"),
        ({"video": ".", "caption": "x"}, "not_a_file"),
    ],
)
def test_a_bad_row_is_named_and_its_neighbour_kept(folder: Path, row: dict[str, Any], reason: str) -> None:
    path = write_jsonl(folder / "m.jsonl", [row, {"video": "b.mp4", "caption": "fine"}])
    rows, problems = rows_of(path)
    assert [r.source for r in rows] == ["b.mp4"]
    assert [(p.number, p.reason) for p in problems] == [(1, reason)]
    assert str(problems[0]).startswith("row 1")


def test_the_first_filled_alias_wins_and_the_others_are_carried_through(folder: Path) -> None:
    row = {"video": "a.mp4", "path": "elsewhere", "caption": "", "text": "said", "cap": "too"}
    rows, problems = rows_of(write_jsonl(folder / "m.jsonl", [row]))
    assert problems == []
    assert (rows[0].source, rows[0].caption) == ("a.mp4", "said")
    assert rows[0].extra == {"path": "elsewhere", "cap": "too"}
    write_manifest(folder / "again.jsonl", rows)
    (again,), problems = rows_of(folder / "again.jsonl")
    assert problems == []
    assert (again.source, again.caption) == ("a.mp4", "said")


@pytest.mark.parametrize("name", ["good.csv", "good.parquet", "good"])
def test_a_manifest_is_written_under_a_name_that_reads_back(folder: Path, name: str) -> None:
    with pytest.raises(ManifestError, match=r"ending in \.jsonl"):
        write_manifest(folder / name, [])
    assert not (folder / name).exists()


def test_the_start_of_the_file_is_one_window_however_it_is_said(folder: Path) -> None:
    base = {"video": "a.mp4", "caption": "x"}
    rows, (problem,) = rows_of(write_jsonl(folder / "m.jsonl", [base, {**base, "start_s": 0}]))
    assert rows[0].start_s is None
    assert problem.reason == "duplicate"


def test_what_pandas_writes_is_read(folder: Path) -> None:
    (folder / "m.csv").write_text(",video,caption,end_s\n0,a.mp4,one,\n1,b.mp4,two,2.5,9\n")
    rows, problems = rows_of(folder / "m.csv")
    assert [(row.source, row.end_s) for row in rows] == [("a.mp4", None)]
    assert [problem.message for problem in problems] == ["has more cells than the header's 4"]
    table = pa.table({"video": ["a.mp4"], "caption": ["x"], "start_s": [float("nan")]})
    pq.write_table(table, folder / "m.parquet")
    assert rows_of(folder / "m.parquet")[0][0].start_s is None


def test_an_endless_line_costs_itself(folder: Path) -> None:
    path = write_jsonl(folder / "m.jsonl", [{"video": "a.mp4", "caption": "x" * 3_000_000}, ROWS[1]])
    rows, problems = rows_of(path)
    assert [(problem.number, problem.reason) for problem in problems] == [(1, "bad_row")]
    assert [(row.number, row.source) for row in rows] == [(2, "b.mp4")]


def test_lines_that_are_no_rows(folder: Path) -> None:
    path = folder / "m.jsonl"
    path.write_bytes(b'{"video": "a.mp4"\n[1]\n\n\xff\xfe\n{"video": "a.mp4", "caption": "x"}\n')
    rows, problems = rows_of(path)
    assert [p.number for p in problems] == [1, 2, 4]
    assert all(p.reason == "bad_row" for p in problems)
    assert [r.number for r in rows] == [5]


def test_repeated_rows_are_named_but_another_caption_or_window_is_not_a_repeat(folder: Path) -> None:
    base = {"video": "a.mp4", "caption": "x"}
    path = write_jsonl(
        folder / "m.jsonl",
        [base, {**base, "caption": "y"}, {**base, "start_s": 1}, {**base, "video": "./a.mp4"}],
    )
    rows, problems = rows_of(path)
    assert len(rows) == 3
    assert [(p.number, p.reason) for p in problems] == [(4, "duplicate")]
    assert "repeats row 1" in problems[0].message


def test_files_that_are_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="does not exist"):
        list(read_manifest(tmp_path / "m.jsonl"))
    (tmp_path / "m.txt").write_text("x")
    with pytest.raises(ManifestError, match=r"ending in \.jsonl"):
        list(read_manifest(tmp_path / "m.txt"))
    (tmp_path / "m.parquet").write_text("x")
    with pytest.raises(ManifestError, match="not a Parquet file"):
        list(read_manifest(tmp_path / "m.parquet"))
    (tmp_path / "m.csv").write_text('video,caption\n"a.mp4,x\n')
    with pytest.raises(ManifestError, match="not CSV"):
        list(read_manifest(tmp_path / "m.csv"))


def test_rows_stream_through_the_check_in_order(folder: Path) -> None:
    """Each item before the next one is read."""
    rows = [{"video": name, "caption": "x"} for name in ("a.mp4", "gone.mp4", "a.mp4", "b.mp4")]
    read: list[int] = []

    def watched() -> Iterator[ManifestRow | RowProblem]:
        for item in read_manifest(write_jsonl(folder / "m.jsonl", rows)):
            read.append(item.number)
            yield item

    with Ledger() as ledger:
        found = []
        for item in checked_rows(watched(), ledger=ledger):
            assert read[-1] == item.number
            found.append(item.reason if isinstance(item, RowProblem) else item.source)
    assert found == ["a.mp4", "missing_file", "duplicate", "b.mp4"]


def test_a_manifest_may_be_written_over_itself_and_a_failure_leaves_it(folder: Path) -> None:
    path = write_jsonl(folder / "m.jsonl", [*ROWS, {"video": "a.mp4"}])
    before = path.read_bytes()

    def failing() -> Iterator[ManifestRow]:
        yield from rows_of(path)[0]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_manifest(path, failing())
    assert path.read_bytes() == before
    write_manifest(path, (item for item in read_manifest(path) if isinstance(item, ManifestRow)))
    rows, problems = rows_of(path)
    assert ([row.source for row in rows], problems) == (["a.mp4", "b.mp4"], [])
    assert sorted(entry.name for entry in folder.iterdir()) == ["a.mp4", "b.mp4", "m.jsonl"]


def test_urls_are_carried_as_they_are(tmp_path: Path) -> None:
    url = "https://example.com/a.mp4?b=c"
    (tmp_path / "m.jsonl").write_text(json.dumps({"video": url, "caption": "x"}) + "\n")
    (row,) = read_manifest(tmp_path / "m.jsonl")
    assert isinstance(row, ManifestRow)
    assert row.path == row.source == url
    write_manifest(tmp_path / "deep" / "n.jsonl", [row])
    (again,) = read_manifest(tmp_path / "deep" / "n.jsonl")
    assert isinstance(again, ManifestRow)
    assert again.path == url


def test_a_csv_row_is_bounded_over_all_its_lines(folder: Path) -> None:
    path = folder / "m.csv"
    path.write_text("video,caption\n" + '"a\n",' * 400_000 + "x\n")
    with pytest.raises(ManifestError, match="is over 1048576 characters"):
        list(read_manifest(path))
    path.write_text("video,caption\n" + "\n" * 1_100_000 + 'a.mp4,"two\nlines"\n' + "b.mp4,x\n" * 150_000)
    read = list(read_manifest(path))
    assert len(read) == 150_001
    assert isinstance(read[0], ManifestRow)
    assert (read[0].caption, read[0].number) == ("two\nlines", 1_100_003)


def not_utf8() -> pa.Array:
    offsets = pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 3)))
    return pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(b"\xff\xfe\xfd")])


@pytest.mark.parametrize(
    "column",
    [
        pa.array([2**31 - 1], pa.date32()),
        pa.array([2**52], pa.timestamp("ms")),
        pa.array([1], pa.timestamp("us", tz="Mars/Olympus")),
        not_utf8(),
    ],
    ids=["date", "timestamp", "zone", "text"],
)
def test_parquet_values_that_python_does_not_have_are_one_error(folder: Path, column: pa.Array) -> None:
    pq.write_table(pa.table({"video": ["a.mp4"], "caption": ["x"], "z": column}), folder / "m.parquet")
    with pytest.raises(ManifestError, match="not a Parquet file that can be read"):
        list(read_manifest(folder / "m.parquet"))


LONG = 3_000_000


@pytest.mark.parametrize(
    "value",
    [
        pa.array([b"x" * LONG]),
        pa.array([b"x" * LONG], pa.large_binary()),
        pa.array(["x" * LONG], pa.large_string()),
        pa.array([b"x" * LONG], pa.binary(LONG)),
        pa.array([["x" * LONG]]),
    ],
    ids=["binary", "large_binary", "large_string", "fixed", "list"],
)
def test_a_few_bytes_of_parquet_do_not_stand_for_many(folder: Path, value: pa.Array) -> None:
    """One long value in each of 200 rows, stored once."""
    table = pa.table({"video": ["a.mp4"] * 200, "caption": ["x"] * 200, "z": value.take(pa.array([0] * 200))})
    pq.write_table(table, folder / "m.parquet", compression="zstd", dictionary_pagesize_limit=1 << 30)
    with pytest.raises(ManifestError, match=r"at most 1048576|hold lists"):
        list(read_manifest(folder / "m.parquet"))


def test_columns_of_every_plain_kind_are_carried_through_from_parquet(folder: Path) -> None:
    table = pa.table(
        {
            "video": pa.array(["a.mp4"], pa.large_string()),
            "caption": pa.array(["x"]).dictionary_encode(),
            "id": [7],
            "raw": pa.array([b"\xff"]),
            "long": pa.array(["y"], pa.large_string()),
            "a.b": ["dotted"],
        }
    )
    pq.write_table(table, folder / "m.parquet")
    (row,) = rows_of(folder / "m.parquet")[0]
    assert row.extra == {"id": 7, "raw": b"\xff", "long": "y", "a.b": "dotted"}


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "parquet-large"])
@pytest.mark.parametrize("column", ["caption", "captions", "cap", "text"])
def test_a_list_of_captions_makes_a_row_with_each(folder: Path, kind: str, column: str) -> None:
    cells: list[dict[str, Any]] = [
        {"video": "a.mp4", column: ["one", "two"], "end_s": 2.0, "tag": "x"},
        {"video": "b.mp4", column: ["three"]},
    ]
    if kind == "jsonl":
        path = write_jsonl(folder / "m.jsonl", cells)
    else:
        path, table = folder / "m.parquet", pa.Table.from_pylist(cells)
        if kind == "parquet-large":
            field = pa.field(column, pa.large_list(pa.large_string()))
            table = table.cast(table.schema.set(table.schema.get_field_index(column), field))
        pq.write_table(table, path)
    rows, problems = rows_of(path)
    assert problems == []
    assert [(row.number, row.source, row.caption, row.end_s) for row in rows] == [
        (1, "a.mp4", "one", 2.0),
        (1, "a.mp4", "two", 2.0),
        (2, "b.mp4", "three", None),
    ]
    assert rows[0].extra == rows[1].extra == {"tag": "x"}
    write_manifest(folder / "again.jsonl", rows)
    assert [row.caption for row in rows_of(folder / "again.jsonl")[0]] == ["one", "two", "three"]


def test_captions_of_a_list_that_cannot_be_used_are_named_and_the_others_kept(folder: Path) -> None:
    path = write_jsonl(
        folder / "m.jsonl",
        [
            {"video": "a.mp4", "captions": ["one", "", None, 3, "one", ["two"]]},
            {"video": "b.mp4", "captions": []},
            {"video": "b.mp4", "captions": ["x"] * 65},
            {"video": "c.mp4", "caption": ["x", "y"], "captions": ["z"]},
        ],
    )
    rows, problems = rows_of(path)
    assert [row.caption for row in rows] == ["one"]
    assert [problem.reason for problem in problems] == [
        *["no_caption"] * 3,
        "duplicate",
        *["no_caption"] * 2,
        *["bad_caption"] * 2,
    ]
    assert str(problems[3]) == "row 1 (a.mp4): caption 5 of its list repeats caption 1; remove one"
    assert "caption ['two']; expected text, or a list of texts, in one of caption, text, cap" in str(
        problems[4]
    )
    assert str(problems[-2]) == "row 3 (b.mp4): has 65 captions; at most 64 are taken"
    assert "has both caption and captions; expected one of them" in str(problems[-1])


def test_csv_has_no_list_of_captions(folder: Path) -> None:
    (folder / "m.csv").write_text("video,captions\na.mp4,\"['one', 'two']\"\n")
    with pytest.raises(ManifestError, match="CSV holds no lists"):
        list(read_manifest(folder / "m.csv"))
    (folder / "m.csv").write_text("video,caption,captions\na.mp4,one,two\n")
    (rows, (problem,)) = rows_of(folder / "m.csv")
    assert (rows, problem.reason) == ([], "bad_caption")


@pytest.mark.parametrize("caption", ['["one", "two"]', "['one', \"it's\"]", ' [ "one" ]\n'])
def test_a_list_written_as_text_is_refused(folder: Path, caption: str) -> None:
    with (folder / "m.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["video", "caption"], ["a.mp4", caption], ["a.mp4", "[one] 'two' [3]"]])
    ((row,), (problem,)) = rows_of(folder / "m.csv")
    assert row.caption == "[one] 'two' [3]"
    assert "is a list written as text; expected each caption in its own row" in str(problem)


@pytest.mark.parametrize(
    ("captions", "said"),
    [
        ([["x"] * 65], "a row of 65 captions; at most 64"),
        ([["x"] * 1_000_000], "at most 64 captions a row"),
        ([["x"], ["x" * LONG]], "at most 1048576"),
        ([[1]], "hold lists"),
    ],
    ids=["long", "endless", "text", "numbers"],
)
def test_lists_of_captions_in_parquet_are_bounded(folder: Path, captions: list[Any], said: str) -> None:
    table = pa.table({"video": ["a.mp4"] * len(captions), "captions": captions})
    pq.write_table(table, folder / "m.parquet", dictionary_pagesize_limit=1 << 30)
    with pytest.raises(ManifestError, match=said):
        list(read_manifest(folder / "m.parquet"))
