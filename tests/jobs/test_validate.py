"""`latentpress validate`: what it counts, warns of and writes, in memory that does not grow with the rows."""

from __future__ import annotations

import json
import re
import tracemalloc
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from jobs import cli, console
from jobs.validate import validate
from pipeline import survey as survey_module
from schemas.errors import ConfigError, ManifestError
from tests.pipeline.placing import FakeDecoder
from tests.videos import make_video

CONFIG = """
manifest = "unused"
output = "unused"
[[buckets]]
num_frames = 9
height = 32
width = 48
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("validate")
    make_video(folder / "a.mp4", num_frames=24)
    make_video(folder / "turned.mp4", num_frames=12, rotation=90)
    make_video(folder / "short.webm", codec="libvpx", num_frames=3)
    make_video(folder / "uneven.mp4", num_frames=5, pts=[0, 100, 250, 300, 700])
    (folder / "copy.mp4").write_bytes((folder / "a.mp4").read_bytes())
    (folder / "bad.mp4").write_bytes(b"not a video")
    (folder / "config.toml").write_text(CONFIG)
    return folder


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps({"caption": "x"} | row) + "\n" for row in rows))
    return path


def report_of(
    capsys: pytest.CaptureFixture[str], manifest: Path, **options: Any
) -> tuple[int, dict[str, Any]]:
    given: dict[str, Any] = {"config": None, "overrides": (), "output": None, "as_json": True, **options}
    code = validate(manifest, **given)
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file is opened, and no request remembered."""

    class Forgetful(FakeDecoder):
        def place(self, *args: Any, **options: Any) -> Any:
            self.placed.clear()
            return super().place(*args, **options)

    monkeypatch.setattr(survey_module, "DecoderProcess", Forgetful)
    monkeypatch.setattr(FakeDecoder, "made", [])


