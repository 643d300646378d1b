"""How near preprocessing comes to its encoder: real clips, real decoding and commits, and an encoder that
takes a fixed time a clip without using a core, as one on a GPU does.

    python -m benchmarks.ceiling CLIPS [--seconds 0.4] [--seconds 0.02] [--batch 8] [--blocks 1.0]

Prints, for every time and route, the share of the encoder's ceiling: the time of the kept clips in the
encoder over that of the latents pass, without the start of processes and the loading of encoders. Routes
are interleaved, medians of `--reps` runs. What a clip is decoded to is small, so that two cores can feed a
slow encoder; a fast one shows what decoding allows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import append_result
from pipeline import encoders, executor, ray_crew
from pipeline.discover import video_files
from pipeline.graph import preprocess
from pipeline.unit import UnitWorker
from pipeline.video_encode import DctEncoder, Moments
from schemas.config import PreprocessConfig, VideoEncoderConfig
from schemas.load import check_config

_SHAPE = {"num_frames": 9, "height": 64, "width": 96}
_ROUTES: dict[str, dict[str, Any]] = {
    "local": {"kind": "local", "workers": 1},
    "ray x 1": {"kind": "ray", "workers": 1},
    "ray x 2": {"kind": "ray", "workers": 2},
    "ray x 1, 2 decode actors": {"kind": "ray", "workers": 1, "decode_actors": 2},
}


class StandIn(DctEncoder):
    """Takes `seconds` a clip, one after the other, beside the host; its moments are zeros.

    `batch` clips at once. For a share `blocks` of that time its caller waits in `begin`: all of it is what an
    encoder on a CPU does, and one on a GPU as soon as its queue of launches is full.
    """

    def __init__(self, config: VideoEncoderConfig, *, seconds: float, batch: int, blocks: float) -> None:
        super().__init__(config)
        self._seconds, self._batch, self._blocks, self._free = seconds, batch, blocks, 0.0

    def batch_size(self, shape: tuple[int, int, int]) -> int:
        return self._batch

    def begin(self, frames: np.ndarray, *, tiled: bool = False) -> Callable[[], Moments]:
        import torch

        start = max(self._free, time.perf_counter())
        self._free = start + len(frames) * self._seconds
        time.sleep(max(0.0, start + self._blocks * (self._free - start) - time.perf_counter()))
        end, (clips, num_frames, height, width, _) = self._free, frames.shape
        latents = torch.zeros(clips, self.geometry.latent_frames(num_frames), 16, height // 8, width // 8)

        def wait() -> Moments:
            time.sleep(max(0.0, end - time.perf_counter()))
            return {"mean": latents, "logvar": latents}

        return wait


def stand_in_worker(**settings: Any) -> type[UnitWorker]:
    """A worker whose video encoder is the stand-in, wherever the class is sent."""

    class StandInWorker(UnitWorker):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            setattr(encoders, "load_video_encoder", lambda config, **_: StandIn(config, **settings))  # noqa: B010
            super().__init__(*arguments, **options)

    return StandInWorker


def write_manifest(clips: list[Path], path: Path, *, rows: int) -> None:
    """`rows` rows, each another window of one of the clips in turn."""
    lines = []
    for i in range(rows):
        row = {"video": str(clips[i % len(clips)].absolute()), "caption": "A clip."}
        lines.append(json.dumps({**row, "start_s": 0.0, "end_s": 1 + 0.01 * (i // len(clips))}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def share_of_ceiling(
    manifest: Path, route: dict[str, Any], *, seconds: float, rows: int, batch: int, blocks: float
) -> tuple[float, Any]:
    """(share, summary of the latents pass) of one run into a new folder."""
    for module in (executor, ray_crew):
        worker = stand_in_worker(seconds=seconds, batch=batch, blocks=blocks)
        setattr(module, "UnitWorker", worker)  # noqa: B010
    with tempfile.TemporaryDirectory(prefix="latentpress-bench-") as folder:
        config = {
            "manifest": str(manifest),
            "output": f"{folder}/latents",
            "buckets": [_SHAPE],
            "executor": route,
            "units": {"rows": rows},
            "quarantine": {"max_rate": 1.0},
        }
        summary, _ = preprocess(check_config(config, PreprocessConfig, where="benchmarks.ceiling"))
    run, workers = summary["last_run"]["latents"], summary["last_run"]["executor"]["workers"]
    working_s = run["wall_s"] - run["start_s"] - run["stage_seconds"]["load"] / workers
    return summary["kept"] * seconds / workers / working_s, run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("clips", type=Path, nargs="+", help="video files, or folders of them")
    parser.add_argument("--seconds", type=float, action="append", help="per clip in the encoder (0.4, 0.02)")
    parser.add_argument("--batch", type=int, default=1, help="clips in the encoder at once")
    parser.add_argument("--blocks", type=float, default=0.0, help="share of that time its caller waits")
    parser.add_argument("--rows", type=int, default=64, help="clips that are encoded")
    parser.add_argument("--unit-rows", type=int, default=8, help="clips in a shard")
    parser.add_argument("--reps", type=int, default=5)
    options = parser.parse_args()
    times = options.seconds or [0.4, 0.02]
    results: dict[tuple[float, str], list[float]] = {}
    last: dict[tuple[float, str], Any] = {}
    with tempfile.TemporaryDirectory(prefix="latentpress-bench-") as folder:
        manifest = Path(folder) / "manifest.jsonl"
        write_manifest(video_files(options.clips), manifest, rows=options.rows)
        for _ in range(options.reps):
            for seconds in times:
                for name, route in _ROUTES.items():
                    share, run = share_of_ceiling(
                        manifest,
                        route,
                        seconds=seconds,
                        rows=options.unit_rows,
                        batch=options.batch,
                        blocks=options.blocks,
                    )
                    results.setdefault((seconds, name), []).append(share)
                    last[seconds, name] = run
    numbers = [
        {
            "seconds_per_clip": seconds,
            "route": name,
            "of_ceiling": round(statistics.median(shares), 3),
            "spread": [round(min(shares), 3), round(max(shares), 3)],
            "stage_busy": last[seconds, name]["stage_busy"],
            "bottleneck": last[seconds, name]["bottleneck"],
        }
        for (seconds, name), shares in results.items()
    ]
    for each in numbers:
        low, high = each["spread"]
        print(
            f"{each['seconds_per_clip']:6.3g} s a clip  {each['route']:26} {each['of_ceiling']:.3f} of the "
            f"ceiling ({low:.3f} to {high:.3f}); bottleneck: {each['bottleneck']}"
        )
    names = ("unit_rows", "reps", "batch", "blocks")
    shape = {"clips": options.rows, **{name: getattr(options, name) for name in names}, **_SHAPE}
    append_result("ceiling", {**shape, "routes": numbers})


if __name__ == "__main__":
    main()
