"""Validation is the same however clips are packed, weighed and spread over ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from schemas.errors import RunError
from schemas.train_config import LossConfig, MeshConfig
from tests.trainer.gloo import on_two_ranks
from tests.trainer.stock import clips, packed_model
from trainer.batch import prepare
from trainer.collate import PackedInputs
from trainer.objective import Objective, Schedule, make_objective
from trainer.packing import Pack, Segment
from trainer.parallel import Member, World, join
from trainer.stage_plan import Read
from trainer.validate import ValidationRecord, exchanged, validate
from trainer.visit import Visit

V = make_objective(LossConfig(), Schedule())
LEVELS = (0.1, 0.5, 1.0)
SECONDS = (1.0, 2.0, 8.0, 70.0)


def held_out() -> list[Segment]:
    return [
        replace(clip, seconds=seconds, frame_weights=1 + torch.rand(len(clip.latents)))
        for clip, seconds in zip(clips(), SECONDS, strict=True)
    ]


class Clips:
    """Reads clips by their number, and notes which."""

    def __init__(self, *, unreadable: int = -1, without_caption: int = -1) -> None:
        self._segments = held_out()
        if unreadable >= 0:
            self._segments[unreadable] = replace(self._segments[unreadable], weight=0.0)
        self._without_caption = without_caption
        self.opened: list[int] = []

    def visit(self, number: int) -> Read:
        segment = self._segments[number]
        length = len(segment.latents)
        return 0, Visit(number, 0, length, segment.key, seconds=segment.seconds)

    def read(self, clips: Sequence[Read]) -> Pack:
        self.opened += [visit.row for _, visit in clips]
        return Pack(tuple(self._segments[visit.row] for _, visit in clips))

    def prompt(self, clip: Read) -> torch.Tensor | None:
        row = clip[1].row
        return None if row == self._without_caption else self._segments[row].prompt_embeds


def record(
    world: World,
    packing: Sequence[Sequence[int]],
    *,
    clips: Clips | None = None,
    predict: Callable[[PackedInputs], torch.Tensor] | None = None,
    objective: Objective = V,
) -> ValidationRecord:
    clips, model = clips or Clips(), packed_model("5b")
    return validate(
        predict or model,
        [[clips.visit(number) for number in pack] for pack in packing],
        reader=clips,
        step=7,
        stage="s3",
        objective=objective,
        layout=model.layout,
        timesteps=LEVELS,
        world=world,
    )


def rank_record(
    world: World, packing: Sequence[Sequence[int]], unreadable: int
) -> tuple[ValidationRecord, int, list[int]]:
    """The record, how many forward passes this rank made, and the clips that it read.

    Only rank 1 cannot read `unreadable`.
    """
    model, calls = packed_model("5b"), 0
    clips = Clips(unreadable=unreadable if world.rank == 1 else -1)

    def predict(inputs: PackedInputs) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return model(inputs)

    return record(world, packing, clips=clips, predict=predict), calls, clips.opened


@pytest.fixture(scope="module")
def reference() -> ValidationRecord:
    with join(Member.alone(), MeshConfig(), deterministic=True) as world:
        return record(world, [[0, 1, 2, 3]])


def numbers(found: ValidationRecord) -> list[float]:
    assert found.shuffled_loss is not None
    return [
        found.loss,
        found.shuffled_loss,
        *found.loss_by_timestep.values(),
        *found.loss_by_duration.values(),
    ]


def test_losses_are_those_of_each_clip_alone(reference: ValidationRecord) -> None:
    model, segments = packed_model("5b"), held_out()
    errors = torch.zeros(2, len(segments), len(LEVELS))
    for i, segment in enumerate(segments):
        for j, level in enumerate(LEVELS):
            for caption, prompt in enumerate((segment.prompt_embeds, segments[i - 2].prompt_embeds)):
                pack = Pack((replace(segment, prompt_embeds=prompt),))
                batch = prepare(pack, objective=V, layout=model.layout, timestep=round(999 * level))
                with torch.no_grad():
                    errors[caption, i, j] = (model(batch.inputs) - batch.target).square().mean()
    assert reference.loss == pytest.approx(errors[0].mean().item(), rel=1e-5)
    assert reference.shuffled_loss == pytest.approx(errors[1].mean().item(), rel=1e-5)
    assert list(reference.loss_by_timestep) == ["0.1", "0.5", "1"]
    assert list(reference.loss_by_timestep.values()) == pytest.approx(errors[0].mean(0).tolist(), rel=1e-5)
    by_clip = errors[0].mean(1).tolist()
    assert reference.loss_by_duration == pytest.approx(
        {"0-3s": (by_clip[0] + by_clip[1]) / 2, "3-9s": by_clip[2], "63s+": by_clip[3]}, rel=1e-5
    )
    assert (reference.step, reference.stage, reference.clips) == (7, "s3", 4)
    assert "loss" in str(reference)


def test_packing_does_not_matter(reference: ValidationRecord) -> None:
    with join(Member.alone(), MeshConfig(), deterministic=True) as world:
        found = record(world, [[3], [2, 0], [1]])
    assert numbers(found) == pytest.approx(numbers(reference), rel=1e-5)


@pytest.mark.parametrize(("packing", "rounds"), [([[0, 1], [2, 3]], 1), ([[3], [0, 1], [2]], 2)])
def test_ranks_share_the_packs_and_make_as_many_forward_passes(
    packing: list[list[int]], rounds: int, reference: ValidationRecord
) -> None:
    results = on_two_ranks(rank_record, packing, -1)
    for rank, (found, calls, opened) in enumerate(results):
        assert calls == rounds * len(LEVELS) * 2
        assert numbers(found) == pytest.approx(numbers(reference), rel=1e-5)
        # A rank reads its own packs only, the last of them again where it is one short.
        assert opened == [
            i for pack in (*packing[rank::2], *packing[-1:] * (len(packing) % 2 * rank)) for i in pack
        ]
    assert numbers(results[0][0]) == numbers(results[1][0])


@pytest.mark.parametrize("clips", [Clips(unreadable=3), Clips(without_caption=1)])
def test_a_clip_that_could_not_be_read_is_left_out(clips: Clips, reference: ValidationRecord) -> None:
    """Also where it is the caption that it was to get."""
    with join(Member.alone(), MeshConfig(), deterministic=True) as world:
        found = record(world, [[0, 1, 2, 3]], clips=clips)
    assert found.clips == 3
    assert " of 3 clips (" in str(found)
    assert " of 1 clip (" in str(replace(found, clips=1))
    assert "63s+" not in found.loss_by_duration
    assert found.loss_by_duration["3-9s"] == pytest.approx(reference.loss_by_duration["3-9s"], rel=1e-5)


def test_ranks_agree_on_what_only_one_of_them_could_not_read(reference: ValidationRecord) -> None:
    results = on_two_ranks(rank_record, [[0, 1], [2, 3]], 3)
    for found, calls, _ in results:
        assert calls == len(LEVELS) * 2
        assert found.clips == 3
        assert found.loss_by_duration["3-9s"] == pytest.approx(reference.loss_by_duration["3-9s"], rel=1e-5)
    assert numbers(results[0][0]) == numbers(results[1][0])


def test_nothing_that_could_be_read_is_an_error() -> None:
    with (
        join(Member.alone(), MeshConfig(), deterministic=True) as world,
        pytest.raises(RunError, match="of 1 clip none can be read"),
    ):
        record(world, [[2]], clips=Clips(unreadable=2))


def test_captions_are_exchanged_with_those_of_other_clips() -> None:
    reads = [Clips().visit(number) for number in range(4)]
    for order in (reads, reads[2:] + reads[:2]):
        partners = exchanged(order)
        assert [partners[visit.key][1].row for _, visit in reads] == [2, 3, 0, 1]
    assert exchanged(reads[:1]) == {}


def test_a_model_that_does_not_read_captions_is_found_out(reference: ValidationRecord) -> None:
    with join(Member.alone(), MeshConfig(), deterministic=True) as world:
        blind = record(world, [[0, 1, 2, 3]], predict=lambda inputs: torch.zeros_like(inputs.video))
        single = record(world, [[2]])
    assert blind.shuffled_loss == blind.loss
    assert reference.shuffled_loss != pytest.approx(reference.loss, rel=1e-4)
    assert single.shuffled_loss is None
