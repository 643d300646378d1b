"""The rules of other trainers, index for index, against independent transcriptions of their arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch

from pipeline.choice import repeats
from pipeline.compatibility import (
    Asked,
    cogvideox_floor,
    cogvideox_sat,
    finetrainers_linspace,
    latentsync_contiguous,
    ttt_exact,
)
from pipeline.frames import choose_frames
from schemas.config import FramesConfig
from schemas.errors import ClipError
from tests.pipeline.timelines import rounded, timeline

COUNTS = [*range(1, 130), 147, 148, 150, 151, 240, 300, 333, 600, 997, 1394]
FRAMES = (1, 2, 5, 9, 15, 16, 17, 33, 48, 49, 81, 97)
RATES = (8.0, 10.0, 24000 / 1001, 24.0, 25.0, 30000 / 1001, 30.0, 60.0)


def outcome(rule: Callable[[Asked], list[int]], asked: Asked) -> list[int] | str:
    try:
        return rule(asked)
    except ClipError as error:
        return error.reason


def test_cogvideox_floor() -> None:
    for count, wanted in product(COUNTS, FRAMES):
        clip = torch.arange(count)
        if count < wanted:
            expected = torch.cat([clip, clip[-1:].repeat(wanted - count)])
        else:
            expected = clip[:: count // wanted][:wanted]
        assert cogvideox_floor(Asked(count, 25.0, wanted, 8.0)) == expected.tolist()


def sat(count: int, actual: float, wanted: int, fps: float) -> list[int] | str:
    """Reads pictures into an array first and picks from it by offset, as the original does."""
    if count / actual * fps > wanted:
        stop = int(3 + wanted / fps * actual)
        read, step = np.arange(3, min(stop, count)), (stop - 3) // wanted
        if step == 0:
            return "policy_error"
        offsets = np.arange(3, stop, step) - 3
    elif count > wanted:
        read = np.arange(3, count - 3)
        offsets = np.arange(3, count - 3, max((count - 6) // wanted, 1)) - 3
    else:
        length = count - 6
        length = length - 3 if length % 4 == 0 else length - length % 4 + 1
        read = np.arange(3, 3 + length)
        offsets = np.arange(len(read))
    try:
        taken = read[offsets].tolist()
        return (taken + taken[-1:] * wanted)[:wanted] if taken else "policy_error"
    except IndexError:
        return "policy_error"


def test_cogvideox_sat() -> None:
    seen = set()
    for count, wanted, rate, fps in product(COUNTS, FRAMES, RATES, (8.0, 16.0)):
        found = outcome(cogvideox_sat, Asked(count, rate, wanted, fps))
        assert found == sat(count, rate, wanted, fps), (count, wanted, rate, fps)
        if isinstance(found, list):
            assert len(found) == wanted
            assert max(found) < count
        seen.add(type(found))
    assert seen == {list, str}


@pytest.mark.parametrize("count", [50, 51])
def test_cogvideox_sat_says_where_the_original_indexes_past_the_end(count: int) -> None:
    with pytest.raises(ClipError, match=f"asks for picture 51 of a clip whose last is {count - 1}") as caught:
        cogvideox_sat(Asked(count, 8.0, 49, 8.0))
    assert caught.value.reason == "policy_error"
    assert cogvideox_sat(Asked(52, 8.0, 49, 8.0)) == list(range(3, 52))


def test_cogvideox_sat_has_nothing_left_of_six_pictures() -> None:
    with pytest.raises(ClipError, match="none is left"):
        cogvideox_sat(Asked(6, 8.0, 49, 8.0))
    assert cogvideox_sat(Asked(7, 8.0, 49, 8.0)) == [3] * 49


def linspace(count: int, wanted: int) -> list[int]:
    """In Python floats, rounded to 32 bits after every operation."""

    def single(value: float) -> float:
        return float(torch.tensor(value, dtype=torch.float32))

    last = float(count - 1)
    step = single(last / (wanted - 1))
    return [
        int(single(step * i) if i < wanted // 2 else single(last - single(step * (wanted - 1 - i))))
        for i in range(wanted)
    ]


def test_finetrainers_linspace() -> None:
    compared = differs = missed = 0
    for count, wanted in product(COUNTS, FRAMES):
        found = outcome(finetrainers_linspace, Asked(count, 25.0, wanted, 8.0))
        if count < wanted:
            assert found == "policy_error"
        elif wanted == 1:
            assert found == [0]
        else:
            assert isinstance(found, list)
            # Vector units round differently here and there, by one picture.
            there = torch.linspace(0, count - 1, wanted).long().tolist()
            differs += found != there
            compared += 1
            assert all(abs(a - b) <= 1 for a, b in zip(found, there, strict=True))
            exact = [i * (count - 1) // (wanted - 1) for i in range(wanted)]
            missed += found != exact
            assert all(a - b in (0, 1) for a, b in zip(exact, found, strict=True))
    assert differs <= compared / 100
    assert missed


def test_finetrainers_linspace_rounds_after_every_operation() -> None:
    for count, wanted in product(range(49, 500, 7), (15, 23, 49)):
        if wanted <= count:
            assert finetrainers_linspace(Asked(count, 25.0, wanted, 8.0)) == linspace(count, wanted)
    # Its seventh point is exactly 57: the known defect takes 56.
    assert finetrainers_linspace(Asked(115, 25.0, 15, 8.0))[7] == 56


def test_ttt_exact() -> None:
    for count, wanted, rate in product(COUNTS, FRAMES, (*RATES, 16.0)):
        found = outcome(ttt_exact, Asked(count, rate, wanted, 16.0))
        fits = count == wanted and float(f"{rate:.2f}") == 16
        assert found == (list(range(wanted)) if fits else "policy_refused")
    assert ttt_exact(Asked(49, 15.9996, 49, 16.0)) == list(range(49))


def test_latentsync_contiguous() -> None:
    for count, wanted in product(COUNTS, FRAMES):
        found = outcome(latentsync_contiguous, Asked(count, 25.0, wanted, 25.0))
        if count < 3 * wanted:
            assert found == "policy_refused"
        else:
            starts = range(count - wanted + 1)
            assert found == list(range(sum(starts) // len(starts), sum(starts) // len(starts) + wanted))


def config(policy: str, target_fps: float = 8.0, **more: object) -> FramesConfig:
    return FramesConfig.model_validate({"policy": policy, "target_fps": target_fps, **more})


def test_the_floor_keeps_half_of_97_pictures_and_says_so() -> None:
    clip = timeline([i * 40 for i in range(97)], last=40)
    choice = choose_frames(clip, num_frames=49, frames=config("cogvideox_floor"))
    assert choice.pictures == tuple(range(49))
    assert choice.coverage == pytest.approx(49 / 97)
    assert choice.step == 40
    assert choice.notes == ("cogvideox_floor keeps 51% of the clip's 3.88 s",)
    whole = choose_frames(clip, num_frames=33, frames=config("finetrainers_linspace"))
    assert whole.coverage == 1
    assert whole.notes == ()


def test_a_rule_pads_as_its_original_whatever_frames_short_says() -> None:
    clip = timeline([i * 40 for i in range(20)], last=40)
    choice = choose_frames(clip, num_frames=49, frames=config("cogvideox_floor", short="drop"))
    assert choice.pictures == (*range(20), *[19] * 29)
    assert repeats(choice.pictures, choice.blends) == list(range(20, 49))
    assert choice.coverage == 1
    assert choice.step == 40
    assert choice.notes == ("20 pictures stretched over 49 frames, 2.5 times slower",)
    with pytest.raises(ClipError, match="max_slowdown"):
        choose_frames(clip, num_frames=49, frames=config("cogvideox_floor", max_slowdown=2.0))


def test_a_rate_rounded_to_ticks_is_the_rate_it_means() -> None:
    clip = rounded(Fraction(16), 49)
    assert choose_frames(clip, num_frames=49, frames=config("ttt_exact", 16.0)).pictures == tuple(range(49))
    film = rounded(Fraction(30000, 1001), 300)
    choice = choose_frames(film, num_frames=49, frames=config("cogvideox_sat"))
    assert list(choice.pictures) == cogvideox_sat(Asked(300, 30000 / 1001, 49, 8.0))
