"""The tiny job that everything goes wrong for: drawn clips, one broken file, one file asked for twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from schemas.config import PreprocessConfig
from schemas.load import check_config
from tests.videos import make_video


class Job:
    """`num_clips` rows with two captions between them: their prompts unit and that of the empty prompt,
    latents units of `unit_rows`.

    The second last file is broken, and the last row is a window of the first file.
    """

    def __init__(self, folder: Path, *, num_clips: int = 6, unit_rows: int = 2) -> None:
        self._folder, self._unit_rows = folder, unit_rows
        folder.mkdir(parents=True)
        rows: list[dict[str, Any]] = []
        for i in range(num_clips - 1):
            video = make_video(folder / f"{i}.mp4", num_frames=9 + i % 8, size=(64, 48))
            rows.append({"video": video.name, "caption": f"caption {i % 2}"})
        video.write_bytes(video.read_bytes()[:400])
        rows.append({"video": "0.mp4", "caption": "caption 0", "end_s": 0.25})
        (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def config(self, folder: Path, *, ray_workers: int = 0) -> PreprocessConfig:
        """A run of the job that writes to `folder`/latents; `folder` is made."""
        folder.mkdir(parents=True, exist_ok=True)
        tree = {
            "manifest": str(self._folder / "manifest.jsonl"),
            "output": str(folder / "latents"),
            "buckets": [{"num_frames": 9, "height": 32, "width": 48}],
            "units": {"rows": self._unit_rows},
            "executor": {"kind": "ray", "workers": ray_workers} if ray_workers else {"kind": "local"},
        }
        return check_config(tree, PreprocessConfig, where="job")
