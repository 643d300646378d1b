"""What safety costs: clips/s of a run with the decode sandbox and fsync, beside the same run without them.

`python -m benchmarks.safety CONFIG [--set KEY=VALUE] [--reps N] [--folder FOLDER]`. Without the sandbox,
clips are decoded ahead by threads of the same process with the same code; without fsync, `os.fsync` does
nothing. Runs are interleaved and go to FOLDER (default: the temporary folder), whose file system decides
what fsync costs. The clock is that of the latents pass, start-up of the decoder children included.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from unittest.mock import patch

import av
import numpy as np

from benchmarks.record import append_result
from pipeline.decode import decode_clip
from pipeline.graph import preprocess
from pipeline.media import LastMedia
from pipeline.sandbox import Clip, DecodeRequest
from schemas.config import PreprocessConfig
from schemas.load import load_config

WAYS = {
    "sandbox and fsync": (True, True),
    "sandbox alone": (True, False),
    "fsync alone": (False, True),
    "neither": (False, False),
}


class ThreadDecoder:
    """Stands in for `DecoderProcess`: the same requests and answers, decoded by a thread of this process."""

    def __init__(self, *, slots: int, **settings: Any) -> None:
        self.protections: dict[str, str] = {}
        self._settings, self._last = settings, LastMedia()
        self._pool = ThreadPoolExecutor(1)
        self._clips: deque[Future[Clip]] = deque()
        self._free: SimpleQueue[np.ndarray] = SimpleQueue()
        nbytes = max(bucket.num_frames * bucket.height * bucket.width * 3 for bucket in settings["buckets"])
        for _ in range(slots):
            self._free.put(np.empty(nbytes, np.uint8))

    def submit(self, request: DecodeRequest) -> None:
        self._clips.append(self._pool.submit(self._decode, request))

    def result(self) -> Clip:
        return self._clips.popleft().result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _decode(self, request: DecodeRequest) -> Clip:
        buffer = self._free.get()
        started = time.perf_counter()
        try:
            frames, bucket, record = decode_clip(
                request.path,
                start_s=request.start_s,
                end_s=request.end_s,
                clip=request.clip,
                buffer=buffer,
                last=self._last,
                **self._settings,
            )
        except BaseException:
            self._free.put(buffer)
            raise
        decode_s = time.perf_counter() - started
        return Clip(frames, bucket, record, decode_s=decode_s, release=lambda: self._free.put(buffer))


def clips_per_s(config: PreprocessConfig, folder: Path, *, sandbox: bool, fsync: bool) -> float:
    """One run into a fresh dataset."""
    with ExitStack() as stack:
        if not sandbox:
            stack.enter_context(patch("pipeline.unit.DecoderProcess", ThreadDecoder))
        if not fsync:
            stack.enter_context(patch("os.fsync", lambda fd: None))
        root = stack.enter_context(tempfile.TemporaryDirectory(prefix="latentpress-safety-", dir=folder))
        summary, _ = preprocess(config.model_copy(update={"output": f"{root}/latents"}))
    latents = summary["last_run"]["latents"]
    rate: float = latents["clips"] / latents["wall_s"]
    return rate


def file_system(folder: Path) -> str:
    """Its type, as `stat` names it."""
    command = ["stat", "--file-system", "--format=%T", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.safety", description=__doc__)
    parser.add_argument("config", type=Path, help="preprocess config, such as configs/preprocess/demo.toml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the config")
    parser.add_argument("--reps", type=int, default=5, help="runs of each way")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to write")
    options = parser.parse_args(arguments)
    config = load_config(options.config, PreprocessConfig, overrides=options.set)
    executor = config.executor.model_copy(update={"kind": "local", "address": ""})
    config = config.model_copy(update={"executor": executor})
    av.logging.set_level(av.logging.PANIC)

    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(options.reps):
        for way, (sandbox, fsync) in WAYS.items():
            rates[way].append(clips_per_s(config, options.folder, sandbox=sandbox, fsync=fsync))
    medians = {way: statistics.median(each) for way, each in rates.items()}
    base = medians["neither"]
    for way, median in medians.items():
        spread = f"{min(rates[way]):.2f} to {max(rates[way]):.2f}"
        print(f"{way:20}{median:8.2f} clips/s  ({spread})  {median / base:.3f} of neither")
    numbers = {
        "reps": options.reps,
        "workers": executor.workers,
        "unit_rows": config.units.rows,
        "file_system": file_system(options.folder),
        "ways": {
            way: {"clips_per_s": round(median, 3), "ratio": round(median / base, 3)}
            for way, median in medians.items()
        },
    }
    recorded = append_result("safety", numbers)
    if recorded is not None:
        print(f"wrote {recorded}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
