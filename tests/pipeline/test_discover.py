"""Folders of videos become rows; what cannot is reported."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.discover import discover, search
from schemas.errors import ManifestError
from schemas.manifest import ManifestRow, RowProblem


def put(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def captions(folder: Path) -> dict[str, str]:
    return {row.source: row.caption for row in discover(folder) if isinstance(row, ManifestRow)}


def problems(folder: Path) -> dict[str | None, str]:
    return {item.source: item.reason for item in discover(folder) if isinstance(item, RowProblem)}


def test_sidecar_captions_are_found_at_any_depth_in_sorted_order(tmp_path: Path) -> None:
    put(
        tmp_path,
        {"b.mp4": "", "b.txt": " two \n", "a/z.MKV": "", "a/z.txt": "\ufeffone", "c.gif": "", "c.txt": "3"},
    )
    assert list(captions(tmp_path).items()) == [("b.mp4", "two"), ("c.gif", "3"), ("a/z.MKV", "one")]
    assert [item.number for item in discover(tmp_path)] == [1, 2, 3]


def test_a_video_without_a_caption_is_a_problem_and_a_caption_without_a_video_is_listed(
    tmp_path: Path,
) -> None:
    put(tmp_path, {"a.mp4": "", "a.txt": "yes", "b.mp4": "", "c.mp4": "", "c.txt": "  ", "d.txt": "lonely"})
    assert captions(tmp_path) == {"a.mp4": "yes"}
    assert problems(tmp_path) == {"b.mp4": "no_caption", "c.mp4": "no_caption"}
    assert search(tmp_path).unused_captions == ["d.txt"]


def test_a_caption_that_is_not_utf8_is_a_problem(tmp_path: Path) -> None:
    put(tmp_path, {"a.mp4": ""})
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    assert problems(tmp_path) == {"a.mp4": "bad_caption"}


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_metadata_files_give_captions_relative_to_themselves(tmp_path: Path, kind: str) -> None:
    put(tmp_path, {"sub/a.mp4": "", "sub/b.mp4": "", "sub/b.txt": "from the sidecar"})
    cells = {"file_name": "a.mp4", "text": "from metadata", "tag": "x"}
    path = tmp_path / "sub" / f"metadata.{kind}"
    if kind == "jsonl":
        path.write_text(json.dumps(cells) + "\n")
    elif kind == "csv":
        path.write_text(",".join(cells) + "\n" + ",".join(cells.values()) + "\n")
    else:
        pq.write_table(pa.Table.from_pylist([cells]), path)
    rows = [item for item in discover(tmp_path) if isinstance(item, ManifestRow)]
    assert [(row.source, row.caption) for row in rows] == [
        ("sub/a.mp4", "from metadata"),
        ("sub/b.mp4", "from the sidecar"),
    ]
    assert rows[0].extra == {"tag": "x"}
    assert rows[0].path == str(tmp_path / "sub" / "a.mp4")


def test_metadata_may_hold_several_windows_of_one_video_and_wins_over_its_sidecar(tmp_path: Path) -> None:
    put(tmp_path, {"a.mp4": "", "a.txt": "not used"})
    lines = [{"video": "a.mp4", "caption": f"part {k}", "start_s": k, "end_s": k + 1} for k in range(2)]
    put(tmp_path, {"metadata.jsonl": "".join(json.dumps(line) + "\n" for line in lines) + "{}\n"})
    items = list(discover(tmp_path))
    assert [(item.caption, item.start_s) for item in items if isinstance(item, ManifestRow)] == [
        ("part 0", None),
        ("part 1", 1.0),
    ]
    assert [item.message for item in items if isinstance(item, RowProblem)] == [
        "has no video; expected one of the columns video, video_path, path, media_path, file_name "
        "(metadata.jsonl, row 3)"
    ]


def test_metadata_may_hold_several_captions_of_one_video(tmp_path: Path) -> None:
    put(tmp_path, {"a.mp4": "", "a.txt": "not used", "b.mp4": "", "b.txt": "b"})
    put(tmp_path, {"metadata.jsonl": json.dumps({"file_name": "a.mp4", "captions": ["one", "two"]}) + "\n"})
    rows = [item for item in discover(tmp_path) if isinstance(item, ManifestRow)]
    assert [(row.number, row.source, row.caption) for row in rows] == [
        (1, "a.mp4", "one"),
        (2, "a.mp4", "two"),
        (3, "b.mp4", "b"),
    ]


def test_a_folder_reached_through_a_link_gives_each_video_once(tmp_path: Path) -> None:
    put(tmp_path / "real", {"a.mp4": "", "metadata.csv": "path,cap\na.mp4,one\n"})
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    assert captions(tmp_path / "link") == {"a.mp4": "one"}
    assert problems(tmp_path / "link") == {}


def test_hidden_files_are_skipped_and_links_are_followed_once(tmp_path: Path) -> None:
    put(tmp_path, {"real/a.mp4": "", "real/a.txt": "a", ".hidden/b.mp4": "", ".c.mp4": ""})
    (tmp_path / "real" / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "again").symlink_to(tmp_path / "real", target_is_directory=True)
    assert captions(tmp_path) == {"again/a.mp4": "a"}
    assert problems(tmp_path) == {}


def test_a_pipe_is_never_opened(tmp_path: Path) -> None:
    put(tmp_path, {"a.mp4": ""})
    os.mkfifo(tmp_path / "a.txt")
    assert problems(tmp_path) == {"a.mp4": "no_caption"}


@pytest.mark.parametrize("name", ["notes.txt", "empty/.keep"])
def test_a_folder_without_videos_is_refused(tmp_path: Path, name: str) -> None:
    put(tmp_path, {name: "x"})
    with pytest.raises(ManifestError, match="holds no video"):
        search(tmp_path)
    with pytest.raises(ManifestError, match="does not exist"):
        search(tmp_path / "nowhere")


def test_metadata_may_name_urls(tmp_path: Path) -> None:
    url = "https://example.com/a.mp4"
    put(
        tmp_path,
        {"deep/metadata.jsonl": json.dumps({"file_name": url, "text": "far"}), "b.mp4": "", "b.txt": "x"},
    )
    rows = [row for row in discover(tmp_path) if isinstance(row, ManifestRow)]
    assert [(row.source, row.caption) for row in rows] == [(url, "far"), ("b.mp4", "x")]
    assert rows[0].path == url
