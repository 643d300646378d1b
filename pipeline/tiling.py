"""Which buckets are encoded in overlapping tiles: settled once, before the card of a dataset is written.

Tiles need less memory and give other numbers, so they are a hard field and no run changes them. Under
`tiling = "auto"` one clip of a bucket is tried, where the workers will run; what that finds holds for the
dataset, whatever machine goes on with it.

F frames, H, W pixels of a clip.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from pipeline.encoders import Encoders, Shape, Starved, is_within, starving
from pipeline.executor import in_worker
from pipeline.starved import ProcessDied, free_memory, is_starved
from pipeline.video_encode import VideoEncoder
from schemas.bucket import bucket_name
from schemas.card import Card
from schemas.config import PreprocessConfig
from schemas.errors import RunError


def tiling_fields(
    config: PreprocessConfig, encoder: VideoEncoder, *, have: Card | None, tiled: Container[str]
) -> dict[str, Any]:
    """The hard field `tiling`: bucket name -> False, or the sizes of its tiles; none for an encoder that has
    no tiles.

    Under `tiling = "auto"` as the card `have` says, and without one for the buckets in `tiled`.
    """
    sizes = encoder.tiling_fields()
    if not sizes:
        return {}
    tiling = config.video_encoder.tiling
    tiles = {}
    for name in map(bucket_name, config.buckets):
        asked = tiling == "on"
        if tiling == "auto":
            asked = name in tiled if have is None else have.is_tiled(name)
        tiles[name] = sizes if asked else False
    return {"tiling": tiles}


def must_try(config: PreprocessConfig, want: Card) -> bool:
    """Whether the buckets of a new dataset have to be tried."""
    return config.video_encoder.tiling == "auto" and "video_encoder.tiling" in want.hard["latents"]


def tried(config: PreprocessConfig, want: Card) -> list[str]:
    """What `buckets_to_tile` finds where a worker of this config runs; RunError where that ends it."""
    try:
        return in_worker(config, buckets_to_tile, config, want)
    except Exception as error:
        if not is_starved(error) and not isinstance(error, ProcessDied):
            raise
        how = "the kernel may have wanted its memory" if isinstance(error, ProcessDied) else "memory ran out"
        raise RunError(
            f"one clip of each bucket was tried, and {how}: {error}. Set "
            "video_encoder.tiling = 'on', make the buckets smaller, or give the workers more memory"
        ) from error


def buckets_to_tile(config: PreprocessConfig, want: Card) -> list[str]:
    """Names of the buckets of which one clip does not fit in this process's memory as a whole.

    The largest comes first; one that needs no more than another that fits is not tried. RunError where a clip
    does not fit in tiles either, or the encoder not at all.
    """
    encoders = Encoders(config, want)
    fitting: list[Shape] = []
    tiled: list[str] = []
    try:
        encoder = encoders.video({})
        for bucket in sorted(config.buckets, key=lambda b: -b.num_frames * b.height * b.width):
            shape = (bucket.num_frames, bucket.height, bucket.width)
            if any(is_within(shape, other) for other in fitting):
                continue
            if _fits(encoder, shape):
                fitting.append(shape)
                continue
            free_memory()
            _encode(encoder, shape, tiled=True)
            tiled.append(bucket_name(bucket))
    except Starved as error:
        raise RunError(encoders.verdict(error.lack)) from None
    return tiled


def _fits(encoder: VideoEncoder, shape: Shape) -> bool:
    try:
        _encode(encoder, shape, tiled=False)
    except Starved:
        return False
    return True


def _encode(encoder: VideoEncoder, shape: Shape, *, tiled: bool) -> None:
    frames = encoder.buffer(1, shape)
    frames.fill(0)
    with starving("latents", count=1, shape=shape, tiled=tiled):
        encoder.encode(frames, tiled=tiled)
