"""Encoders fed from memory: the ceiling of preprocessing, and how near a real run comes to it.

Every variant (bucket, type, tiling, layout, compile) runs in a process of its own, so that its peak memory is
its own and running out of it ends that variant alone. Rounds over the variants are interleaved; loading
and the first batch, which compiles and picks kernels, are outside the clock and given apart.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from pipeline.graph import manifest_rows, preprocess
from pipeline.starved import is_starved
from pipeline.text_encode import load_text_encoder
from pipeline.video_encode import load_video_encoder
from schemas.bucket import bucket_name
from schemas.config import BucketConfig, Dtype, PreprocessConfig, TextEncoderConfig, VideoEncoderConfig

Made = TypeVar("Made")
_CAPTION = "A slow pan over a harbour at dawn: fishing boats, gulls and a man mending nets on the quay. "


@dataclass(frozen=True)
class Variant:
    """One way to run the video encoder."""

    bucket: BucketConfig
    dtype: Dtype
    tiled: bool = False
    channels_last: bool = False
    compile: bool = False

    @property
    def name(self) -> str:
        words = ("tiled", self.tiled), ("channels-last", self.channels_last), ("compiled", self.compile)
        return " ".join([self.dtype, *(word for word, on in words if on)])


@dataclass(frozen=True)
class Measured:
    """What one process saw."""

    seconds: float
    """Per batch."""
    batch: int
    peak_bytes: int
    """While encoding, with the weights: of the GPU where there is one, else of the process above what it was
    before they were loaded."""
    load_s: float
    first_s: float
    """The first batch."""
    device: str


def variants(
    config: PreprocessConfig, *, dtypes: Sequence[Dtype], tiling: bool, compile: bool
) -> list[Variant]:
    """Every bucket in every type, plain and channels-last; tiled and compiled where asked for. The embedded
    codec has one way."""
    if config.video_encoder.kind == "dct":
        return [Variant(bucket, "float32") for bucket in config.buckets]
    layouts = [(False, False), (True, False)] + ([(False, True), (True, True)] if compile else [])
    ways = [(False, *layout) for layout in layouts] + ([(True, False, False)] if tiling else [])
    return [
        Variant(bucket, dtype, *way) for bucket, dtype, way in itertools.product(config.buckets, dtypes, ways)
    ]


def measure_video(
    config: VideoEncoderConfig,
    chosen: Sequence[Variant],
    *,
    batches: int,
    reps: int,
    tell: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Medians over `reps` rounds of `batches` batches each, one entry a variant, in order."""
    runs: dict[Variant, list[Measured | str]] = {variant: [] for variant in chosen}
    for number, variant in itertools.product(range(reps), chosen):
        if runs[variant] and isinstance(runs[variant][-1], str):
            continue  # it will not fit the next time either
        tell(f"round {number + 1} of {reps}: {bucket_name(variant.bucket)} {variant.name}")
        settings = config.model_copy(
            update={
                "compute_dtype": variant.dtype,
                "channels_last": variant.channels_last,
                "compile": variant.compile,
            }
        )
        runs[variant].append(alone(_encode_video, settings, variant.bucket, variant.tiled, batches))
    return [_video_numbers(variant, found) for variant, found in runs.items()]


def measure_text(
    config: TextEncoderConfig,
    *,
    dtypes: Sequence[Dtype],
    batch_sizes: Sequence[int],
    tell: Callable[[str], None],
) -> list[dict[str, Any]]:
    """One entry per type and batch size: captions of about 100 tokens, padded as the config asks."""
    result = []
    for dtype, batch in itertools.product(dtypes, batch_sizes):
        tell(f"text encoder: {dtype}, batches of {batch}")
        settings = config.model_copy(update={"compute_dtype": dtype, "batch_size": batch})
        found = alone(_encode_text, settings, batch)
        numbers: dict[str, Any] = {"dtype": dtype, "batch": batch}
        if isinstance(found, str):
            numbers["failed"] = found
        else:
            rate = found.batch / found.seconds
            numbers |= {
                "captions_per_s": round(rate, 3),
                "tokens_per_s": round(rate * config.max_length, 1),
                "peak_bytes": found.peak_bytes,
                "load_s": round(found.load_s, 2),
                "device": found.device,
            }
        result.append(numbers)
    return result


def end_to_end(
    config: PreprocessConfig, *, rows: int, batches: int, reps: int, tell: Callable[[str], None]
) -> dict[str, Any]:
    """The real command on `rows` rows spread over the manifest, into a new dataset, beside the same encoder
    fed from memory, in turn, `reps` times.

    `of_ceiling` is the time that the kept clips would take from memory, over that of the latents pass without
    the start of workers and the loading of weights.
    """
    settings, shares, passes = config.video_encoder, [], []
    for number in range(reps):
        tell(f"end to end, run {number + 1} of {reps}")
        seconds = {}
        for bucket in config.buckets:
            found = alone(_encode_video, settings, bucket, settings.tiling == "on", batches)
            if isinstance(found, str):
                return {"failed": f"{bucket_name(bucket)} from memory: {found}"}
            seconds[bucket_name(bucket)] = found.seconds / found.batch
        summary = alone(_preprocess, config, rows)
        if isinstance(summary, str):
            return {"failed": summary}
        run, workers = summary["last_run"]["latents"], summary["last_run"]["executor"]["workers"]
        ceiling = sum(seconds[name] * count for name, count in summary["buckets"].items()) / workers
        working_s = run["wall_s"] - run["start_s"] - run["stage_seconds"]["load"] / workers
        shares.append(ceiling / working_s)
        passes.append(run)
    return {
        "clips": passes[0]["clips"],
        "clips_per_s": statistics.median(each["clips_per_s"] for each in passes),
        "of_ceiling": round(statistics.median(shares), 3),
        "stage_busy": passes[-1]["stage_busy"],
        "bottleneck": passes[-1]["bottleneck"],
    }


