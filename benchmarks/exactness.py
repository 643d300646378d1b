"""Are our frames the ones a plain decode gives? Byte for byte, for every clip and every policy.

`python -m benchmarks.exactness CLIPS [--jobs N]` takes video files or folders. Each file is decoded once from
its first packet to its last by a loop that knows nothing of the packet plan; what every policy makes of
the clip, with 1 and with 2 decoder threads, is then compared with those pictures. Only the pixel
arithmetic of one picture (`pipeline.normalize`, `pipeline.deinterlace`) is shared by both sides.
"""

from __future__ import annotations

import argparse
import bisect
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from benchmarks.record import append_result
from pipeline.clip import ClipRecord
from pipeline.decode import decode_clip
from pipeline.deinterlace import Deinterlacer
from pipeline.discover import video_files
from pipeline.normalize import Normalizer
from pipeline.placement import place_clip
from schemas.config import BucketConfig, DecodeConfig, FramesConfig, LimitsConfig, PictureConfig, ResizeConfig
from schemas.errors import ClipError

BUCKET = BucketConfig(num_frames=17, height=64, width=96)
_FPS, _CHUNK = {"policy": "fps", "target_fps": 8.0}, {"clips": "chunk"}
POLICIES: dict[str, tuple[FramesConfig, int]] = {
    "uniform": (FramesConfig(), 0),
    "keyframe, packets": (FramesConfig(policy="keyframe"), 0),
    "keyframe, exact": (FramesConfig(policy="keyframe", activity="exact"), 0),
    "fps, head": (FramesConfig.model_validate(_FPS), 0),
    "fps, chunk 1": (FramesConfig.model_validate(_FPS | _CHUNK), 1),
    "fps, slide 1": (FramesConfig.model_validate(_FPS | {"clips": "slide", "slide_step": 8}), 1),
    "contiguous": (FramesConfig(policy="contiguous"), 0),
    "cogvideox_floor": (FramesConfig(policy="cogvideox_floor"), 0),
    "cogvideox_sat": (FramesConfig(policy="cogvideox_sat"), 0),
    "finetrainers_linspace": (FramesConfig(policy="finetrainers_linspace"), 0),
    "ttt_exact": (FramesConfig(policy="ttt_exact"), 0),
    "latentsync_contiguous": (FramesConfig(policy="latentsync_contiguous"), 0),
}
"""Name -> settings, and which clip of the row is looked at."""
THREADS = (1, 2)
MOST_EXACT = 400
"""Pictures of a clip that is asked for whole."""
_ROUNDING_S = 2e-6
"""Records give times to the microsecond."""


@dataclass(frozen=True)
class Plain:
    """All pictures of a file in presentation order."""

    times: list[float]
    """Seconds from the first picture the container promises."""
    pictures: list[np.ndarray]
    """uint8 [H, W, 3] each."""
    sound: list[bool]
    """False from an error or a flagged picture up to the next clean key picture."""


def plain_decode(path: Path, *, bucket: BucketConfig, resize: ResizeConfig) -> Plain:
    """Decode everything, in order, on one thread, with the default treatment of odd pictures."""
    origin, time_base, promised = _promised(path)
    ticks: list[int | None] = []
    sound: list[bool] = []
    pictures: list[np.ndarray] = []
    weaver = Deinterlacer(range(len(promised) + 1))
    with av.open(f"file:{path}", metadata_errors="ignore") as container:
        stream = _stream(container.streams.best("video"), container.streams.video)
        sar = stream.sample_aspect_ratio or Fraction(1)
        normalizer = Normalizer(bucket, resize=resize, picture=PictureConfig(), sar=sar)

        def keep(shown: Iterable[tuple[int, VideoFrame]]) -> None:
            for _, frame in shown:
                pictures.append(np.empty((bucket.height, bucket.width, 3), np.uint8))
                normalizer.convert(frame, pictures[-1])

        broken = False
        for found in _decoded(container, stream):
            if found is None:
                broken = True
                continue
            broken = found.is_corrupt or (broken and not found.key_frame)
            ticks.append(found.pts)
            sound.append(not broken)
            keep(weaver.push(len(ticks) - 1, found))
        keep(weaver.flush())
    known = [tick for tick in ticks if tick is not None]
    if len(known) < len(ticks) or any(b <= a for a, b in pairwise(known)):
        known = promised[: len(ticks)]  # times that say nothing: the n-th picture is the n-th promised
    times = [float((tick - origin) * time_base) for tick in known]
    return Plain(times, pictures[: len(times)], sound[: len(times)])


