"""Source identity: content decides, stat only says when to look again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.source import Source, content_digest, identify, sampled_digest
from schemas.errors import ManifestError


def test_content_is_the_identity_whatever_the_name_or_time(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"x" * 1000)
    b.write_bytes(b"x" * 1000)
    os.utime(b, (1, 1))
    found = identify([str(a), str(b), str(a)], mode="content", known={})
    assert found[str(a)].digest == found[str(b)].digest == f"content:{content_digest(str(a))}"
    b.write_bytes(b"x" * 999 + b"y")
    assert identify([str(b)], mode="content", known={})[str(b)].digest != found[str(b)].digest


def test_an_untouched_file_is_not_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x")
    stat = path.stat()
    known = {(str(path), stat.st_size, stat.st_mtime_ns): "content:recorded"}
    assert identify([str(path)], mode="content", known=known)[str(path)].digest == "content:recorded"
    assert identify([str(path)], mode="sampled", known=known)[str(path)].digest.startswith("sampled:")
    os.utime(path, ns=(5, 5))
    assert identify([str(path)], mode="content", known=known)[str(path)] == Source(
        f"content:{content_digest(str(path))}", 1, 5
    )


def test_sampled_identity_sees_size_head_tail_and_blocks(tmp_path: Path) -> None:
    path = tmp_path / "a"
    data = bytearray(os.urandom(4 << 20))
    path.write_bytes(data)
    seen = {sampled_digest(str(path))}
    for position in (0, len(data) - 1):
        data[position] ^= 1
        path.write_bytes(data)
        seen.add(sampled_digest(str(path)))
    path.write_bytes(data + b"\0")
    seen.add(sampled_digest(str(path)))
    assert len(seen) == 4


def test_every_unreadable_file_is_named(tmp_path: Path) -> None:
    good = tmp_path / "good"
    good.write_bytes(b"x")
    with pytest.raises(ManifestError) as error:
        identify([str(tmp_path / "gone"), str(good), str(tmp_path)], mode="content", known={})
    assert "2 of 3 videos cannot be read" in str(error.value)
    assert len(error.value.problems) == 2