def _preprocess(config: PreprocessConfig, rows: int) -> dict[str, Any]:
    """The summary of a run over some rows of the manifest."""
    found = manifest_rows(config)
    step = max(1, len(found) // rows)
    with tempfile.TemporaryDirectory(prefix="latentpress-bench-") as folder:
        manifest = Path(folder) / "manifest.jsonl"
        with manifest.open("w", encoding="utf-8") as file:
            for row in found[step // 2 :: step][:rows]:
                window = {"start_s": row.start_s, "end_s": row.end_s}
                file.write(json.dumps({"video": row.path, "caption": row.caption, **window}) + "\n")
        small = config.model_copy(update={"manifest": str(manifest), "output": f"{folder}/latents"})
        return preprocess(small)[0]


def alone(function: Callable[..., Made], *arguments: Any) -> Made | str:
    """The result of `function` in a fresh process, whose memory ends with it; or why there is none."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except Exception as error:
            if is_starved(error):
                return "out of memory"
            return f"{type(error).__name__}: {str(error)[:200]}"


def _encode_video(config: VideoEncoderConfig, bucket: BucketConfig, tiled: bool, batches: int) -> Measured:
    encoder, memory = load_video_encoder(config), _Memory()
    started = time.perf_counter()
    encoder.load()
    load_s = time.perf_counter() - started
    shape = (bucket.num_frames, bucket.height, bucket.width)
    batch = config.batch_size or encoder.batch_size(shape)
    noise = np.random.default_rng(0).integers(0, 256, (batch, *shape, 3), np.uint8)

    def run(count: int) -> float:
        """Seconds for `count` batches, the next one copied while the last is encoded."""
        began, waiting = time.perf_counter(), None
        for _ in range(count):
            frames = encoder.buffer(batch, shape)
            frames[...] = noise
            pending = encoder.begin(frames, tiled=tiled)
            if waiting is not None:
                waiting()
            waiting = pending
        if waiting is not None:
            waiting()
        return time.perf_counter() - began

    memory.watch()
    first_s = run(1)
    seconds = run(batches) / batches
    return Measured(seconds, batch, memory.peak(), load_s, first_s, memory.device)


def _encode_text(config: TextEncoderConfig, batch: int) -> Measured:
    encoder, memory = load_text_encoder(config), _Memory()
    started = time.perf_counter()
    encoder.load()
    load_s = time.perf_counter() - started
    captions = [f"{number} {_CAPTION}" for number in range(batch)]
    memory.watch()
    first_s = -time.perf_counter()
    encoder.encode(captions)
    first_s += time.perf_counter()
    runs = []
    for _ in range(5):
        began = time.perf_counter()
        encoder.encode(captions)
        runs.append(time.perf_counter() - began)
    return Measured(statistics.median(runs), batch, memory.peak(), load_s, first_s, memory.device)


class _Memory:
    """Peak memory above what it was when this was made, of the GPU or of the process."""

    def __init__(self) -> None:
        import torch

        self._cuda = torch.cuda.is_available()
        self.device = torch.cuda.get_device_name() if self._cuda else "CPU"
        self._before = 0 if self._cuda else _status("VmRSS")

    def watch(self) -> None:
        """Forget the peak so far."""
        import torch

        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM is VmRSS again

    def peak(self) -> int:
        import torch

        return torch.cuda.max_memory_reserved() if self._cuda else max(0, _status("VmHWM") - self._before)


def _status(name: str) -> int:
    """A size in /proc/self/status, bytes; 0 where there is none."""
    path = Path("/proc/self/status")
    found = re.search(rf"{name}:\s+(\d+) kB", path.read_text()) if path.exists() else None
    return int(found[1]) * 1024 if found else 0


def _video_numbers(variant: Variant, found: Sequence[Measured | str]) -> dict[str, Any]:
    numbers: dict[str, Any] = {"bucket": bucket_name(variant.bucket), "variant": variant.name}
    numbers |= {name: value for name, value in asdict(variant).items() if name != "bucket"}
    good = [each for each in found if not isinstance(each, str)]
    if len(good) < len(found):
        return numbers | {"failed": next(each for each in found if isinstance(each, str))}
    seconds = statistics.median(each.seconds / each.batch for each in good)
    return numbers | {
        "batch": good[0].batch,
        "clips_per_s": round(1 / seconds, 4),
        "frames_per_s": round(variant.bucket.num_frames / seconds, 2),
        "megapixels_per_s": round(
            math.prod((variant.bucket.num_frames, variant.bucket.height, variant.bucket.width))
            / seconds
            / 1e6,
            2,
        ),
        "peak_bytes": max(each.peak_bytes for each in good),
        "load_s": round(statistics.median(each.load_s for each in good), 2),
        "first_batch_s": round(statistics.median(each.first_s for each in good), 2),
        "device": good[0].device,
    }
