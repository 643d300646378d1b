"""The decoder process: answers in order, and a clip that crashes, hangs or bloats costs itself alone."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.confine import NOT_ENFORCED
from pipeline.decode import decode_clip
from pipeline.placement import place_clip
from pipeline.sandbox import DecodeRequest, DecoderProcess
from schemas.config import BucketConfig, DecodeConfig, FramesConfig, LimitsConfig, ResizeConfig
from schemas.errors import ClipError, RunError
from tests.videos import make_video, read_number

REPOSITORY = Path(__file__).resolve().parents[2]
BUCKETS = [BucketConfig(num_frames=9, height=64, width=96)]

FAULTY = """
import os, signal, sys, time
import numpy as np
from pipeline.decode import decode_clip
from pipeline.sandbox_child import serve

first = not os.path.exists(__file__ + ".started")
if first:
    os.mkdir(__file__ + ".started")

def decode(path, **settings):
    name = os.path.basename(path)
    if name.startswith("segfault"):
        print("about to fail", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    if name.startswith("flaky") and first:
        os.kill(os.getpid(), signal.SIGKILL)
    if name.startswith("hang"):
        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))
        while True:
            pass
    if name.startswith("bloat"):
        np.ones(8 << 30, np.uint8)
    if name.startswith("wrong"):
        raise RuntimeError("not as planned")
    if name.startswith("noisy"):
        print("line" * 100_000)
        print("line" * 100_000, file=sys.stderr)
    return decode_clip(path.split("#")[0], **settings)

