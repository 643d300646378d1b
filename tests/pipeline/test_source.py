"""Source identity: content decides, stat only says when to look again."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from pipeline.graph import preprocess
from pipeline.source import Source, content_digest, identify, is_unread, same_content, sampled_digest
from schemas.config import BucketConfig, ExecutorConfig, LimitsConfig, PreprocessConfig, QuarantineConfig
from schemas.errors import ManifestError
from tests.videos import make_video


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


def test_a_file_over_the_limit_is_not_read(tmp_path: Path) -> None:
    huge = tmp_path / "huge"
    with huge.open("wb") as file:
        file.truncate(1 << 40)
    found = identify([str(huge)], mode="content", known={})[str(huge)]
    assert is_unread(found)
    assert same_content(str(huge), found)
    stat = huge.stat()
    known = {(str(huge), stat.st_size, stat.st_mtime_ns): "content:read-under-another-limit"}
    assert not is_unread(identify([str(huge)], mode="content", known=known)[str(huge)])


def test_a_file_gets_its_identity_when_the_limit_is_raised(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x" * 1000)
    refused = identify([str(path)], mode="content", known={}, limits=LimitsConfig(max_bytes=999))[str(path)]
    assert is_unread(refused)
    known = {(str(path), refused.size, refused.mtime_ns): refused.digest}
    found = identify([str(path)], mode="content", known=known, limits=LimitsConfig(max_bytes=1000))[str(path)]
    assert found.digest == f"content:{content_digest(str(path))}"


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_file_over_the_limit_costs_one_row_until_the_limit_is_raised(tmp_path: Path) -> None:
    small = make_video(tmp_path / "small.mp4", num_frames=9)
    large = make_video(tmp_path / "large.mp4", num_frames=48)
    assert small.stat().st_size < large.stat().st_size
    manifest = tmp_path / "m.jsonl"
    manifest.write_text(
        "".join(json.dumps({"video": p.name, "caption": p.name}) + "\n" for p in (small, large))
    )
    config = PreprocessConfig(
        manifest=str(manifest),
        output=str(tmp_path / "out"),
        buckets=(BucketConfig(num_frames=9, height=32, width=48),),
        limits=LimitsConfig(max_bytes=small.stat().st_size),
        quarantine=QuarantineConfig(max_rate=1.0),
        executor=ExecutorConfig(kind="local", workers=1),
    )
    summary, _ = preprocess(config)
    assert (summary["kept"], summary["reasons"]) == (1, {"limit_bytes": 1})
    os.utime(large, (1, 1))
    assert preprocess(config)[1] is False
    summary, ran = preprocess(config.model_copy(update={"limits": LimitsConfig()}))
    assert (summary["kept"], summary["reasons"], ran) == (2, {}, True)


def test_an_interrupt_ends_the_reading_of_a_file(tmp_path: Path) -> None:
    huge = tmp_path / "huge"
    with huge.open("wb") as file:
        file.truncate(1 << 40)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        identify([str(huge)], mode="content", known={}, limits=LimitsConfig(max_bytes=1 << 41))
    assert time.monotonic() - started < 30
