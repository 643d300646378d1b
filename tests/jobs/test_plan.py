"""`latentpress plan`: clips, leftovers and notes of a config, from real files, before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.plan import pace, plan
from pipeline.graph import preprocess
from pipeline.text_encode import load_text_encoder
from pipeline.tiny_t5 import TinyT5
from schemas.config import ExecutorConfig, PreprocessConfig, TextEncoderConfig
from schemas.errors import ConfigError, StaleDatasetError
from schemas.load import load_config
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


@pytest.mark.parametrize("padding", ["full", "trim"])
def test_prompts_are_measured_by_their_tokens_alone(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, padding: str
) -> None:
    """Four captions, the longest of five bytes and an end token, and the empty one."""
    settings = TextEncoderConfig.model_validate({"max_length": 5, "padding": padding})
    encodings = load_text_encoder(settings).encode(["", "long", "short", "tiny", "bad"])
    monkeypatch.setattr(TinyT5, "_model", None)
    report = planned(folder, capsys, "text_encoder.max_length=5", f"text_encoder.padding={padding}")
    stored = [tensor.data.nbytes for encoding in encodings for tensor in encoding.tensors.values()]
    assert report["prompts_bytes"] == sum(stored)
    assert (report["captions"], report["captions_cut"]) == (4, 1)
    plan(folder / "config.toml", overrides=("text_encoder.max_length=5",), as_json=False)
    assert "1 of 4 cut to 5 tokens" in capsys.readouterr().out


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


def test_a_changed_dataset_is_told_by_cause_in_the_words_of_preprocess(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("kept", "edited", "replaced", "gone")
    for i, name in enumerate((*names, "added")):
        make_video(tmp_path / f"{name}.mp4", num_frames=12 + i)
    config = tmp_path / "config.toml"
    config.write_text(CONFIG.format(folder=tmp_path))
    settings = load_config(config, PreprocessConfig, overrides=["executor.kind=local", "units.rows=2"])

    def ask(*rows: tuple[str, str]) -> None:
        lines = [json.dumps({"video": f"{name}.mp4", "caption": caption}) + "\n" for name, caption in rows]
        (tmp_path / "manifest.jsonl").write_text("".join(lines))

    ask(*((name, name) for name in names))
    preprocess(settings)
    assert "4 rows: 4 new\n" in capsys.readouterr().err

    ask(("kept", "kept"), ("edited", "better"), ("replaced", "replaced"), ("added", "added"))
    make_video(tmp_path / "replaced.mp4", num_frames=20)
    assert plan(config, overrides=(), as_json=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["already_done"] == 1
    assert report["stale"] == [
        {"row": 2, "source": "edited.mp4", "cause": "caption changed", "runs": "prompts only"},
        {"row": 3, "source": "replaced.mp4", "cause": "file replaced", "runs": "latents"},
    ]
    counted = {name: count for name, count in report["changes"].items() if count}
    expected = {"new": 1, "captions_changed": 1, "files_replaced": 1, "removed": 1}
    assert counted == {"rows": 4, "clips": 4, **expected, "clips_to_encode": 2, "captions_to_encode": 2}
    plan(config, overrides=(), as_json=False)
    sentence, *causes = capsys.readouterr().out.splitlines()[:3]
    assert sentence == (
        "4 rows: 1 new, 1 caption changed: prompts only, 1 file replaced: latents, "
        "1 removed: hidden, nothing rewritten"
    )
    assert causes[0] == "  row 2  edited.mp4: caption changed: prompts only"
    preprocess(settings)
    assert sentence in capsys.readouterr().err

    assert plan(config, overrides=["resize.mode=pad"], as_json=True) == 2
    assert json.loads(capsys.readouterr().out)["other_settings"] == {
        "latents": {"differences": {"resize.mode": ["cover_crop", "pad"]}, "clips": 4},
        "prompts": {"differences": {}, "captions": 4},
    }
    assert plan(config, overrides=["resize.mode=pad"], as_json=False) == 2
    said = capsys.readouterr().out
    assert "latents: 4 clips would be encoded anew\n  resize.mode  dataset 'cover_crop', config 'pad'" in said
    assert "prompts: 4 captions, not to be encoded again" in said
    with pytest.raises(StaleDatasetError, match="never adopted"):
        plan(config, overrides=["resize.mode=pad"], as_json=True, adopt=True)
    assert plan(config, overrides=["decode.threads=2"], as_json=True, adopt=True) == 0
    assert json.loads(capsys.readouterr().out)["already_done"] == 4
    threaded = load_config(
        config, PreprocessConfig, overrides=["executor.kind=local", "units.rows=2", "decode.threads=2"]
    )
    with pytest.raises(StaleDatasetError, match="--adopt"):
        preprocess(threaded)
    summary, ran = preprocess(threaded, adopt=True)
    assert not ran
    assert summary["adopted"] == [{"decode.threads": [None, 2]}]
    preprocess(threaded)
    note = "note: settings adopted in place of the dataset's:\n  decode.threads  dataset None, config 2"
    assert capsys.readouterr().err.count(note) == 2


def test_a_renamed_folder_is_told_as_preprocess_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """New files are read where one of their length is asked for no more."""
    config = dataset_of(tmp_path, ["a", "b"])
    (tmp_path / "clips").rename(tmp_path / "renamed")
    make_video(tmp_path / "renamed" / "c.mp4", num_frames=30)
    ask_for(tmp_path / "renamed", ["a", "b", "c"])
    assert told_by_both(config, capsys) == "3 rows: 1 new, 2 moved: nothing runs"


def test_clips_are_counted_as_preprocess_does_where_a_limit_was_lowered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """How many a file makes is known; a limit counts for what is still to be looked at."""
    config = dataset_of(tmp_path, ["a", "b"], "frames.clips=chunk")
    low = ["frames.clips=chunk", "limits.max_seconds=0.1"]
    assert told_by_both(config, capsys, *low) == "2 rows make 3 clips: nothing changed"


def test_a_row_of_many_clips_is_stale_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = dataset_of(tmp_path, ["a", "b"], "frames.clips=chunk")
    ask_for(tmp_path / "clips", ["a", "b"], caption="another")
    plan(config, overrides=["frames.clips=chunk"], as_json=True)
    stale = json.loads(capsys.readouterr().out)["stale"]
    assert [(row["source"], row["runs"]) for row in stale] == [
        ("clips/a.mp4", "prompts only"),
        ("clips/b.mp4", "prompts only"),
    ]


def dataset_of(folder: Path, names: list[str], *changes: str) -> Path:
    """Config of a dataset of short clips, but for the last, which makes two chunks."""
    (folder / "clips").mkdir()
    for name in names:
        make_video(folder / "clips" / f"{name}.mp4", num_frames=40 if name == names[-1] else 20)
    ask_for(folder / "clips", names)
    config = folder / "config.toml"
    config.write_text(CONFIG.format(folder=folder))
    settings = load_config(config, PreprocessConfig, overrides=["executor.kind=local", *changes])
    preprocess(settings)
    return config


def ask_for(folder: Path, names: list[str], *, caption: str = "a caption") -> None:
    rows = [{"video": f"{folder.name}/{name}.mp4", "caption": caption} for name in names]
    (folder.parent / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def told_by_both(config: Path, capsys: pytest.CaptureFixture[str], *changes: str) -> str:
    """The sentence of plan, held against that of preprocess."""
    capsys.readouterr()
    plan(config, overrides=changes, as_json=False)
    sentence = capsys.readouterr().out.splitlines()[0]
    preprocess(load_config(config, PreprocessConfig, overrides=["executor.kind=local", *changes]))
    assert f"{sentence}\n" in capsys.readouterr().err
    return sentence


@pytest.mark.parametrize(
    ("executor", "seconds"),
    [
        ({"kind": "local"}, 3.0),
        ({"kind": "local", "workers": 4}, 3.0),
        ({"workers": 4, "address": "head:1"}, 0.75),
        ({"workers": 2, "address": "head:1", "decoders_per_worker": 1}, 2.0),
        ({"workers": 4, "decode_actors": 4, "address": "head:1"}, 1.0),
        ({"workers": 4}, 7 / 4),
    ],
)
def test_decoding_and_encoding_go_on_beside_each_other(
    monkeypatch: pytest.MonkeyPatch, executor: dict[str, Any], seconds: float
) -> None:
    """Four seconds to decode and three to encode, on four cores here."""
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    assert pace(4.0, 3.0, ExecutorConfig(**executor)) == seconds