serve(decode)
"""


KILL = "os.kill(os.getpid(), 9)"


def decoder(**changes: Any) -> DecoderProcess:
    settings: dict[str, Any] = {
        "frames": FramesConfig(),
        "buckets": BUCKETS,
        "resize": ResizeConfig(),
        "limits": LimitsConfig(memory_bytes=2 * 2**30, clip_timeout_s=30.0),
    }
    return DecoderProcess(**(settings | changes))


@pytest.fixture
def clip_path(tmp_path: Path) -> Path:
    return make_video(tmp_path / "good.mp4", num_frames=18)


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[DecoderProcess]:
    program = tmp_path / "faulty.py"
    program.write_text(FAULTY)
    limits = LimitsConfig(memory_bytes=2 * 2**30, clip_timeout_s=1.0)
    with decoder(program=[str(program)], limits=limits) as process:
        yield process


def named(path: Path, name: str) -> DecodeRequest:
    """The good clip under a name that makes the faulty decoder misbehave."""
    other = path.with_name(f"{name}.mp4")
    other.write_bytes(path.read_bytes())
    return DecodeRequest(str(other))


def take(process: DecoderProcess) -> list[int]:
    clip = process.result()
    numbers = [read_number(picture) for picture in clip.frames]
    clip.release()
    return numbers


def failure(process: DecoderProcess) -> ClipError:
    with pytest.raises(ClipError) as caught:
        process.result()
    return caught.value


def test_clips_come_in_order_and_equal_a_decode_in_process(tmp_path: Path) -> None:
    paths = [make_video(tmp_path / f"{i}.mp4", num_frames=9 + i) for i in range(5)]
    with decoder() as process:
        for path in paths[:2]:
            process.submit(DecodeRequest(str(path)))
        for i, path in enumerate(paths):
            clip = process.result()
            frames, bucket, record = decode_clip(
                path, frames=FramesConfig(), buckets=BUCKETS, resize=ResizeConfig(), limits=LimitsConfig()
            )
            np.testing.assert_array_equal(clip.frames, frames)
            assert (clip.bucket, clip.record) == (bucket, record)
            assert clip.decode_s > 0
            clip.release()
            if i + 2 < len(paths):
                process.submit(DecodeRequest(str(paths[i + 2])))


def test_windows_and_placings_go_through(clip_path: Path) -> None:
    window = DecodeRequest(str(clip_path), start_s=0.25, end_s=0.625)
    with decoder() as process:
        process.submit(window)
        for full in (False, True):
            assert process.place(window, full=full) == place_clip(
                clip_path,
                start_s=0.25,
                end_s=0.625,
                frames=FramesConfig(),
                buckets=BUCKETS,
                limits=LimitsConfig(),
                full=full,
            )
        assert take(process) == list(range(6, 15))
        with pytest.raises(ClipError) as caught:
            process.place(DecodeRequest(str(clip_path.with_name("missing.mp4"))))
        assert caught.value.reason == "open_failed"


def test_the_clips_of_a_row_go_through(clip_path: Path) -> None:
    frames = FramesConfig(policy="fps", target_fps=24.0, clips="slide", slide_step=4)
    with decoder(frames=frames) as process:
        assert process.place(DecodeRequest(str(clip_path))).num_clips == 3
        for clip in range(2):
            process.submit(DecodeRequest(str(clip_path), clip=clip))
        assert [take(process), take(process)] == [list(range(9)), list(range(4, 13))]


def test_a_clip_as_long_as_its_row_goes_through(clip_path: Path) -> None:
    frames = FramesConfig(policy="fps", target_fps=24.0, clips="whole")
    lengths = [(5, 7, 9)] * len(BUCKETS)
    with decoder(frames=frames, lengths=lengths) as process:
        for end_s, num_frames in ((0.3, 7), (0.25, 5), (None, 9)):
            request = DecodeRequest(str(clip_path), end_s=end_s)
            assert process.place(request).num_frames == num_frames
            process.submit(request)
            assert take(process) == list(range(num_frames))


def test_a_changed_file_is_opened_anew(clip_path: Path) -> None:
    with decoder() as process:
        for _ in range(2):
            process.submit(DecodeRequest(str(clip_path)))
            assert take(process) == list(range(0, 18, 2))
        make_video(clip_path, num_frames=9)
        process.submit(DecodeRequest(str(clip_path)))
        assert take(process) == list(range(9))


def test_content_errors_keep_the_child(clip_path: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    with decoder() as process:
        for name in ("empty.mp4", "good.mp4", "empty.mp4"):
            process.submit(DecodeRequest(str(tmp_path / name)))
        error = failure(process)
        assert (error.reason, error.stage, error.attempts) == ("empty_file", "decode", 1)
        assert take(process) == list(range(0, 18, 2))
        assert failure(process).reason == "empty_file"


def test_short_error_stops_the_run_and_names_the_file(clip_path: Path) -> None:
    buckets = [BucketConfig(num_frames=25, height=64, width=96)]
    with decoder(frames=FramesConfig(short="error"), buckets=buckets) as process:
        process.submit(DecodeRequest(str(clip_path)))
        with pytest.raises(RunError, match=r"good\.mp4: 18 pictures"):
            process.result()


def test_a_slot_is_not_reused_before_its_release(clip_path: Path) -> None:
    other = make_video(clip_path.with_name("other.mp4"), num_frames=9)
    with decoder(slots=2) as process:
        for path in (clip_path, other, clip_path):
            process.submit(DecodeRequest(str(path)))
        first, second = process.result(), process.result()
        with pytest.raises(RunError, match="release a clip"):
            process.result()
        assert [read_number(picture) for picture in first.frames] == list(range(0, 18, 2))
        assert [read_number(picture) for picture in second.frames] == list(range(9))
        first.release()
        first.release()
        assert first.frames.size == 0
        process.submit(DecodeRequest(str(clip_path)))
        process.submit(DecodeRequest(str(clip_path)))
        third = process.result()
        second.release()
        assert take(process) == [read_number(picture) for picture in third.frames] == list(range(0, 18, 2))


@pytest.mark.parametrize("before", [0, 1])
def test_a_crash_costs_one_clip(faulty: DecoderProcess, clip_path: Path, before: int) -> None:
    good = named(clip_path, "fine")
    for request in [good] * before + [named(clip_path, "segfault"), good, good]:
        faulty.submit(request)
    for _ in range(before):
        assert take(faulty) == list(range(0, 18, 2))
    error = failure(faulty)
    assert (error.reason, error.attempts) == ("decoder_crash", 2)
    assert "SIGSEGV" in error.message
    assert "about to fail" in error.message
    assert take(faulty) == list(range(0, 18, 2))
    assert take(faulty) == list(range(0, 18, 2))


def test_a_crash_that_does_not_repeat_costs_nothing(faulty: DecoderProcess, clip_path: Path) -> None:
    faulty.submit(named(clip_path, "flaky"))
    faulty.submit(named(clip_path, "fine"))
    assert take(faulty) == list(range(0, 18, 2))
    assert take(faulty) == list(range(0, 18, 2))


def test_an_endless_loop_costs_one_clip(faulty: DecoderProcess, clip_path: Path) -> None:
    for name in ("fine", "hang", "also_fine"):
        faulty.submit(named(clip_path, name))
    assert take(faulty) == list(range(0, 18, 2))
    error = failure(faulty)
    assert (error.reason, error.attempts) == ("timeout", 1)
    assert "limits.clip_timeout_s = 1.0" in error.message
    assert take(faulty) == list(range(0, 18, 2))


def test_the_clock_runs_per_clip_and_only_while_it_is_decoded(
    faulty: DecoderProcess, clip_path: Path
) -> None:
    for name in ("a", "b"):
        faulty.submit(named(clip_path, name))
    time.sleep(1.5)  # longer than a clip may take: the caller was busy, not the decoder
    assert take(faulty) == list(range(0, 18, 2))
    assert take(faulty) == list(range(0, 18, 2))


def test_the_memory_that_clips_lie_in_is_beside_the_limit(clip_path: Path) -> None:
    """Two slots of 1.5 GB, mapped and next to unused, under a limit of 2 GiB."""
    large = {
        "frames": FramesConfig(policy="fps", target_fps=24.0, clips="whole"),
        "buckets": [BucketConfig(num_frames=80_001, height=64, width=96)],
        "lengths": [(9, 80_001)],
    }
    with decoder(**large) as process:
        process.submit(DecodeRequest(str(clip_path)))
        assert take(process) == list(range(9))


def test_a_memory_bomb_costs_one_clip(faulty: DecoderProcess, clip_path: Path) -> None:
    faulty.submit(named(clip_path, "bloat"))
    faulty.submit(named(clip_path, "fine"))
    error = failure(faulty)
    assert (error.reason, error.attempts) == ("limit_memory", 1)
    assert take(faulty) == list(range(0, 18, 2))


def test_an_error_of_ours_costs_one_clip_and_says_where(faulty: DecoderProcess, clip_path: Path) -> None:
    for name in ("wrong", "fine"):
        faulty.submit(named(clip_path, name))
    error = failure(faulty)
    assert (error.reason, error.stage, error.attempts) == ("internal", "decode", 1)
    assert re.search(r"RuntimeError: not as planned \(faulty\.py:\d+ in decode\)", error.message)
    assert take(faulty) == list(range(0, 18, 2))


@pytest.mark.parametrize(("threads", "alone"), [(1, True), (2, False)])
def test_the_child_starts_no_process_and_threads_only_if_asked(
    tmp_path: Path, threads: int, alone: bool
) -> None:
    program = tmp_path / "told.py"
    program.write_text(
        """
