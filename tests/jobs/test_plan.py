"""`latentpress plan`: clips, leftovers and notes of a config, from real files, before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.plan import plan
from schemas.errors import ConfigError
from tests.videos import make_video

CONFIG = """
manifest = "{folder}/manifest.jsonl"
output = "{folder}/latents"
[[buckets]]
num_frames = 9
height = 32
width = 48
[frames]
policy = "fps"
target_fps = 12
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 s, 0.625 s, 0.125 s and a broken file, at 24 fps."""
    folder = tmp_path_factory.mktemp("plan")
    for name, num_frames in (("long", 48), ("short", 15), ("tiny", 3)):
        make_video(folder / f"{name}.mp4", num_frames=num_frames)
    (folder / "bad.mp4").write_bytes(b"x")
    names = ("long", "short", "tiny", "bad")
    rows = [{"video": f"{name}.mp4", "caption": name} for name in names]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.toml").write_text(CONFIG.format(folder=folder))
    return folder


def planned(folder: Path, capsys: pytest.CaptureFixture[str], *changes: str) -> dict[str, Any]:
    assert plan(folder / "config.toml", overrides=changes, as_json=True) == 3
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("clips", "of_long", "left_of_long"),
    [("head", 1, 15 / 12), ("chunk", 2, 6 / 12), ("slide", 4, 0.0)],
)
def test_clips_and_what_is_left_over(
    folder: Path, capsys: pytest.CaptureFixture[str], clips: str, of_long: int, left_of_long: float
) -> None:
    """The long row fills 24 frames at 12 fps: 9, 9 + 9, or 9 at every fifth."""
    report = planned(folder, capsys, f"frames.clips={clips}", "frames.slide_step=5")
    assert (report["rows"], report["kept_rows"], report["clips"]) == (4, 3, of_long + 2)
    assert report["buckets"] == {"9x32x48": of_long + 2}
    assert report["drops"] == {"open_failed": 1}
    assert report["leftover_s"] == pytest.approx(left_of_long, abs=0.001)
    assert (report["shorter_than_bucket"], report["slowed_beyond_2x"]) == (2, 1)
    assert [note["row"] for note in report["notes"]] == [3]
    one = 3 * 16 * 4 * 6 * 4
    assert report["latents_bytes"] == (of_long + 2) * 2 * one
    assert report["video_tokens"] == (of_long + 2) * 3 * 2 * 3
    assert report["trial_clips"] == 3
    assert not (folder / "latents").exists()


def test_a_policy_that_shows_the_whole_row_leaves_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = planned(folder, capsys, "frames.policy=uniform")
    assert (report["clips"], report["leftover_s"]) == (3, 0)


def test_the_table_says_it_in_words(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan(folder / "config.toml", overrides=("frames.clips=chunk",), as_json=False)
    printed = capsys.readouterr().out
    assert "4 (3 kept, 4 clips)" in printed
    assert "row 4  bad.mp4: " in printed
    assert "to know of kept rows\n  row 3  tiny.mp4: " in printed
    assert "2 rows (frames.short = 'interpolate'), 1 of them slowed beyond 2x" in printed


def test_frame_rules_are_checked_before_the_manifest_is_read(folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"frame_multiple = 16 asks for 16n \+ 1 frames; nearest are 1 and 17"
    ):
        plan(
            folder / "config.toml",
            overrides=("manifest=gone.jsonl", "target.frame_multiple=16"),
            as_json=True,
        )