def _promised(path: Path) -> tuple[int, Fraction, list[int]]:
    """First tick, seconds per tick and all ticks that the packets name; counted where they name none."""
    with av.open(f"file:{path}", metadata_errors="ignore") as container:
        stream = _stream(container.streams.best("video"), container.streams.video)
        rate = stream.guessed_rate or stream.average_rate or Fraction(25)
        times: list[int | None] = []
        shown = (packet for packet in container.demux(stream) if packet.size and not packet.is_discard)
        with suppress(av.FFmpegError):  # a cut file is what can be read of it
            times.extend(packet.pts for packet in shown)
        known = sorted({tick for tick in times if tick is not None})
        if 2 * len(known) >= len(times) and known:
            return known[0], stream.time_base or 1 / rate, known
        return 0, 1 / rate, list(range(len(times)))


def _stream(best: object, others: Sequence[VideoStream]) -> VideoStream:
    for stream in [best, *others]:
        if isinstance(stream, VideoStream) and not stream.disposition & Disposition.attached_pic:
            return stream
    raise ClipError("no_video_stream", "no video stream")


def _decoded(container: av.container.InputContainer, stream: VideoStream) -> Iterator[VideoFrame | None]:
    """Pictures as they come out; None for a packet that gives an error."""
    decoder: VideoCodecContext | None = stream.codec_context
    if decoder is None:
        raise ClipError("no_decoder", "no decoder")
    library = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(decoder.codec.canonical_name)
    if library and stream.metadata.get("alpha_mode") == "1":
        # FFmpeg's own decoders leave the alpha channel out.
        made = av.CodecContext.create(library, "r")
        assert isinstance(made, VideoCodecContext)
        made.width, made.height = decoder.width, decoder.height
        decoder = made
    decoder.thread_type, decoder.thread_count = "NONE", 1
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except av.FFmpegError:
            packet = None  # a cut file is what can be read of it
        if packet is not None and not packet.size:
            continue
        try:
            yield from decoder.decode(packet)
        except av.FFmpegError:
            yield None
        if packet is None:
            return


def differences(frames: np.ndarray, record: ClipRecord, plain: Plain) -> list[str]:
    """What is wrong with frames [F, H, W, 3], one sentence each; empty where all are as decoded plainly."""
    wrong = []
    for i, (frame, second) in enumerate(zip(frames, record.pts_s, strict=True)):
        if i in record.interpolated:
            allowed = _blends(second, plain, repaired=i in record.repaired)
        else:
            allowed = _shown(second, plain, repaired=i in record.repaired)
        if not allowed:
            wrong.append(f"frame {i} claims {second} s, where a plain decode gives no sound picture")
        elif not any(np.array_equal(frame, picture) for picture in allowed):
            off = min(int(np.abs(frame.astype(int) - picture).max()) for picture in allowed)
            same = [t for t, p in zip(plain.times, plain.pictures, strict=True) if np.array_equal(frame, p)]
            instead = f"it is the picture at {same[0]:.6f} s" if same else f"it is off by up to {off}"
            wrong.append(f"frame {i} is not the picture at {second} s: {instead}")
    return wrong


def _shown(second: float, plain: Plain, *, repaired: bool) -> list[np.ndarray]:
    """The sound picture at a time; for a repaired frame the nearest, or both where they are as near."""
    gaps = [abs(t - second) if ok else math.inf for t, ok in zip(plain.times, plain.sound, strict=True)]
    nearest = min(gaps, default=math.inf)
    if math.isinf(nearest) or (nearest > _ROUNDING_S and not repaired):
        return []
    return [plain.pictures[k] for k, gap in enumerate(gaps) if gap <= nearest + _ROUNDING_S]


