"""Five ways to decode a clip into F frames of one size, each run in a child process of its own.

`python -m benchmarks.contenders NAME` reads one job per line from standard input and answers each with one
line of JSON: CPU seconds, pictures counted, frames given, or the error. All use one thread, take the same
evenly spread pictures and stretch them to the same size, so that they do the same job.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

BUILD_PLACE = re.compile(r"(\[[\d:]+\] |\w+, )?\S+\.(cc|cpp):\d+[:,] ")
"""Where in its source a library complains, as seen by whoever built it."""


@dataclass(frozen=True)
class Target:
    """What every contender makes of a clip."""

    num_frames: int = 49
    height: int = 480
    width: int = 720


@dataclass(frozen=True)
class Stream:
    """What kind of video a clip is."""

    codec: str
    width: int
    """Coded pixels."""
    height: int
    intra: bool
    """Every packet is a key packet: nothing is predicted, any picture can be decoded alone."""


@dataclass(frozen=True)
class Outcome:
    num_pictures: int
    """Pictures in the clip, as the contender counts them."""
    shape: tuple[int, ...]
    """Of the frames given: (F, H, W, 3)."""
    num_fed: int | None = None
    """Packets its decoder was given; None where the library does not tell."""
    stream: Stream | None = None
    """Told by the bare decode."""


Run = Callable[[str, Target], Outcome]


def spread(num_pictures: int, num_frames: int) -> list[int]:
    """Positions floor(i * S) of S = num_pictures / num_frames; a short clip repeats its last picture."""
    if num_pictures < num_frames:
        return [min(i, num_pictures - 1) for i in range(num_frames)]
    return [i * num_pictures // num_frames for i in range(num_frames)]


def ours() -> Run:
    """`pipeline.decode`: only the pictures that are needed, into memory that is used again, as in a decoder
    child's slots."""
    from pipeline.decode import decode_clip
    from schemas.config import BucketConfig, FramesConfig, LimitsConfig, ResizeConfig

    memory = np.zeros(0, np.uint8)

    def run(path: str, target: Target) -> Outcome:
        nonlocal memory
        needed = target.num_frames * target.height * target.width * 3
        memory = memory if memory.size >= needed else np.zeros(needed, np.uint8)
        frames, _, record = decode_clip(
            path,
            frames=FramesConfig(policy="uniform", short="repeat_last"),
            buckets=[BucketConfig(**asdict(target))],
            resize=ResizeConfig(mode="stretch"),
            limits=LimitsConfig(),
            buffer=memory,
        )
        return Outcome(record.num_pictures, frames.shape, num_fed=record.num_fed)

    return run


def naive() -> Run:
    """PyAV as most scripts use it: every picture to full-size RGB, then pick, then an antialiased resize."""
    import av

    av.logging.set_level(av.logging.PANIC)
    resize = _torch_resize()

    def run(path: str, target: Target) -> Outcome:
        with av.open(path) as container:
            num_packets = sum(packet.size > 0 for packet in container.demux(video=0))
        wanted, kept, count = set(spread(num_packets, target.num_frames)), [], 0
        with av.open(path) as container:
            container.streams.video[0].thread_type = "NONE"
            # Keeping all of them, as such scripts do, would need 25 GB for five minutes of 720p.
            for count, frame in enumerate(container.decode(video=0), start=1):
                picture = frame.to_ndarray(format="rgb24")
                if count - 1 in wanted:
                    kept.append(picture)
        frames = resize(np.stack(kept).transpose(0, 3, 1, 2), target)
        return Outcome(count, _padded(frames, target))

    return run


def decord() -> Run:
    """decord with its own resize."""
    import decord

    decord.logging.set_level(decord.logging.QUIET)

    def run(path: str, target: Target) -> Outcome:
        reader = decord.VideoReader(path, width=target.width, height=target.height, num_threads=1)
        frames = reader.get_batch(spread(len(reader), target.num_frames)).asnumpy()
        return Outcome(len(reader), frames.shape)

    return run


def torchcodec() -> Run:
    """torchcodec's exact mode, then an antialiased resize (its own resize is slower on one thread)."""
    from torchcodec.decoders import VideoDecoder  # type: ignore[attr-defined]

    resize = _torch_resize()

    def run(path: str, target: Target) -> Outcome:
        decoder = VideoDecoder(path, seek_mode="exact", num_ffmpeg_threads=1)
        count = len(decoder)
        pictures = decoder.get_frames_at(sorted(set(spread(count, target.num_frames)))).data
        return Outcome(count, _padded(resize(pictures.numpy(), target), target))

    return run


def bare() -> Run:
    """The ceiling: every picture decoded, nothing converted; damaged packets are passed over."""
    import av

    av.logging.set_level(av.logging.PANIC)

    def run(path: str, target: Target) -> Outcome:
        count, intra = 0, True
        with av.open(path, metadata_errors="ignore") as container:
            stream = container.streams.best("video")
            if not isinstance(stream, av.VideoStream) or stream.codec_context is None:
                raise ValueError("no video stream with a decoder")
            decoder = stream.codec_context
            decoder.thread_count = 1
            for packet in container.demux(stream):
                intra = intra and (packet.is_keyframe or not packet.size)
                try:
                    count += sum(1 for _ in packet.decode())
                except av.error.InvalidDataError:
                    continue
            if not count:
                raise ValueError("no picture could be decoded")
            kind = Stream(decoder.codec.canonical_name, decoder.width, decoder.height, intra)
            return Outcome(count, (), num_fed=count, stream=kind)

    return run


CONTENDERS: dict[str, Callable[[], Run]] = {
    "ours": ours,
    "PyAV naive": naive,
    "decord": decord,
    "torchcodec": torchcodec,
    "bare decode": bare,
}
PACKAGES = {
    "ours": "av",
    "PyAV naive": "av",
    "decord": "decord",
    "torchcodec": "torchcodec",
    "bare decode": "av",
}


def _torch_resize() -> Callable[[np.ndarray, Target], np.ndarray]:
    import torch

    torch.set_num_threads(1)

    def resize(pictures: np.ndarray, target: Target) -> np.ndarray:
        size = (target.height, target.width)
        tensor = torch.from_numpy(pictures)
        if tensor.shape[-2:] != size:
            tensor = torch.nn.functional.interpolate(tensor, size, mode="bilinear", antialias=True)
        return tensor.permute(0, 2, 3, 1).contiguous().numpy()

    return resize


def _padded(frames: np.ndarray, target: Target) -> tuple[int, ...]:
    """The shape with a short clip's last frame repeated, and the work of repeating it."""
    missing = target.num_frames - len(frames)
    if missing > 0:
        frames = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])
    return frames.shape


def main(name: str) -> None:
    # Libraries print to standard output; the answers go where it led, and it leads to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=answers, flush=True)

    try:
        run = CONTENDERS[name]()
    except Exception as error:
        return answer({"missing": f"{type(error).__name__}: {error}".splitlines()[0]})
    answer({"version": importlib.metadata.version(PACKAGES[name])})
    for line in sys.stdin:
        job = json.loads(line)
        target, started = Target(**job["target"]), time.process_time()
        try:
            outcome = asdict(run(job["path"], target))
        except Exception as error:
            reason = getattr(error, "reason", "") or type(error).__name__
            message = BUILD_PLACE.sub("", f"{reason}: {error}".splitlines()[0])
            outcome = {"error": message.replace(job["path"], "the file")}
        answer({**outcome, "cpu_s": time.process_time() - started})


if __name__ == "__main__":
    main(sys.argv[1])