import resource
from pipeline.sandbox_child import serve
from schemas.errors import ClipError

def decode(path, **settings):
    raise ClipError("told", str(resource.getrlimit(resource.RLIMIT_NPROC)[0]))

serve(decode)
"""
    )
    with decoder(program=[str(program)], decode=DecodeConfig(threads=threads)) as process:
        process.submit(DecodeRequest("a.mp4"))
        assert (failure(process).message == "0") is alone


def test_what_a_decoder_prints_disturbs_nothing(
    faulty: DecoderProcess, clip_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    faulty.submit(named(clip_path, "noisy"))
    assert take(faulty) == list(range(0, 18, 2))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("last_words", "starts"), [("raise SystemExit('no such decoder')", 1), (KILL, 3)])
def test_a_program_that_does_not_start_says_why(tmp_path: Path, last_words: str, starts: int) -> None:
    program = tmp_path / "broken.py"
    program.write_text(f"import os\nos.mkdir(f'{{__file__}}.{{os.getpid()}}')\n{last_words}")
    with decoder(program=[str(program)]) as process:
        process.submit(DecodeRequest("a.mp4"))
        with pytest.raises(RunError, match=r"does not start: .*(no such decoder|SIGKILL)"):
            process.result()
    assert len(list(tmp_path.glob("broken.py.*"))) == starts


def test_a_child_killed_while_it_starts_is_started_again(tmp_path: Path, clip_path: Path) -> None:
    program = tmp_path / "late.py"
    tried = tmp_path / "tried"
    once = f"import os\nif not os.path.exists({str(tried)!r}):\n    os.mkdir({str(tried)!r})\n    {KILL}\n"
    program.write_text(once + FAULTY)
    with decoder(program=[str(program)]) as process:
        process.submit(DecodeRequest(str(clip_path)))
        assert take(process) == list(range(0, 18, 2))
        assert not process.protections["memory"].startswith(NOT_ENFORCED)


def test_the_child_dies_with_its_parent(clip_path: Path, tmp_path: Path) -> None:
    (tmp_path / "faulty.py").write_text(FAULTY)
    hanging = named(clip_path, "hang")
    code = f"""
import sys, time
sys.path.insert(0, {str(REPOSITORY)!r})
from tests.pipeline.test_sandbox import decoder
from pipeline.sandbox import DecodeRequest
process = decoder(program=[{str(tmp_path / "faulty.py")!r}])
process.submit(DecodeRequest({hanging.path!r}))
print(process._child._process.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert running(child)
        parent.kill()
    deadline = time.monotonic() + 10
    while running(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not running(child)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_child_is_lean() -> None:
    code = "import sys, pipeline.sandbox_child; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=60
    )
    assert not {"torch", "ray", "transformers", "pandas"} & set(run.stdout.split())


def test_frames_outlive_the_decoder(clip_path: Path) -> None:
    with decoder() as process:
        process.submit(DecodeRequest(str(clip_path)))
        clip = process.result()
        kept = clip.frames.copy()
    np.testing.assert_array_equal(clip.frames, kept)
