"""Poison, built here: each costs one quarantine row or one clear sentence, in time, and no neighbour."""

from __future__ import annotations

import functools
import gzip
import json
import os
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.validate import validate
from pipeline import child_decoder
from pipeline.graph import preprocess
from pipeline.sandbox import DecodeRequest, DecoderProcess
from schemas.check import check_dataset
from schemas.config import (
    BucketConfig,
    FramesConfig,
    LimitsConfig,
    PreprocessConfig,
    ResizeConfig,
    SourcesConfig,
)
from schemas.errors import EXIT_GATE, ClipError, ManifestError
from schemas.index import read_index, read_quarantine
from schemas.load import check_config
from schemas.manifest import RowProblem, read_manifest, split_rows
from tests.videos import make_video, read_number

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

REPOSITORY = Path(__file__).resolve().parents[2]
TIMEOUT_S = 2.0
SLACK_S = 5.0
"""For a machine that does other things; the claim is one second, and a poison not stopped takes for ever."""
LIMITS: dict[str, Any] = {
    "max_bytes": 4 * 2**20,
    "max_frames": 1000,
    "clip_timeout_s": TIMEOUT_S,
    "memory_bytes": 2 * 2**30,
}
STUB = """
import ctypes, os
import numpy as np
from pipeline.decode import decode_clip
from pipeline.sandbox_child import serve

def decode(path, **settings):
    name = os.path.basename(path)
    if name.startswith("segfault"):
        ctypes.string_at(0)
    while name.startswith("endless"):
        pass
    if name.startswith("bomb"):
        held = [np.empty(64 << 20, np.uint8) for _ in range(1 << 20)]
    return decode_clip(path, **settings)

serve(decode)
"""


def copied(path: Path) -> None:
    """A good video: what is wrong with it is what the stub does when it sees the name."""
    path.write_bytes((path.parent / "good.mp4").read_bytes() + path.name.encode())


def y4m(path: Path, *, width: int, height: int, rate: str, pictures: int, payload: int) -> None:
    header = f"YUV4MPEG2 W{width} H{height} F{rate} Ip A1:1 C420jpeg\n".encode()
    path.write_bytes(header + (b"FRAME\n" + b"\x80" * payload) * pictures)


def small_y4m(path: Path, *, rate: str, pictures: int) -> None:
    y4m(path, width=16, height=16, rate=rate, pictures=pictures, payload=16 * 16 * 3 // 2)


def claims_ten_hours(path: Path) -> None:
    """A second of video whose header says ten hours."""
    make_video(path, num_frames=24)
    data = path.read_bytes()
    at = data.index(b"\x44\x89\x88") + 3  # Matroska's Duration, a float64 of milliseconds
    path.write_bytes(data[:at] + struct.pack(">d", 36_000_000.0) + data[at + 8 :])


def lasts_ten_hours(path: Path) -> None:
    """Nine pictures, the last after ten hours; the format has no header that would say so."""
    make_video(path, num_frames=9, pts=[*range(0, 800, 100), 36_000 * 24 * 100])


def names_others(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text.replace("GOOD", str(path.parent / "good.mp4")))


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 5 * 2**20)


HLS = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://GOOD\n#EXT-X-ENDLIST\n"
DASH = (
    '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
    'mediaPresentationDuration="PT1S"><Period><AdaptationSet mimeType="video/mp4"><Representation id="1" '
    'bandwidth="1"><BaseURL>file://GOOD</BaseURL></Representation></AdaptationSet></Period></MPD>'
)

