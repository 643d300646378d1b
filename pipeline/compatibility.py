"""The frame arithmetic of other trainers, index for index, with what is wrong with it.

In: how many pictures a clip has and at what rate, and what is asked of it. Out: positions of pictures in
presentation order, exactly num_frames of them. ClipError `policy_refused` where the original skips or
rejects a clip, `policy_error` where it crashes on one. They are here to repeat a run that was made with
them; new datasets are better served by `uniform`, `fps` or `keyframe`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from schemas.errors import ClipError

_SKIPPED = 3
"""Pictures that CogVideoX's SAT trainer leaves out at either end."""


class Asked(NamedTuple):
    """A clip, and the frames wanted of it."""

    num_pictures: int
    source_fps: float
    num_frames: int
    target_fps: float


def cogvideox_floor(asked: Asked) -> list[int]:
    """Every k-th picture from the first, k = floor(pictures / frames); the last one repeated if too few.

    Source: zai-org/CogVideo: finetune/datasets/utils.py, preprocess_video_with_resize (early versions
    refuse a clip with too few pictures). Defect: k is rounded down, so the end of the clip is lost: of 97
    pictures 49 frames keep the first 49, 51 %. Rates are ignored.
    """
    stride = max(1, asked.num_pictures // asked.num_frames)
    return _padded(list(range(0, asked.num_pictures, stride)), asked.num_frames)


def cogvideox_sat(asked: Asked) -> list[int]:
    """Pictures 3 .. at a whole-number stride; the last one repeated if too few.

    Source: zai-org/CogVideo: sat/data_video.py, SFTDataset.__getitem__. A clip that lasts longer than
    num_frames at target_fps is read up to that time, one with more pictures than num_frames up to 3
    before its end, else 4n + 1 pictures in a row are taken. Defects: the stride is rounded down, so
    the tempo is not target_fps where the ratio is no whole number; the first branch does not leave
    the last 3 pictures out and indexes past the end of a clip only just long enough (50 and 51 pictures
    at 8 fps for 49 frames); a source slower than target_fps may give a stride of zero; a clip of at most
    6 pictures gives none.
    """
    num_pictures, source_fps, num_frames, target_fps = asked
    start = _SKIPPED
    # Floating point as there, in the same order: each operation is exactly rounded on every machine.
    if num_pictures / source_fps * target_fps > num_frames:
        end = int(start + num_frames / target_fps * source_fps)
        stride = (end - start) // num_frames
        if not stride:
            raise ClipError(
                "policy_error",
                f"cogvideox_sat: {source_fps:g} fps is below target_fps = {target_fps:g}, so its stride "
                f"is 0, where the original crashes; lower target_fps or use policy = 'fps'",
            )
        taken = list(range(start, end, stride))
        if taken[-1] >= num_pictures:
            raise ClipError(
                "policy_error",
                f"cogvideox_sat: asks for picture {taken[-1]} of a clip whose last is {num_pictures - 1}, "
                f"where the original crashes; a longer clip, a smaller num_frames or policy = 'fps' works",
            )
    elif num_pictures > num_frames:
        end = num_pictures - _SKIPPED
        taken = list(range(start, end, max((end - start) // num_frames, 1)))
    else:
        count = (num_pictures - 2 * _SKIPPED - 1) // 4 * 4 + 1
        taken = list(range(start, start + count))
    if not taken:
        raise ClipError(
            "policy_error",
            f"cogvideox_sat: leaves out {_SKIPPED} pictures at either end of {num_pictures}: none is left, "
            f"where the original crashes",
        )
    return _padded(taken, num_frames)


def finetrainers_linspace(asked: Asked) -> list[int]:
    """num_frames points from the first to the last picture, each rounded down.

    Source: a-r-r-o-w/finetrainers: finetrainers/functional/video.py, resize_to_nearest_bucket_video.
    Defects: points are 32-bit floats, so one that should hit a picture may fall to the one before it,
    and on CPUs with wide vectors a few more do than in this scalar form (14 of 22805 cases measured); the
    last frame is the last picture, so the clip runs (pictures - 1) / (frames - 1) fast, not pictures /
    frames; rates are ignored; a clip with too few pictures is handed to an interpolation that does not
    take four dimensions and crashes.
    """
    last, num_frames = asked.num_pictures - 1, asked.num_frames
    if asked.num_pictures < num_frames:
        raise ClipError(
            "policy_error",
            f"finetrainers_linspace: {asked.num_pictures} pictures for {num_frames} frames, where the "
            f"original crashes; policy = 'uniform' fills up",
        )
    if num_frames == 1:
        return [0]
    # As torch.linspace: from the first up to the middle, from the last down to it.
    step, end = np.float32(last) / np.float32(num_frames - 1), np.float32(last)
    half = num_frames // 2
    up = [int(step * np.float32(i)) for i in range(half)]
    return up + [int(end - step * np.float32(num_frames - i - 1)) for i in range(half, num_frames)]


def ttt_exact(asked: Asked) -> list[int]:
    """Every picture of a clip that has exactly num_frames of them at exactly target_fps.

    Source: test-time-training/ttt-video-dit: data/precomp_video.py, precompute_episode, which knows the
    rate to two decimals. Defect: nothing is adapted, and the first clip that does not fit ends the
    whole run; here only that clip is refused.
    """
    if round(asked.source_fps * 100) != round(asked.target_fps * 100):
        raise ClipError(
            "policy_refused",
            f"ttt_exact: expected {asked.target_fps:g} fps, found {asked.source_fps:.2f}; convert the clip "
            f"or use policy = 'fps'",
        )
    if asked.num_pictures != asked.num_frames:
        raise ClipError(
            "policy_refused",
            f"ttt_exact: expected exactly {asked.num_frames} pictures, found {asked.num_pictures}; cut the "
            f"clip or use policy = 'fps'",
        )
    return list(range(asked.num_frames))


def latentsync_contiguous(asked: Asked) -> list[int]:
    """num_frames pictures in a row from the middle of the clip.

    Source: bytedance/LatentSync: latentsync/data/unet_dataset.py, UNetDataset.get_frames. There the start
    is drawn evenly from all that fit, at every visit; a dataset is written once, so this takes the mean
    of that draw. Defects: a clip with fewer than 3 * num_frames pictures is skipped without a word (the
    original needs room for a second, disjoint stretch); the source's rate is taken for granted, so clips
    of other rates play at another tempo.
    """
    if asked.num_pictures < 3 * asked.num_frames:
        raise ClipError(
            "policy_refused",
            f"latentsync_contiguous: expected at least {3 * asked.num_frames} pictures (three times "
            f"num_frames), found {asked.num_pictures}; use policy = 'contiguous'",
        )
    start = (asked.num_pictures - asked.num_frames) // 2
    return list(range(start, start + asked.num_frames))


RULES: dict[str, Callable[[Asked], list[int]]] = {
    rule.__name__: rule
    for rule in (cogvideox_floor, cogvideox_sat, finetrainers_linspace, ttt_exact, latentsync_contiguous)
}


def _padded(pictures: list[int], num_frames: int) -> list[int]:
    """Cut to `num_frames`, or the last one repeated up to it."""
    return pictures[:num_frames] + pictures[-1:] * (num_frames - len(pictures))
