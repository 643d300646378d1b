"""A decoder that a file took over: whatever it says costs that file, in time, and never the run."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.child_answers import TEXT_CHARS, BadAnswer, DecodedAnswer, check_decoded, check_placed
from pipeline.clip import Placed
from pipeline.confine import NOT_ENFORCED
from pipeline.sandbox import DecodeRequest, DecoderProcess
from schemas.config import BucketConfig, FramesConfig, LimitsConfig, ResizeConfig
from schemas.errors import ClipError, RunError
from tests.pipeline.placing import INFO
from tests.videos import make_video, read_number

TIMEOUT_S = 2.0
SLACK_S = 5.0
"""For a machine that does other things."""
LIAR = """
import fcntl, json, os, sys, time
from pipeline import sandbox_child
from pipeline.decode import decode_clip

sound = sandbox_child._send
answers = None
path = ""

def say(line):
    os.write(answers.fileno(), line)

def send(to, message):
    global answers
    answers = to
    name = os.path.basename(path)
    if "id" not in message or not name.startswith("lie"):
        return sound(to, message)
    lie = json.loads(open(path + ".lie").read())
    if isinstance(lie, dict):
        whole = "error" in lie or "fatal" in lie
        return sound(to, ({"id": message["id"]} if whole else message) | lie)
    say(lie.encode("latin-1"))

def decode(file, **settings):
    global path
    path = file
    name = os.path.basename(file)
    while name.startswith("flood"):
        os.write(2, b"x" * 65536)
    while name.startswith("again"):
        say(json.dumps({"at": time.monotonic()}).encode() + b"\\n")
    while name.startswith("endless"):
        say(b"x" * 65536)
    if name.startswith("closed"):
        os.close(2)
        os.close(1)
        time.sleep(60)
    if name.startswith("cut"):
        memory = [fd for fd in range(3, 64) if "memfd:" in link(fd)]
        assert memory
        for fd in memory:
            os.ftruncate(fd, 0)
    if name.startswith("environment"):
        raise sandbox_child.ClipError("told", json.dumps(sorted(os.environ)))
    return decode_clip(file, **settings)

def link(fd):
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""

