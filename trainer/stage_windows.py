"""Stage windows: samples and a stage's window rule in, how many latent frames of each it uses out.

Held against the encoder's frame rule and the model, so that a window is never anything that an encode of its
own could not have been. The trade-off: windows are decided by frame counts of the beginning of a sample.

T latent frames.
"""

from __future__ import annotations

import numpy as np

from schemas.errors import ConfigError
from schemas.train_config import StageConfig
from schemas.windows import elapsed, first_pixel_frame, latents_of, prefix_frames
from trainer.catalog import Catalog


def window_latents(catalog: Catalog, stage: StageConfig) -> np.ndarray:
    """int64 [n]: latent frames of each sample's window; ConfigError where there are no such windows."""
    geometry, name = catalog.card.geometry, f"stage {stage.name!r}"
    if stage.window == "segments" and not geometry.segment_frames:
        raise ConfigError(
            f"{name}: window = 'segments' needs latents encoded in independent pieces, and {catalog.dataset} "
            "is encoded whole; preprocess with video_encoder.segment_frames, or use 'prefix' or 'slice'"
        )
    if stage.max_frames is not None:
        if not geometry.takes(stage.max_frames):
            raise ConfigError(_untaken(catalog, stage.max_frames, name))
        return latents_of(np.minimum(np.diff(catalog.pts_offsets), stage.max_frames), geometry)
    if stage.max_s is None:
        return catalog.shapes[:, 0]
    num_frames = prefix_frames(
        catalog.pts_s,
        catalog.pts_offsets,
        fps=catalog.fps,
        max_s=stage.max_s,
        frames=catalog.card.settings.frames,
        geometry=geometry,
    )
    return latents_of(num_frames, geometry)


def _untaken(catalog: Catalog, max_frames: int, name: str) -> str:
    geometry = catalog.card.geometry
    step, rest = geometry.frame_step, geometry.frame_rest
    below = (max_frames - rest) // step * step + rest
    near = [str(count) for count in (below, below + step) if geometry.takes(count)]
    return (
        f"{name}: max_frames = {max_frames}, and the video encoder of {catalog.dataset} takes "
        f"{geometry.rule} frames; nearest {'is' if len(near) == 1 else 'are'} {' and '.join(near)} (an "
        "encoder that takes frame by frame has any number)"
    )


def window_seconds(catalog: Catalog, row: int, *, first: int, length: int) -> float:
    """Source seconds from a window's first pixel frame to its last."""
    begin, end = catalog.pts_offsets[row : row + 2]
    geometry = catalog.card.geometry
    start, stop = (first_pixel_frame(at, geometry) for at in (first, first + length))
    times = elapsed(
        catalog.pts_s[begin:end],
        np.array([0, end - begin]),
        fps=catalog.fps[row : row + 1],
        frames=catalog.card.settings.frames,
    )
    return float(times[min(stop, len(times)) - 1] - times[start])