def test_the_report_of_a_mixed_manifest(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[dict[str, Any]] = [
        {"video": "a.mp4"},
        {"video": "turned.mp4"},
        {"video": "bad.mp4"},
        {"video": "gone.mp4"},
        {"video": "a.mp4", "start_s": 0.25, "end_s": 0.75},
        {"video": "short.webm"},
        {"video": "./a.mp4"},
        {"video": "uneven.mp4"},
        {"video": "a.mp4", "caption": ""},
    ]
    manifest = write(folder / "mixed.jsonl", rows)
    code, report = report_of(capsys, manifest, config=folder / "config.toml")
    assert code == 3
    assert (report["rows"], report["good"], report["bad"]) == (9, 5, 4)
    assert [(p["row"], p["reason"]) for p in report["problems"]] == [
        (3, "open_failed"),
        (4, "missing_file"),
        (7, "duplicate"),
        (9, "no_caption"),
    ]
    assert report["reasons"] == {"open_failed": 1, "missing_file": 1, "duplicate": 1, "no_caption": 1}
    assert report["codecs"] == {"h264": 4, "vp8": 1}
    assert report["sizes"] == {"96x64": 4, "64x96": 1}
    assert (report["traits"]["rotated"], report["traits"]["variable_rate"]) == (1, 1)
    assert report["traits"]["untagged_color"] == 4
    spread = report["duration_s"]
    assert (spread["min"], spread["max"]) == (pytest.approx(0.125, abs=0.01), pytest.approx(1.0))
    assert spread["sum"] == pytest.approx(1 + 0.5 + 0.5 + 0.125 + 8 / 24, abs=0.1)
    assert report["buckets"] == {"9x32x48": 5}
    assert (report["clips"], report["shorter_than_bucket"], report["slowed_beyond_2x"]) == (5, 2, 1)
    assert {w["row"] for w in report["warnings"]} == {6}
    assert "decoded" not in report

    _, plain = report_of(capsys, manifest)
    assert not {"buckets", "clips"} & set(plain)
    assert plain["warnings"] == []


def test_several_clips_of_a_row_are_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = write(folder / "chunks.jsonl", [{"video": "a.mp4"}, {"video": "turned.mp4"}])
    changes = ("frames.policy=fps", "frames.target_fps=24", "frames.clips=chunk")
    code, report = report_of(capsys, manifest, config=folder / "config.toml", overrides=changes)
    assert (code, report["clips"], report["buckets"]) == (0, 3, {"9x32x48": 3})


def test_captions_of_one_clip_share_its_seconds_and_are_told_where_they_are_cut(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[dict[str, Any]] = [
        {"video": "a.mp4", "caption": ["one", "two", "three", "x" * 300]},
        {"video": "turned.mp4"},
        {"video": "a.mp4", "caption": "later"},
    ]
    manifest, config = write(folder / "captions.jsonl", rows), folder / "config.toml"
    code, report = report_of(capsys, manifest, config=config, decode=True)
    assert (code, report["good"], report["clips"]) == (0, 6, 6)
    assert report["duration_s"]["sum"] == pytest.approx(1.5, abs=0.1)
    assert report["decoded"]["pictures"] == 24 + 12
    (warning,) = report["warnings"]
    assert (warning["row"], warning["reason"]) == (1, "caption_cut")
    assert warning["message"] == "the caption has 301 tokens and will be cut to 226"
    assert report_of(capsys, manifest)[1]["warnings"] == []


def test_nothing_is_fetched_to_count_tokens(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetched(*_: Any, **__: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetched)
    manifest = write(folder / "m.jsonl", [{"video": "a.mp4"}])
    changes = ("text_encoder.kind=t5", "text_encoder.model=nobody/nothing")
    config = folder / "config.toml"
    assert validate(manifest, config=config, overrides=changes, output=None, as_json=False) == 0
    assert "not checked: which captions are cut" in capsys.readouterr().out


def test_decode_looks_at_every_picture(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torn = bytearray((folder / "a.mp4").read_bytes())
    middle = torn.index(b"mdat") + (len(torn) - torn.index(b"mdat")) // 2
    torn[middle : middle + 200] = bytes(200)
    (tmp_path / "torn.mp4").write_bytes(torn)
    rows = [{"video": "torn.mp4"}, {"video": str(folder / "short.webm")}]
    manifest = write(tmp_path / "m.jsonl", rows)
    assert report_of(capsys, manifest)[0] == 0
    code, report = report_of(capsys, manifest, decode=True)
    assert code == 3
    assert [(p["row"], p["reason"]) for p in report["problems"]] == [(1, "damaged")]
    assert report["decoded"] == {"pictures": 3, "damaged": 0, "hidden": 0, "rows_damaged": 0}


def test_the_same_content_under_another_name_is_told_but_good(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[dict[str, Any]] = [
        {"video": "a.mp4"},
        {"video": "copy.mp4", "caption": "y"},
        {"video": "copy.mp4"},
        {"video": "copy.mp4", "start_s": 0.5},
        {"video": "turned.mp4"},
    ]
    code, report = report_of(capsys, write(folder / "copies.jsonl", rows))
    assert (code, report["good"], report["content_copies"]) == (0, 5, 2)
    assert report["warned"] == {"duplicate_content": 1}
    (warning,) = report["warnings"]
    assert (warning["row"], warning["source"]) == (3, "copy.mp4")
    assert "row 1 under another name" in warning["message"]


def test_the_output_holds_the_good_rows_in_order_and_may_be_the_manifest(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [*("a.mp4", "bad.mp4", "turned.mp4", "gone.mp4", "uneven.mp4"), *["a.mp4"] * 3]
    rows = [{"video": str(folder / name), "caption": f"{i}"} for i, name in enumerate(names)]
    manifest = write(tmp_path / "m.jsonl", rows)
    report_of(capsys, manifest, output=manifest)
    assert [json.loads(line)["caption"] for line in manifest.read_text().splitlines()] == list("024567")
    assert list(tmp_path.iterdir()) == [manifest]


@pytest.mark.usefixtures("fake")
def test_a_validation_that_fails_leaves_the_output_as_it_was(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "good.jsonl"
    output.write_text("before")
    (tmp_path / "m.csv").write_text(f'video,caption\n{folder}/a.mp4,x\n"open')
    with pytest.raises(ManifestError, match="not CSV"):
        validate(tmp_path / "m.csv", config=None, overrides=(), output=output, as_json=True)
    with pytest.raises(ManifestError, match="holds no rows"):
        validate(write(tmp_path / "n.jsonl", []), config=None, overrides=(), output=output, as_json=True)
    assert output.read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.usefixtures("fake")
def test_json_lists_every_problem_and_the_terminal_the_first(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"video": f"gone{i}.mp4"} if i % 2 else {"video": str(folder / "a.mp4"), "start_s": i}
        for i in range(200)
    ]
    manifest = write(tmp_path / "m.jsonl", rows)
    _, report = report_of(capsys, manifest)
    assert [p["row"] for p in report["problems"]] == list(range(2, 201, 2))
    assert validate(manifest, config=None, overrides=(), output=None, as_json=False) == 3
    printed = capsys.readouterr().out
    assert re.findall(r"^row (\d+)", printed, re.MULTILINE) == [str(row) for row in range(2, 81, 2)]
    assert "... and 60 more (--json lists all)" in printed
    assert "200 rows: 100 good, 100 bad" in printed


@pytest.mark.usefixtures("fake")
def test_a_long_pass_says_how_far_it_is(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"video": str(folder / "a.mp4"), "start_s": start} for start in (1, 13, 2)]
    manifest = write(tmp_path / "m.jsonl", rows)
    validate(manifest, config=None, overrides=(), output=None, as_json=True)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(console, "PACE_EVERY_S", 0.0)
    validate(manifest, config=None, overrides=(), output=None, as_json=True)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert re.fullmatch(r"3 rows, \d+\.\d/s, 1 bad", lines[-1])


@pytest.mark.usefixtures("fake")
def test_memory_does_not_grow_with_the_rows(folder: Path, tmp_path: Path) -> None:
    def peak(count: int) -> int:
        rows = [
            {
                "video": str(folder / "a.mp4") if i % 3 else f"gone{i}.mp4",
                "start_s": i,
                "caption": f"{i:0500}",
            }
            for i in range(count)
        ]
        manifest = write(tmp_path / f"{count}.jsonl", rows)
        del rows
        with (tmp_path / "report.json").open("w") as out, redirect_stdout(out):
            tracemalloc.start()
            try:
                validate(manifest, config=None, overrides=(), output=tmp_path / "good.jsonl", as_json=True)
                return tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()

    peak(100)
    small, large = peak(1000), peak(5000)
    assert large < small + 300_000  # the captions of 4000 more rows alone are 2 MB


def test_frame_rules_are_checked_before_the_manifest_is_read(folder: Path, tmp_path: Path) -> None:
    """With every rule of the target, on a manifest that does not exist."""
    changes = ("target.patch_size_t=2", "target.token_multiple=64")
    with pytest.raises(ConfigError, match=r"buckets\.0\.num_frames = 9: target\.patch_size_t = 2"):
        validate(
            tmp_path / "none.jsonl",
            config=folder / "config.toml",
            overrides=changes,
            output=None,
            as_json=True,
        )


def test_decode_is_an_option_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def noted(*_: Any, decode: bool, **__: Any) -> int:
        asked.append(decode)
        return 0

    monkeypatch.setattr("jobs.validate.validate", noted)
    for arguments in ([], ["--decode"]):
        monkeypatch.setattr("sys.argv", ["latentpress", "validate", "m.jsonl", *arguments])
        with pytest.raises(SystemExit):
            cli.main()
    assert asked == [False, True]