def _blends(second: float, plain: Plain, *, repaired: bool) -> list[np.ndarray]:
    """A time between two pictures: their blend in 256ths, both ways where rounding could go either way."""
    k = bisect.bisect_right(plain.times, second + _ROUNDING_S) - 1
    if not 0 <= k < len(plain.times) - 1:
        return []
    before, after = plain.times[k], plain.times[k + 1]
    share = 256 * (second - before) / (after - before)
    slack = 256 * _ROUNDING_S / (after - before)
    found = []
    for weight in {round(share - slack), round(share + slack)}:
        for a in _shown(before, plain, repaired=repaired):
            for b in _shown(after, plain, repaired=repaired):
                blend = a.astype(np.uint16) * (256 - weight) + b.astype(np.uint16) * weight
                found.append(((blend + 128) // 256).astype(np.uint8))
    return found


@dataclass(frozen=True)
class Verdict:
    """One policy on one clip with one number of threads."""

    clip: str
    policy: str
    threads: int
    refused: str = ""
    """Reason code; empty where frames were given."""
    wrong: list[str] = field(default_factory=list)
    in_order: bool = False
    """Whether the plan was given up for a decode in order."""


def check_clip(
    path: Path, *, policies: Sequence[str] = tuple(POLICIES), threads: Sequence[int] = THREADS
) -> list[Verdict]:
    """Every policy on one file, against one plain decode of it."""
    resize, verdicts = ResizeConfig(), []
    plain: Plain | None = None
    for name in policies:
        frames_config, clip = POLICIES[name]
        for count in threads:
            try:
                bucket = BUCKET
                if name == "ttt_exact":
                    frames_config, bucket = _exactly(path, frames_config)
                frames, _, record = decode_clip(
                    path,
                    clip=clip,
                    frames=frames_config,
                    buckets=[bucket],
                    resize=resize,
                    decode=DecodeConfig(threads=count),
                    limits=LimitsConfig(),
                )
            except ClipError as error:
                verdicts.append(Verdict(path.name, name, count, refused=error.reason))
                continue
            if plain is None:
                plain = plain_decode(path, bucket=BUCKET, resize=resize)
            wrong = differences(frames, record, plain)
            in_order = any(note.startswith("decoded in order") for note in record.notes)
            verdicts.append(Verdict(path.name, name, count, wrong=wrong, in_order=in_order))
    return verdicts


def _exactly(path: Path, frames: FramesConfig) -> tuple[FramesConfig, BucketConfig]:
    """Settings that ask for what the clip has, as `ttt_exact` takes no other; a long clip stays refused."""
    placed = place_clip(path, frames=FramesConfig(), buckets=[BUCKET], limits=LimitsConfig())
    if placed.num_available > MOST_EXACT:
        return frames, BUCKET
    return (
        frames.model_copy(update={"target_fps": placed.info.fps}),
        BUCKET.model_copy(update={"num_frames": placed.num_available}),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exactness", description=__doc__)
    parser.add_argument("clips", nargs="+", type=Path, help="video files, or folders of them")
    parser.add_argument("--jobs", type=int, default=1, help="clips at a time, each in a process of its own")
    options = parser.parse_args(arguments)
    paths = video_files(options.clips)
    verdicts: list[Verdict] = []
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for found in pool.map(check_clip, paths):
            verdicts += found
            _tell(found)
    _print_table(verdicts)
    wrong = [v for v in verdicts if v.wrong]
    recorded = append_result("exactness", _numbers(verdicts))
    if recorded is not None:
        print(f"wrote {recorded}")
    return 1 if wrong else 0


def _tell(verdicts: Sequence[Verdict]) -> None:
    """One line per clip, and one per policy that differs or is refused for a reason of its own."""
    refusals = Counter(v.refused for v in verdicts if v.refused)
    told = ", ".join(f"{reason} {count}" for reason, count in refusals.items())
    same = sum(not v.refused and not v.wrong for v in verdicts)
    fallback = " (decoded in order)" if any(v.in_order for v in verdicts) else ""
    print(f"{verdicts[0].clip}: {same} of {len(verdicts)} as decoded plainly{fallback}", end="")
    print(f"; refused: {told}" if told else "", flush=True)
    for v in verdicts:
        for sentence in v.wrong[:3]:
            print(f"  {v.policy}, {v.threads} threads: {sentence}", flush=True)


def _print_table(verdicts: Sequence[Verdict]) -> None:
    print(f"\n{'policy':24}{'threads':>8}{'same':>8}{'differs':>9}{'refused':>9}")
    for name in POLICIES:
        for count in THREADS:
            row = [v for v in verdicts if (v.policy, v.threads) == (name, count)]
            refused, wrong = sum(bool(v.refused) for v in row), sum(bool(v.wrong) for v in row)
            print(f"{name:24}{count:8}{len(row) - refused - wrong:8}{wrong:9}{refused:9}")


def _numbers(verdicts: Sequence[Verdict]) -> dict[str, object]:
    """The verdicts as plain values for the record of results."""
    given = [v for v in verdicts if not v.refused]
    return {
        "clips": len({v.clip for v in verdicts}),
        "num_frames": BUCKET.num_frames,
        "same": sum(not v.wrong for v in given),
        "in_order": sorted({v.clip for v in given if v.in_order}),
        "differs": [f"{v.clip}, {v.policy}, {v.threads} threads: {v.wrong[0]}" for v in given if v.wrong],
        "refused": {
            reason: sorted({v.clip for v in verdicts if v.refused == reason})
            for reason in sorted({v.refused for v in verdicts if v.refused})
        },
    }


if __name__ == "__main__":
    sys.exit(main())