FILES: dict[str, tuple[Callable[[Path], object], set[str]]] = {
    "segfault.mp4": (copied, {"decoder_crash"}),
    "endless.mp4": (copied, {"timeout"}),
    "bomb.mp4": (copied, {"limit_memory"}),
    "huge.y4m": (
        functools.partial(y4m, width=100_000, height=100_000, rate="25:1", pictures=1, payload=100),
        {"limit_pixels", "open_failed", "limit_memory"},
    ),
    "claims_ten_hours.mkv": (claims_ten_hours, {"limit_seconds"}),
    "lasts_ten_hours.ts": (lasts_ten_hours, {"limit_seconds"}),
    "million_fps.y4m": (functools.partial(small_y4m, rate="1000000:1", pictures=20), {"limit_fps"}),
    "many_pictures.y4m": (functools.partial(small_y4m, rate="25:1", pictures=1100), {"limit_frames"}),
    "sparse.mp4": (sparse, {"limit_bytes"}),
    "zeros.mp4": (lambda path: path.write_bytes(bytes(2**20)), {"open_failed", "format_refused"}),
    "packed.mp4": (lambda path: path.write_bytes(gzip.compress(bytes(2**20))), {"open_failed"}),
    "hls.m3u8": (names_others(HLS), {"open_failed", "format_refused"}),
    "hls.mp4": (names_others(HLS), {"open_failed", "format_refused"}),
    "concat.mp4": (names_others("ffconcat version 1.0\nfile 'GOOD'\n"), {"open_failed", "format_refused"}),
    "dash.mpd": (names_others(DASH), {"open_failed", "format_refused"}),
    "picture%03d.png": (names_others("not a picture"), {"open_failed", "format_refused"}),
    "concat:good.mp4|good.mp4": (names_others("x"), {"open_failed"}),
    "empty.mp4": (lambda path: path.touch(), {"empty_file"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every poisonous file, among good ones."""
    folder = tmp_path_factory.mktemp("poison")
    make_video(folder / "good.mp4", num_frames=9)
    for name, (build, _) in FILES.items():
        build(folder / name)
    (folder / "stub.py").write_text(STUB)
    return folder


def test_each_file_costs_itself_alone_and_no_more_than_its_time(folder: Path) -> None:
    settings: dict[str, Any] = {"frames": FramesConfig(), "resize": ResizeConfig()}
    buckets = [BucketConfig(num_frames=9, height=64, width=96)]
    program = [str(folder / "stub.py")]
    good = DecodeRequest(str(folder / "good.mp4"))
    with DecoderProcess(
        **settings, buckets=buckets, limits=LimitsConfig(**LIMITS), program=program
    ) as decoder:
        for name, (_, reasons) in FILES.items():
            for request in (good, DecodeRequest(str(folder / name)), good):
                decoder.submit(request)
            take_good(decoder)
            started = time.monotonic()
            with pytest.raises(ClipError) as caught:
                decoder.result()
            assert time.monotonic() - started < TIMEOUT_S + SLACK_S
            assert caught.value.reason in reasons, (name, caught.value)
            take_good(decoder)


def take_good(decoder: DecoderProcess) -> None:
    clip = decoder.result()
    assert [read_number(picture) for picture in clip.frames] == list(range(9))
    clip.release()


def test_what_is_no_file_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.mp4")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "zero.mp4").symlink_to("/dev/zero")
    (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    names = ["fifo.mp4", "folder.mp4", "zero.mp4", "/dev/zero", "loop.mp4", "gone.mp4", "x" * 5000]
    rows = [{"video": name, "caption": "x"} for name in names]
    problems = refused(tmp_path, rows)
    assert [p.reason for p in problems] == ["not_a_file"] * 4 + ["missing_file"] * 3
    # One that was a file when it was listed is not waited for either.
    settings: dict[str, Any] = {"frames": FramesConfig(), "resize": ResizeConfig(), "limits": LimitsConfig()}
    buckets = [BucketConfig(num_frames=9, height=64, width=96)]
    with DecoderProcess(**settings, buckets=buckets) as decoder:
        for name in names:
            started = time.monotonic()
            with pytest.raises(ClipError) as caught:
                decoder.place(DecodeRequest(os.path.join(tmp_path, name)))
            assert caught.value.reason == "open_failed"
            assert time.monotonic() - started < SLACK_S


def config_for(manifest: Path, output: Path, **changes: Any) -> PreprocessConfig:
    tree: dict[str, Any] = {
        "manifest": str(manifest),
        "output": str(output),
        "buckets": [{"num_frames": 9, "height": 32, "width": 48}],
        "units": {"rows": 8},
        "limits": LIMITS,
        "executor": {"kind": "local", "workers": 1},
    }
    return check_config(tree | changes, PreprocessConfig, where="test")


def written(folder: Path, rows: list[dict[str, Any]], name: str = "manifest.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def refused(
    folder: Path, rows: list[dict[str, Any]], sources: SourcesConfig | None = None
) -> list[RowProblem]:
    good, problems = split_rows(read_manifest(written(folder, rows)), sources=sources or SourcesConfig())
    assert len(good) + len(problems) == len(rows)
    return problems


def test_a_run_over_poison_keeps_what_is_good_and_quarantines_each_of_the_others_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stubbed = functools.partial(DecoderProcess, program=[str(folder / "stub.py")])
    monkeypatch.setattr(child_decoder, "DecoderProcess", stubbed)
    rows = []
    for i, name in enumerate(FILES):
        rows += [{"video": name, "caption": f"poison {i}"}, {"video": "good.mp4", "caption": f"good {i}"}]
    config = config_for(
        written(folder, rows), tmp_path / "latents", quarantine={"max_rate": 1.0}, resize={"mode": "stretch"}
    )
    summary, _ = preprocess(config)
    assert summary["kept"] == len(FILES)
    assert set(read_index(Path(config.output))["source"].to_pylist()) == {"good.mp4"}
    quarantine = read_quarantine(config.output).to_pylist()
    assert sorted(row["source"] for row in quarantine) == sorted(FILES)
    for row in quarantine:
        assert row["reason"] in FILES[row["source"]][1]
        assert row["stage"] == "decode"
        assert 0 < len(row["message"]) < 2000
    assert check_dataset(config.output).findings == []


def test_a_path_is_taken_at_its_word_unless_there_is_a_root(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside, outside):
        folder.mkdir()
        make_video(folder / "clip.mp4", num_frames=9)
    (inside / "link.mp4").symlink_to(outside / "clip.mp4")
    (inside / "folder").symlink_to(outside)
    (inside / "fine.mp4").symlink_to("clip.mp4")
    away = ["../outside/clip.mp4", str(outside / "clip.mp4"), "link.mp4", "folder/clip.mp4"]
    rows = [
        {"video": name, "caption": name} for name in ("clip.mp4", "fine.mp4", "../inside/clip.mp4", *away)
    ]
    assert refused(inside, rows) == []
    problems = refused(inside, rows, SourcesConfig(root=str(inside)))
    assert [(p.source, p.reason) for p in problems] == [(name, "outside_root") for name in away]
    assert all(str(outside / "clip.mp4") in p.message for p in problems)


@pytest.mark.parametrize(
    "url",
    [
        *("http://127.0.0.1/x.mp4", "https://example.com/x.mp4", "s3://bucket/x.mp4", "file:///etc/passwd"),
        *(
            "ftp://example.com/x",
            "HTTP://example.com/x",
            "data://x",
            "http://[::1",
            "http://a:b@a.example.com/x",
        ),
    ],
)
def test_nothing_remote_is_read_unless_it_is_allowed(tmp_path: Path, url: str) -> None:
    (problem,) = refused(tmp_path, [{"video": url, "caption": "x"}])
    assert problem.reason == "remote"
    allowed = SourcesConfig(schemes=("http", "https", "s3"), hosts=("other.example", "*.example.com"))
    (problem,) = refused(tmp_path, [{"video": url, "caption": "x"}], allowed)
    assert problem.reason == "remote"


def test_what_is_allowed_is_no_problem(tmp_path: Path) -> None:
    urls = [
        "https://a.example.com/x.mp4?y=1",
        "https://a.b.example.com:443/x",
        "s3://bucket/x",
        "https://h:8443/x",
    ]
    allowed = SourcesConfig(schemes=("https", "s3"), hosts=("*.Example.com", "bucket", "h:8443"))
    assert refused(tmp_path, [{"video": url, "caption": "x"} for url in urls], allowed) == []
    refusals = [
        "https://h/x",
        "https://a.example.com:81/x",
        "https://example.com.evil/x",
        "https://h:8443/a b",
    ]
    assert len(refused(tmp_path, [{"video": url, "caption": "x"} for url in refusals], allowed)) == 4


def test_captions_that_deceive_are_refused_or_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_video(tmp_path / "clip.mp4", num_frames=9)
    captions = ["a\0b", "\ud800", "x" * 70_000, "  ", "a cat \u202egod a ton", "\u0634\u0631\u0642 \u200f1"]
    manifest = written(tmp_path, [{"video": "clip.mp4", "caption": caption} for caption in captions])
    code = validate(manifest, config=None, overrides=(), output=None, as_json=True)
    report = json.loads(capsys.readouterr().out)
    assert code == EXIT_GATE
    assert [(p["row"], p["reason"]) for p in report["problems"]] == [
        (1, "bad_caption"),
        (2, "bad_caption"),
        (3, "bad_caption"),
        (4, "no_caption"),
    ]
    (warning,) = report["warnings"]
    assert (warning["row"], warning["reason"]) == (5, "hidden_direction")
    assert "U+202E" in warning["message"]


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_marks_and_line_ends_of_other_systems_are_read_and_repeated_rows_told(
    tmp_path: Path, suffix: str
) -> None:
    make_video(tmp_path / "clip.mp4", num_frames=9)
    rows = [{"id": 7, "video": "clip.mp4", "caption": caption} for caption in ("one", "two", "one")]
    if suffix == "jsonl":
        text = "\r\n".join(json.dumps(row) for row in rows)
    else:
        text = "id,video,caption\r\n" + "\r\n".join(f"7,clip.mp4,{row['caption']}" for row in rows)
    manifest = tmp_path / f"manifest.{suffix}"
    manifest.write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n\r\n")
    good, problems = split_rows(read_manifest(manifest))
    # Who wrote the manifest may number its rows as they like: a row is its video, window and caption.
    assert [(row.caption, str(row.extra["id"])) for row in good] == [("one", "7"), ("two", "7")]
    assert [problem.reason for problem in problems] == ["duplicate"]


@pytest.mark.parametrize("pack", ["gzip", "zip"])
@pytest.mark.parametrize("name", ["manifest.jsonl", "manifest.csv", "manifest.parquet"])
def test_a_packed_manifest_is_not_unpacked(tmp_path: Path, pack: str, name: str) -> None:
    bomb = tmp_path / name
    if pack == "gzip":
        bomb.write_bytes(gzip.compress(bytes(2**24)))
    else:
        with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("manifest.jsonl", bytes(2**24))
    with pytest.raises(ManifestError, match=f"is a {pack} file; unpack it"):
        list(read_manifest(bomb))


MEMORY_BYTES = 256 * 2**20
READS = """
import resource, sys
from pathlib import Path
from pipeline.discover import discover
from schemas.errors import ManifestError
from schemas.manifest import read_manifest

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in map(Path, sys.argv[1:]):
    try:
        items = list(discover(path) if path.is_dir() else read_manifest(path))
        print(*(getattr(item, "reason", "good") for item in items))
    except ManifestError as error:
        print("ManifestError", str(error)[:200])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_a_caption_of_a_gibibyte_costs_its_row_and_no_memory(tmp_path: Path) -> None:
    head = {"manifest.jsonl": b'{"video": "a.mp4", "caption": "', "manifest.csv": b"video,caption\na.mp4,"}
    tail = {"manifest.jsonl": b'"}\n{"video": "a.mp4", "caption": "x"}\n', "manifest.csv": b"\na.mp4,x\n"}
    for name in head:
        with (tmp_path / name).open("wb") as file:
            file.write(head[name])
            file.seek(2**30)
            file.write(tail[name])
    folder = tmp_path / "folder"
    folder.mkdir()
    make_video(folder / "a.mp4", num_frames=9)
    (folder / "a.txt").touch()
    os.truncate(folder / "a.txt", 2**30)
    # One long text that stands in every row, and one row that unpacks to far more than it takes.
    shared = pa.array(["a"] * 20_000).dictionary_encode()
    shared = pa.DictionaryArray.from_arrays(shared.indices, pa.array(["x" * 2_000_000]))
    columns = {"video": pa.array(["a.mp4"] * 20_000), "caption": shared}
    pq.write_table(pa.table(columns), tmp_path / "shared.parquet", compression="zstd")
    long = pa.table({"video": ["a.mp4"], "caption": ["x" * 100_000_000]})
    pq.write_table(long, tmp_path / "long.parquet", compression="zstd", use_dictionary=False)
    names = [*head, "folder", "shared.parquet", "long.parquet"]
    run = subprocess.run(
        [sys.executable, "-c", READS, *(str(tmp_path / name) for name in names)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    jsonl, csv, sidecar, shared_text, long_text, grown = run.stdout.splitlines()
    assert jsonl == "bad_row good"
    assert sidecar == "bad_caption"
    for told in (csv, shared_text, long_text):
        assert told.startswith("ManifestError")
    assert int(grown) < MEMORY_BYTES