sandbox_child._send = send
sandbox_child.serve(decode)
"""
LIES: dict[str, Any] = {
    "no JSON": "hello\n",
    "no text": "\xff\xff\n",
    "no object": "[]\n",
    "deep": "[" * 200_000 + "\n",
    "long number": '{"id":' + "9" * 5000 + "}\n",
    "nothing": "{}\n",
    "wrong id": {"id": 10**6},
    "large shape": {"shape": [10**9, 64, 96, 3]},
    "negative shape": {"shape": [-9, 64, 96, 3]},
    "other shape": {"shape": [9, 96, 64, 3]},
    "no such bucket": {"bucket": 1},
    "negative bucket": {"bucket": -1},
    "no record": {"record": {}},
    "long time": {"decode_s": 1e300},
    "no number": {"decode_s": "soon"},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_video(tmp_path / "good.mp4", num_frames=9)
    (tmp_path / "liar.py").write_text(LIAR)
    return tmp_path


@pytest.fixture
def decoder(folder: Path) -> Iterator[DecoderProcess]:
    with DecoderProcess(
        frames=FramesConfig(),
        resize=ResizeConfig(),
        buckets=[BucketConfig(num_frames=9, height=64, width=96)],
        limits=LimitsConfig(clip_timeout_s=TIMEOUT_S),
        program=[str(folder / "liar.py")],
    ) as process:
        yield process


def named(folder: Path, name: str, lie: Any = None) -> DecodeRequest:
    """The good video under a name at which the decoder lies."""
    path = folder / f"{name}.mp4"
    path.write_bytes((folder / "good.mp4").read_bytes())
    path.with_name(f"{path.name}.lie").write_text(json.dumps(lie))
    return DecodeRequest(str(path))


def failure(decoder: DecoderProcess) -> ClipError:
    with pytest.raises(ClipError) as caught:
        decoder.result()
    return caught.value


def take_good(decoder: DecoderProcess) -> None:
    clip = decoder.result()
    assert [read_number(picture) for picture in clip.frames] == list(range(9))
    clip.release()


def test_a_malformed_answer_costs_its_row(decoder: DecoderProcess, folder: Path) -> None:
    for name, lie in LIES.items():
        decoder.submit(named(folder, "lie", lie))
        error = failure(decoder)
        assert (error.reason, error.attempts) == ("decoder_crash", 2), name
    for request in (named(folder, "fine"), named(folder, "lie", LIES["no such bucket"])):
        decoder.submit(request)
    take_good(decoder)
    assert failure(decoder).reason == "decoder_crash"
    decoder.submit(named(folder, "fine"))
    take_good(decoder)


def test_a_whole_clip_has_a_length_that_the_rule_allows(folder: Path) -> None:
    with DecoderProcess(
        frames=FramesConfig(policy="fps", target_fps=24.0, clips="whole"),
        resize=ResizeConfig(),
        buckets=[BucketConfig(num_frames=13, height=64, width=96)],
        lengths=[(5, 9, 13)],
        limits=LimitsConfig(clip_timeout_s=TIMEOUT_S),
        program=[str(folder / "liar.py")],
    ) as decoder:
        decoder.submit(named(folder, "lie", {"shape": [10, 64, 96, 3]}))
        assert failure(decoder).reason == "decoder_crash"
        decoder.submit(named(folder, "fine"))
        clip = decoder.result()
    sound = DecodedAnswer(id=0, shape=[9, 64, 96, 3], bucket=0, record=clip.record, decode_s=0.0)
    told: dict[str, Any] = {
        "clip": 0,
        "buckets": [BucketConfig(num_frames=13, height=64, width=96)],
        "limits": LimitsConfig(max_seconds=1.0),
    }
    check_decoded(sound, **told, lengths=[(5, 9, 13)])
    # 5 and 13 frames are allowed, but the record tells of 9.
    for shape in (
        [],
        [0],
        [9],
        [5, 64, 96, 3],
        [7, 64, 96, 3],
        [13, 64, 96, 3],
        [17, 64, 96, 3],
        [9, 64, 96],
    ):
        with pytest.raises(BadAnswer):
            check_decoded(sound.model_copy(update={"shape": shape}), **told, lengths=[(5, 9, 13)])
    times = clip.record.pts_s
    lies: dict[str, list[Any]] = {
        "pts_s": [times[::-1], [-0.1, *times[1:]], [*times[:-1], 1.1]],
        "effective_fps": [0.0, -8.0],
        "source_fps": [0.0],
        "coverage": [0.0, -0.1, 1.1],
        "duration_s": [0.0],
        "frame_weights": [[-0.1, *clip.record.frame_weights[1:]]],
        "interpolated": [[1, 1], [2, 1], [-1], [9]],
        "duplicated": [[3, 2]],
        "repaired": [[9]],
        "clip": [1],
        **{name: [0, -4] for name in ("source_width", "source_height", "num_pictures", "num_fed")},
        "notes": [["note"] * 1000],
    }
    for name, values in lies.items():
        for value in values:
            lie = replace(clip.record, **{name: value})
            with pytest.raises(BadAnswer):
                check_decoded(sound.model_copy(update={"record": lie}), **told, lengths=[(5, 9, 13)])


@pytest.mark.parametrize(
    "lie",
    [
        {},
        {"num_frames": 7},
        {"num_frames": 17},
        {"bucket": 1},
        {"bucket": -1},
        {"num_clips": 2},
        {"notes": ["note"] * 1000},
    ],
)
def test_what_becomes_of_a_row_is_a_claim_too(lie: dict[str, Any]) -> None:
    sound = Placed(INFO, bucket=0, num_frames=9, num_available=11, num_clips=1, notes=[], decoded=None)
    whole = FramesConfig(policy="fps", clips="whole")
    with pytest.raises(BadAnswer) if lie else nullcontext():
        check_placed(replace(sound, **lie), lengths=[(5, 9, 13)], frames=whole, limits=LimitsConfig())


def test_text_of_the_child_is_cut_and_plain(decoder: DecoderProcess, folder: Path) -> None:
    message = "\x1b[31mred\x1b]0;title\x07\n\u202e\ud800" + "A" * 100_000
    lie = json.dumps({"id": 0, "error": "told", "message": message}) + "\n"
    decoder.submit(named(folder, "lie", lie))
    error = failure(decoder)
    assert error.reason == "told"
    assert len(error.message) == TEXT_CHARS
    assert error.message.isprintable()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("flood", "timeout"),
        ("again", "decoder_crash"),
        ("endless", "decoder_crash"),
        ("closed", "timeout"),
    ],
)
def test_no_talk_stops_the_clock(decoder: DecoderProcess, folder: Path, name: str, reason: str) -> None:
    good = named(folder, "fine")
    for request in (good, named(folder, name), good):
        decoder.submit(request)
    take_good(decoder)
    started = time.monotonic()
    error = failure(decoder)
    assert time.monotonic() - started < TIMEOUT_S * error.attempts + SLACK_S
    assert error.reason == reason
    take_good(decoder)


def test_memory_cannot_be_taken_from_under_the_parent(decoder: DecoderProcess, folder: Path) -> None:
    decoder.submit(named(folder, "cut"))
    assert failure(decoder).reason == "internal"
    assert [int(np.sum(slot[-1:])) for slot in decoder._slots]  # would end this process
    decoder.submit(named(folder, "fine"))
    take_good(decoder)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give up")
def test_a_lie_does_not_bring_root_back(decoder: DecoderProcess, folder: Path) -> None:
    lie = {"error": "told", "message": "no", "denied": True}
    good = named(folder, "fine")
    for request in (named(folder, "lie", lie), good):
        decoder.submit(request)
    assert failure(decoder).reason == "told"
    take_good(decoder)
    root = decoder.protections["root"]
    decoder.submit(good)
    take_good(decoder)
    assert decoder.protections["root"] == root
    assert not root.startswith(NOT_ENFORCED)


def test_the_run_stops_only_where_a_new_child_says_so_too(decoder: DecoderProcess, folder: Path) -> None:
    request = named(folder, "lie", {"fatal": "stop"})
    decoder.submit(named(folder, "fine"))
    take_good(decoder)
    first = decoder._child
    decoder.submit(request)
    with pytest.raises(RunError, match=r"lie\.mp4: stop"):
        decoder.result()
    assert decoder._child is not first


def test_a_child_is_told_no_secrets(
    folder: Path, decoder: DecoderProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("HF_TOKEN", "secret")
    decoder.submit(named(folder, "environment"))
    names = json.loads(failure(decoder).message)
    assert "PYTHONPATH" in names
    assert not {"AWS_SECRET_ACCESS_KEY", "HF_TOKEN"} & set(names)
