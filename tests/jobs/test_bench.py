"""The decode benchmark: what it counts as read, what it names as failed, what it records."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from benchmarks import decode
from benchmarks.contenders import Stream, Target, spread
from benchmarks.decode import ALL, Cell, ClipResult, Report, class_means, measure, numbers
from benchmarks.record import append_result
from jobs import bench
from pipeline.discover import video_files
from schemas.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]
TARGET = Target(num_frames=5, height=48, width=64)
LOCAL = ["ours", "PyAV naive", "bare decode"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for name, num_pictures in (("long.mp4", 30), ("short.mp4", 3)):
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream("libx264", rate=Fraction(10))
            assert isinstance(stream, av.VideoStream)
            stream.width, stream.height = 96, 64
            for i in range(num_pictures):
                grey = np.full((64, 96, 3), 8 * i, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(grey)))
            container.mux(stream.encode(None))
    (folder / "text.mp4").write_text("not a video")
    return folder


def run(clips: Path, names: list[str]) -> Report:
    files = sorted(clips.iterdir())
    return measure(files, target=TARGET, reps=2, limit_s=60, tell=lambda _: None, contenders=names)


def test_the_spread_covers_the_clip_and_repeats_the_end_of_a_short_one() -> None:
    assert spread(30, 5) == [0, 6, 12, 18, 24]
    assert spread(7, 5) == [0, 1, 2, 4, 5]
    assert spread(3, 5) == [0, 1, 2, 2, 2]


def test_contenders_read_the_same_clips_and_name_what_they_cannot(clips: Path) -> None:
    report = run(clips, LOCAL)
    assert list(report.versions) == LOCAL
    assert not report.missing
    by_name = {clip.clip: clip for clip in report.clips}
    assert by_name["long.mp4"].stream == Stream("h264", 96, 64, intra=False)
    assert by_name["long.mp4"].kind == "h264 below HD"
    assert by_name["text.mp4"].kind == "unknown"
    assert [by_name["long.mp4"].cells[name].num_fed for name in LOCAL] == [22, None, 30]
    for name in LOCAL:
        for clip, num_pictures in (("long.mp4", 30), ("short.mp4", 3)):
            cell = by_name[clip].cells[name]
            assert (cell.num_pictures, cell.problem) == (num_pictures, "")
            assert cell.cpu_s is not None
            assert cell.cpu_s > 0
        refused = by_name["text.mp4"].cells[name]
        assert refused.cpu_s is None
        assert "nvalid data" in refused.problem or "open_failed" in refused.problem
        assert str(clips) not in refused.problem


def test_a_library_that_is_not_installed_is_named_with_its_command(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocked = tmp_path / "decord.py"
    blocked.write_text("raise ModuleNotFoundError(\"No module named 'decord'\", name='decord')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    report = run(clips, ["ours", "decord"])
    assert report.missing == {"decord": "ModuleNotFoundError: No module named 'decord'"}
    assert report.contenders == ["ours"]
    bench._print_missing(report)
    assert "pip install 'latentpress[bench]'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("import time; time.sleep(60)", "hang: no answer within 0.5 s"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crash: SIGSEGV"),
        ("import os; os._exit(3)", "crash: exit code 3"),
    ],
)
def test_a_hang_or_a_crash_costs_one_job_and_the_child_starts_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str, problem: str
) -> None:
    module = tmp_path / "misbehaving.py"
    module.write_text(
        "import sys\n"
        "from benchmarks import contenders\n"
        "def run(path, target):\n"
        f"    if path == 'bad': exec({code!r})\n"
        "    return contenders.Outcome(9, (5, 48, 64, 3))\n"
        "contenders.CONTENDERS['ours'] = lambda: run\n"
        "contenders.main(sys.argv[1])\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setattr(decode, "CHILD_COMMAND", (str(module),))
    with decode.Child("ours") as child:
        assert "version" in child.start()
        assert child.ask(Path("bad"), TARGET, limit_s=0.5 if "sleep" in code else 60)["error"] == problem
        assert child.ask(Path("good"), TARGET, limit_s=60)["num_pictures"] == 9


def made_report() -> Report:
    def clip(name: str, stream: Stream, num_fed: int, *seconds: float | None) -> ClipResult:
        cells = [
            Cell(None, None, problem="error: no") if cpu_s is None else Cell(cpu_s, 30, num_fed)
            for cpu_s in seconds
        ]
        names = ("ours", "PyAV naive", "decord", "bare decode")
        return ClipResult(name, stream, dict(zip(names, cells, strict=True)))

    h264, intra = Stream("h264", 1280, 720, intra=False), Stream("h264", 1280, 720, intra=True)
    av1 = Stream("av1", 640, 360, intra=True)
    clips = [
        clip("a", h264, 20, 1.0, 4.0, 2.0, 0.5),
        clip("b", h264, 30, 2.0, 18.0, 4.5, 1.0),
        clip("c", intra, 5, 1.0, 1.0, 1.1, 3.0),
        clip("d", av1, 30, 1.0, None, None, 1.0),
        clip("e", av1, 30, None, 1.0, 1.0, 1.0),
    ]
    versions = {"ours": "1", "PyAV naive": "1", "decord": "2", "bare decode": "1"}
    return Report(TARGET, 2, 60.0, versions, {"torchcodec": "RuntimeError: no libavutil"}, clips)


def test_means_are_geometric_and_over_clips_that_both_read() -> None:
    h264, av1, intra, everything = class_means(made_report())
    assert (h264.kind, h264.num_clips["ours"], h264.num_clips["decord"]) == ("h264 HD", 2, 2)
    expected = {"ours": 1.0, "PyAV naive": 6.0, "decord": (2 * 2.25) ** 0.5, "bare decode": 0.5}
    assert h264.ratio == pytest.approx(expected)
    assert (h264.best_other, h264.goal) == ("decord", 1.8)
    assert h264.frames_per_s == pytest.approx(5 / 2**0.5)
    assert (av1.kind, av1.best_other, av1.num_clips["decord"]) == ("av1", "", 0)
    assert av1.ratio == pytest.approx({"ours": 1.0, "bare decode": 1.0})
    assert (intra.kind, intra.best_other, intra.goal) == ("h264 intra", "PyAV naive", 1.2)
    assert (everything.kind, everything.goal) == (ALL, None)
    assert everything.num_clips == {"ours": 4, "PyAV naive": 3, "decord": 3, "bare decode": 4}


def test_the_share_of_the_ceiling_counts_clips_of_which_every_picture_is_decoded() -> None:
    h264, av1, intra, everything = class_means(made_report())
    assert (h264.num_whole, av1.num_whole) == (1, 1)
    assert h264.whole_share == pytest.approx(0.5)
    assert av1.whole_share == pytest.approx(1.0)
    assert (intra.num_whole, intra.whole_share) == (0, None)
    assert everything.whole_share == pytest.approx(0.5**0.5)


@pytest.mark.parametrize(
    ("stream", "kind"),
    [
        (Stream("hevc", 720, 1280, intra=False), "hevc HD"),
        (Stream("hevc", 1278, 720, intra=False), "hevc below HD"),
        (Stream("h264", 96, 64, intra=True), "h264 intra"),
        (Stream("mjpeg", 96, 64, intra=True), "mjpeg"),
        (Stream("vp9", 1920, 1080, intra=False), "vp9"),
    ],
)
def test_classes_are_codec_size_and_prediction(stream: Stream, kind: str) -> None:
    assert ClipResult("a", stream, {}).kind == kind


def test_the_command_prints_tables_and_writes_json_chart_and_record(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "measure", lambda *_, **__: made_report())
    code = bench.decode(
        [clips], num_frames=5, height=48, width=64, reps=2, limit_s=60.0,
        json_path=tmp_path / "out.json", plot_path=tmp_path / "out.png", results=tmp_path,
    )  # fmt: skip
    out = capsys.readouterr().out
    assert code == 0
    assert "make bench-deps" in out
    assert "decord: reads 4 of 5 clips" in out
    assert "2.12x (2)" in out
    assert "2.12x met" in out
    assert "1.00x (goal 1.2x)" in out
    assert "0.50 (goal 0.9)" in out
    assert json.loads((tmp_path / "out.json").read_text()) == numbers(made_report())
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "decode.jsonl").read_text())
    assert record["machine"]["cpu"]
    assert record["means"] == numbers(made_report())["means"]
    assert str(clips) not in json.dumps(record)


def test_results_are_appended_only_beside_their_folder(tmp_path: Path) -> None:
    assert append_result("x", {"n": 1}, folder=tmp_path / "nowhere") is None
    assert append_result("x", {"n": 1}, folder=None) is None
    for n in (1, 2):
        append_result("x", {"n": n}, folder=tmp_path)
    assert [json.loads(line)["n"] for line in (tmp_path / "x.jsonl").read_text().splitlines()] == [1, 2]


def test_a_wrong_path_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        video_files([tmp_path / "nowhere"])
    with pytest.raises(ConfigError, match="no video"):
        video_files([tmp_path])
