"""Sequence parallel: what each rank is given of a pack, and that nothing of it is lost or changed."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from schemas.load import check_config
from schemas.train_config import MeshConfig, TrainConfig
from tests.trainer.datasets import write_dataset
from tests.trainer.gloo import on_ranks
from tests.trainer.stock import clips_for, pack_inputs
from trainer.architecture import architecture, data_shape
from trainer.attention import within
from trainer.catalog import Catalog
from trainer.collate import PackedInputs
from trainer.feed import feed
from trainer.loader import Loader
from trainer.objective import make_objective
from trainer.parallel import World
from trainer.probe import reference
from trainer.sequence import TABLES_OF_THE_STREAM, PackedShare, SequenceParallel

SPLIT_BY_HAND = {"video", "text", "order", "video_places", "positions", "learned_row"}
WHOLE = {"timesteps", "cu_seqlens", "clip_seqlens", "text_seqlens"}
WHOLE |= {"max_seqlen", "max_clip", "max_text", "video_lengths"}


def shares(inputs: PackedInputs, ranks: int) -> list[PackedShare]:
    group = cast(dist.ProcessGroup, None)  # splitting asks nobody
    return [SequenceParallel(rank, ranks, group).split(inputs) for rank in range(ranks)]


def stream(inputs: PackedInputs) -> torch.Tensor:
    """A row per token of the stream: where it comes from. Video and text are made equally wide."""
    width = min(inputs.video.shape[1], inputs.text.shape[1])
    rows = torch.cat([inputs.video[:, :width], inputs.text[:, :width]])
    if inputs.learned_row is not None:
        rows = torch.cat([rows, inputs.learned_row[:, None]], dim=1)
    return rows[inputs.order]


def test_every_part_of_a_pack_has_its_rule() -> None:
    assert {field.name for field in fields(PackedInputs)} == SPLIT_BY_HAND | WHOLE | {*TABLES_OF_THE_STREAM}


@pytest.mark.parametrize("variant", ["5b", "2b", "5b-i2v"])
@pytest.mark.parametrize("ranks", [2, 3, 64])
def test_shares_make_the_whole(variant: str, ranks: int) -> None:
    local_frames = 2 if variant == "5b" else 0
    inputs, _ = pack_inputs(clips_for(variant), variant=variant, local_frames=local_frames)
    parts = shares(inputs, ranks)
    assert max(len(p.order) for p in parts) - min(len(p.order) for p in parts) == 1 or ranks < 64
    assert torch.equal(torch.cat([stream(part) for part in parts]), stream(inputs))
    assert torch.equal(torch.cat([part.video for part in parts]), inputs.video)
    for name in (*TABLES_OF_THE_STREAM, "positions"):
        whole = getattr(inputs, name)
        if whole is not None:
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), whole)
    starts = torch.tensor([0] + [len(part.order) for part in parts]).cumsum(0)
    places = [part.video_places + start for part, start in zip(parts, starts, strict=False)]
    assert torch.equal(torch.cat(places), inputs.video_places)
    assert {part.video_counts for part in parts} == {tuple(len(part.video) for part in parts)}
    assert all(torch.equal(part.cu_seqlens, inputs.cu_seqlens) for part in parts)


def attended(world: World, lengths: list[int], keys: list[int]) -> tuple[list[torch.Tensor], ...]:
    """Self and cross attention over ranks: this rank's rows of output and gradients, beside the true ones."""
    assert world.sp is not None
    generator = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(3, sum(lengths), 4, 8, generator=generator).unbind()
    text_k, text_v = torch.randn(2, sum(keys), 4, 8, generator=generator).unbind()
    cu_q, cu_k = (torch.tensor([0, *part]).cumsum(0).int() for part in (lengths, keys))
    edges = [sum(lengths) * rank // world.sp.size for rank in range(world.sp.size + 1)]
    own = slice(edges[world.sp.rank], edges[world.sp.rank + 1])

    def run(inputs: list[torch.Tensor], whole: bool) -> list[torch.Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        sp = cast(SequenceParallel, world.sp)
        function = within(reference) if whole else sp.attention(within(reference))
        cross = reference if whole else sp.cross(reference)
        a, b, c, d, e = leaves
        out = function(a, b, c, cu_q, max(lengths)) + cross(a, d, e, cu_q, cu_k, max(lengths), max(keys))
        return [out.detach(), *torch.autograd.grad(out.sin().sum(), leaves)]

    expected = run([q, k, v, text_k, text_v], whole=True)
    found = run([q[own], k[own], v[own], text_k, text_v], whole=False)
    for text in (4, 5):  # each rank has the gradient of its heads; FSDP adds them up
        dist.all_reduce(found[text], group=world.sp.group)
    return found, [*(tensor[own] for tensor in expected[:4]), *expected[4:]]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("lengths", [[5, 1, 9], [1, 2]])
def test_attention_over_ranks_is_that_of_one(ranks: int, lengths: list[int]) -> None:
    keys = [index % 3 + 1 for index in range(len(lengths))]
    results = on_ranks(ranks, attended, lengths, keys, mesh=MeshConfig(sp=ranks))
    for found, expected in results:
        torch.testing.assert_close(found, expected)


def gathered(world: World, inputs: PackedInputs, target: torch.Tensor) -> tuple[Any, ...]:
    """The whole of what ranks predict, and this rank's gradient of a loss on it."""
    assert world.sp is not None
    part = world.sp.split(inputs)
    prediction = part.video.clone().requires_grad_()
    whole = world.sp.gather(prediction, part)
    (gradient,) = torch.autograd.grad((whole - target).square().sum() / world.sp.size, prediction)
    return whole.detach(), part.video, gradient


def fed(world: World, folder: Path) -> list[tuple[int, int, int]]:
    """(tokens of this rank, of all ranks, of the loss) of each batch of two steps."""
    config = check_config(
        {
            "dataset": str(folder),
            "output": "none",
            "model": {"num_attention_heads": 2, "attention_head_dim": 16},
            "data": {"budget_tokens": 64, "slots": 2},
            "stages": [{"name": "only", "steps": 2, "lr": {"peak": 1e-3}}],
        },
        TrainConfig,
        where="test",
    )
    plan = architecture(config.model, data_shape(Catalog(folder)))
    objective = make_objective(config.loss, plan.schedule)
    with Loader(Catalog(folder), config=config) as loader:
        steps = feed(loader, steps=range(2), architecture=plan, objective=objective, world=world, ahead=True)
        batches = [batch for data in steps for batch in data.batches]
    shares = [batch.inputs for batch in batches]
    assert all(isinstance(share, PackedShare) for share in shares)
    return [(len(s.video), sum(s.video_lengths), len(b.target)) for s, b in zip(shares, batches, strict=True)]


def test_the_feed_hands_out_shares(tmp_path: Path) -> None:
    write_dataset(tmp_path / "set")
    for first, second in zip(*on_ranks(2, fed, tmp_path / "set", mesh=MeshConfig(sp=2)), strict=True):
        assert first[0] + second[0] == first[1] == first[2] == second[2]
        assert first[0] > 0 < second[0]


def test_predictions_are_gathered_and_gradients_come_back() -> None:
    inputs, target = pack_inputs(clips_for("5b"), variant="5b")
    results = on_ranks(4, gathered, inputs, target, mesh=MeshConfig(sp=4))
    for whole, _, _ in results:
        assert torch.equal(whole, inputs.video)
    torch.testing.assert_close(torch.cat([g for _, _, g in results]), 2 * (inputs.video - target))
