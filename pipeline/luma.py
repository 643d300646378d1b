"""How much every picture differs from the one before it, by decoding them all.

In: a decoder and a timeline. Out: the mean absolute change of luma of each picture, 0 to 255, on a grid of
64 by 36 points. Points are picked, not averaged: the grid then costs next to nothing beside the decode,
and a change of the scene shows on it all the same.
"""

from __future__ import annotations

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter

from pipeline.pictures import PictureDecoder
from pipeline.timeline import Timeline

_WIDTH, _HEIGHT = 64, 36


def luma_changes(pictures: PictureDecoder, timeline: Timeline) -> tuple[dict[int, float], set[int]]:
    """Tick -> mean change of luma to the picture before, for all of `timeline` but its first; and the
    pictures that turn out to be none."""
    changes: dict[int, float] = {}
    scaler = VideoReformatter()
    before: tuple[int, np.ndarray] | None = None

    def compare(tick: int, picture: VideoFrame) -> None:
        nonlocal before
        small = scaler.reformat(
            picture, width=_WIDTH, height=_HEIGHT, format="gray", interpolation=Interpolation.POINT, threads=1
        )
        plane = small.planes[0]
        rows = np.frombuffer(memoryview(plane), np.uint8).reshape(_HEIGHT, plane.line_size)
        grid = rows[:, :_WIDTH].astype(np.int16)
        if before is not None and before[0] < tick:  # not at the start of a second pass
            changes[tick] = float(np.abs(grid - before[1]).mean())
        before = tick, grid

    outcome = pictures.every(set(timeline.pts), compare)
    return changes, outcome.hidden(timeline)
