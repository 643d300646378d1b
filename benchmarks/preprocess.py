"""What the pipeline costs above its work: clips/s of the local and Ray routes beside a plain loop.

The loop is `multiprocessing.Pool` over the same decode and the same encode, writing nothing: no
sandbox, no shards, no fsync, no commits. Runs are interleaved; start-up of processes and of Ray is
left out of every contender's clock and given apart.
"""

from __future__ import annotations

import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from pipeline.decode import decode_clip
from pipeline.graph import manifest_rows, preprocess
from pipeline.sandbox import decode_settings
from pipeline.video_encode import VideoEncoder, load_video_encoder
from schemas.config import PreprocessConfig
from schemas.errors import ClipError
from schemas.manifest import ManifestRow

_encoder: VideoEncoder | None = None
_config: PreprocessConfig | None = None


def run(config: PreprocessConfig, *, reps: int) -> dict[str, Any]:
    """Median clips/s of each route over `reps` interleaved runs, and its ratio to the plain loop."""
    rows = manifest_rows(config)
    workers = config.executor.workers
    routes: dict[str, Callable[[], tuple[float, float]]] = {
        f"plain loop x {workers}": lambda: _plain_loop(config, rows),
        "local x 1": lambda: _pipeline(config, kind="local", workers=1),
        f"local x {workers}": lambda: _pipeline(config, kind="local", workers=workers),
        "ray x 1": lambda: _pipeline(config, kind="ray", workers=1),
        f"ray x {workers}": lambda: _pipeline(config, kind="ray", workers=workers),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in routes}
    for _ in range(reps):
        for name, route in routes.items():
            seconds[name].append(route())
    medians = {name: statistics.median(work for work, _ in runs) for name, runs in seconds.items()}
    base = next(iter(medians.values()))
    return {
        "clips": len(rows),
        "reps": reps,
        "routes": {
            name: {
                "clips_per_s": round(len(rows) / medians[name], 3),
                "ratio": round(base / medians[name], 3),
                "startup_s": round(statistics.median(total - work for work, total in seconds[name]), 2),
            }
            for name in routes
        },
    }


def _plain_loop(config: PreprocessConfig, rows: list[ManifestRow]) -> tuple[float, float]:
    """(seconds of work, seconds in all) of a pool that decodes and encodes and keeps nothing."""
    started = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(config.executor.workers + 1)
    with context.Pool(config.executor.workers, _start, (config, ready)) as pool:
        ready.wait()
        begun = time.perf_counter()
        for _ in pool.imap_unordered(_decode_and_encode, rows):
            pass
        work = time.perf_counter() - begun
    return work, time.perf_counter() - started


def _start(config: PreprocessConfig, ready: Barrier) -> None:
    global _config, _encoder
    _config, _encoder = config, load_video_encoder(config.video_encoder)
    ready.wait()


def _decode_and_encode(row: ManifestRow) -> None:
    assert _config is not None
    assert _encoder is not None
    try:
        frames, _, _ = decode_clip(
            row.path,
            start_s=row.start_s,
            end_s=row.end_s,
            **decode_settings(_config),
        )
    except ClipError:
        return
    _encoder.encode(frames[None])


def _pipeline(config: PreprocessConfig, *, kind: str, workers: int) -> tuple[float, float]:
    """(seconds of the latents pass, seconds in all) of the real command on an empty dataset."""
    folder = Path(tempfile.mkdtemp(prefix="latentpress-bench-"))
    executor = config.executor.model_copy(update={"kind": kind, "workers": workers})
    started = time.perf_counter()
    try:
        summary, _ = preprocess(
            config.model_copy(update={"output": str(folder / "latents"), "executor": executor})
        )
    finally:
        shutil.rmtree(folder)
    return summary["last_run"]["latents"]["wall_s"], time.perf_counter() - started
