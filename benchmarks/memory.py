"""Does the decoder's process stay the same size? Its resident memory over all clips, and over many repeats.

`python -m benchmarks.memory CLIPS [--repeats N]` takes video files or folders. One decoder child takes every
clip once, which gives the peak; a new one then takes a few clips, the quickest of each codec, again and
again, which shows whether anything is left behind. Linux only: numbers are from /proc.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.record import append_result
from pipeline.discover import video_files
from pipeline.sandbox import DecodeRequest, DecoderProcess
from schemas.config import BucketConfig, FramesConfig, LimitsConfig, ResizeConfig
from schemas.errors import ClipError

BUCKET = BucketConfig(num_frames=49, height=480, width=720)
NUM_REPEATED = 6
"""Clips that are taken again and again."""


@contextmanager
def decoder() -> Iterator[DecoderProcess]:
    settings = {"frames": FramesConfig(), "buckets": [BUCKET], "resize": ResizeConfig()}
    with DecoderProcess(**settings, limits=LimitsConfig(), slots=1) as process:  # type: ignore[arg-type]
        yield process


def take(process: DecoderProcess, path: Path) -> tuple[str, float] | None:
    """Codec and seconds of one clip, its frames given back at once; None where it is refused."""
    process.submit(DecodeRequest(str(path)))
    try:
        clip = process.result()
    except ClipError:
        return None
    codec, seconds = clip.record.codec, clip.decode_s
    clip.release()
    return codec, seconds


def child_memory() -> dict[str, float]:
    """MiB of this process's newest child: `rss` now, `own` without memory it shares, `peak` so far."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    lines = Path(f"/proc/{children[-1]}/status").read_text().splitlines()
    kib = {
        name: value.split()[0] for name, _, value in (line.partition(":") for line in lines) if value.strip()
    }
    fields = {"rss": "VmRSS", "own": "RssAnon", "peak": "VmHWM"}
    return {name: round(int(kib[field]) / 1024, 1) for name, field in fields.items()}


def over_all(paths: Sequence[Path]) -> tuple[dict[str, object], list[Path]]:
    """Every clip once: peak and what is left at the end; and the quickest clip of each codec."""
    quickest: dict[str, tuple[float, Path]] = {}
    peaks: list[tuple[float, str]] = []
    with decoder() as process:
        for path in paths:
            found = take(process, path)
            if found is not None:
                codec, seconds = found
                quickest[codec] = min(quickest.get(codec, (seconds, path)), (seconds, path))
            memory = child_memory()
            grown = memory["peak"] - (peaks[-1][0] if peaks else 0.0)
            if grown > 0:
                peaks.append((memory["peak"], path.name))
        numbers = {
            "clips": len(paths),
            "peak": peaks[-1][0],
            "peak_at": peaks[-1][1],
            "after": child_memory(),
        }
    return numbers, [path for _, path in sorted(quickest.values())[:NUM_REPEATED]]


def over_repeats(paths: Sequence[Path], *, repeats: int) -> dict[str, object]:
    """`repeats` clips, `paths` in turn: memory along the way, and its slope once every clip has been seen."""
    samples: list[tuple[int, float]] = []
    told: dict[int, dict[str, float]] = {}
    with decoder() as process:
        for i in range(1, repeats + 1):
            take(process, paths[i % len(paths)])
            memory = child_memory()
            samples.append((i, memory["rss"]))
            if i == 1 or i % 50 == 0:
                told[i] = memory
    # The first rounds fill caches and free lists.
    settled = [sample for sample in samples if sample[0] > repeats // 4]
    slope, _ = statistics.linear_regression(*zip(*settled, strict=True))
    names = [path.name for path in paths]
    return {"clips": names, "after": told, "slope_per_100": round(100 * slope, 2)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("clips", nargs="+", type=Path, help="video files, or folders of them")
    parser.add_argument("--repeats", type=int, default=200, help="clips in the second part")
    options = parser.parse_args(arguments)
    paths = video_files(options.clips)
    once, chosen = over_all(paths)
    print(
        f"{once['clips']} clips once: peak {once['peak']} MiB at {once['peak_at']}, after all {once['after']}"
    )
    repeated = over_repeats(chosen, repeats=options.repeats)
    print(f"{options.repeats} clips, in turn {', '.join(path.name for path in chosen)}:")
    print(f"{'after':>6}{'resident':>10}{'own':>8}{'peak':>8}  MiB")
    after = repeated["after"]
    assert isinstance(after, dict)
    for i, memory in after.items():
        print(f"{i:6}{memory['rss']:10.1f}{memory['own']:8.1f}{memory['peak']:8.1f}")
    print(f"slope after the first quarter: {repeated['slope_per_100']} MiB per 100 clips")
    numbers = {"unit": "MiB", "num_frames": BUCKET.num_frames, "once": once, "repeated": repeated}
    recorded = append_result("memory", numbers)
    if recorded is not None:
        print(f"wrote {recorded}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
