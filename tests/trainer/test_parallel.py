"""Ranks and the mesh: the same weights, gradients and norms whatever the number of ranks."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from schemas.errors import ConfigError
from schemas.train_config import MeshConfig, PrecisionConfig
from tests.trainer.gloo import forget_meshes, on_two_ranks
from tests.trainer.stock import SDPA, SHAPES, clip_errors, clips, pack_inputs, packed_model, tiny_architecture
from trainer.model import PackedModel, build_model
from trainer.parallel import Member, MeshShape, World, join
from trainer.sharding import Slices, clip_grad_norm, fill, parallelize
from trainer.weights import initial_values

Values = dict[str, torch.Tensor]


def sharded_model(world: World, *, param: str = "float32", seed: int | None = None) -> PackedModel:
    """A tiny model under FSDP: the weights of `packed_model`, or drawn from `seed`."""
    with torch.device("meta"):
        model = build_model(tiny_architecture("5b"), SDPA)
    known = packed_model("5b").state_dict()

    def read_known(name: str, slices: Slices) -> torch.Tensor:
        return known[name][slices]

    read = read_known if seed is None else initial_values("random", model, seed=seed)
    parallelize(model, world=world, precision=PrecisionConfig.model_validate({"param": param}))
    fill(model, read, device=world.device)
    return model


def whole(tensor: torch.Tensor | None) -> torch.Tensor:
    return cast(DTensor, tensor).full_tensor().detach()


def initial_weights(world: World) -> Values:
    return {name: whole(parameter) for name, parameter in sharded_model(world, seed=3).named_parameters()}


def losses_and_gradients(world: World, packs_of_rank: list[list[list[int]]]) -> tuple[float, Values]:
    """Rank r runs its packs (lists of clip numbers); losses are divided by the clips of all ranks."""
    model = sharded_model(world)
    segments = clips()
    loss = 0.0
    for numbers in packs_of_rank[world.rank]:
        inputs, target = pack_inputs([segments[i] for i in numbers], variant="5b")
        share = clip_errors(model(inputs), target, lengths=inputs.video_lengths).sum() / len(SHAPES)
        share.backward()
        loss += share.item()
    gradients = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
    return world.sum([loss])[0], gradients


def norm_and_clipped(world: World, max_norm: float) -> tuple[float, Values]:
    model = sharded_model(world)
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = parameter.detach() * (i + 1)
    norm = clip_grad_norm(model.parameters(), max_norm=max_norm)
    return norm, {name: whole(parameter.grad) for name, parameter in model.named_parameters()}


def what_world_tells(world: World) -> tuple[list[float], Any, list[str]]:
    return (
        world.sum([1.0, world.rank]),
        world.on_main(lambda: {"rank": world.rank}),
        world.gather([f"from {world.rank}"] * world.rank),
    )


def bfloat16_step(world: World) -> tuple[torch.dtype, set[torch.dtype], bool]:
    model = sharded_model(world, param="bfloat16")
    inputs, target = pack_inputs(clips()[:2], variant="5b")
    output = model(inputs)
    clip_errors(output, target, lengths=inputs.video_lengths).sum().backward()
    finite = all(bool(whole(p.grad).isfinite().all()) for p in model.parameters())
    return output.dtype, {p.dtype for p in model.parameters()}, finite


def alone(function: Any, *args: Any, gpu: bool = False) -> Any:
    """`function(world, *args)` on one rank of its own, on a CPU also where there are GPUs."""
    forget_meshes()
    with pytest.MonkeyPatch.context() as patch:
        if not gpu:
            patch.setattr(torch.cuda, "is_available", lambda: False)
        with join(Member.alone(), MeshConfig(), deterministic=True) as world:
            return function(world, *args)


def assert_same(found: Values, expected: Values, *, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    largest = max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        error = (found[name] - value).abs().max()
        assert error <= tolerance * max(value.abs().max(), 1e-3 * largest), name


def test_random_weights_do_not_depend_on_the_number_of_ranks() -> None:
    expected = alone(initial_weights)
    for found in on_two_ranks(initial_weights):
        assert_same(found, expected, tolerance=0)
    assert any(value.std() > 0.01 for value in expected.values())


def test_gradients_do_not_depend_on_ranks_packs_or_order() -> None:
    loss, expected = alone(losses_and_gradients, [[[0, 1, 2, 3]]])
    unequal: list[list[list[int]]] = [[[2]], [[3, 0, 1]]]
    for found_loss, found in on_two_ranks(losses_and_gradients, unequal):
        assert found_loss == pytest.approx(loss, rel=1e-6)
        assert_same(found, expected, tolerance=5e-6)
    one_by_one_loss, one_by_one = alone(losses_and_gradients, [[[3], [1], [0], [2]]])
    assert one_by_one_loss == pytest.approx(loss, rel=1e-6)
    assert_same(one_by_one, expected, tolerance=5e-6)


@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_the_clip_is_that_of_the_whole_gradient(max_norm: float) -> None:
    model = packed_model("5b")
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = parameter.detach() * (i + 1)
    expected = nn.utils.clip_grad_norm_(model.parameters(), max_norm).item()
    clipped = {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    for norm, found in (alone(norm_and_clipped, max_norm), *on_two_ranks(norm_and_clipped, max_norm)):
        assert norm == pytest.approx(expected, rel=1e-6)
        assert_same(found, clipped, tolerance=1e-6)


def stale_mesh(world: World) -> tuple[float, float]:
    """The norm of gradients whose mesh equals the parameters' but names groups that are no more."""
    model = sharded_model(world)
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    expected = clip_grad_norm(model.parameters(), max_norm=1e9)
    ended: Any = copy.copy(world.mesh)
    ended._dim_group_names = ["ended"] * world.mesh.ndim
    for parameter in model.parameters():
        grad = cast(DTensor, parameter.grad)
        parameter.grad = DTensor.from_local(grad.to_local(), ended, grad.placements, run_check=False)
    return clip_grad_norm(model.parameters(), max_norm=1e9), expected


def test_the_norm_asks_the_groups_of_the_parameters() -> None:
    for found, expected in on_two_ranks(stale_mesh):
        assert found == expected


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    member = Member(rank=1, local_rank=1, size=2, store=None)
    with (
        pytest.raises(ConfigError, match=r"found torch.cuda.device_count\(\) = 1; start as many ranks"),
        join(member, MeshConfig(), deterministic=True),
    ):
        pass


def test_ranks_agree() -> None:
    assert on_two_ranks(what_world_tells) == [([2.0, 1.0], {"rank": 0}, ["from 1"])] * 2


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_weights() -> None:
    assert alone(bfloat16_step) == (torch.bfloat16, {torch.float32}, True)


@pytest.mark.parametrize(
    ("degrees", "ranks", "expected"),
    [
        ({}, 1, (1, 1, 1, 1)),
        ({}, 4, (1, 4, 1, 1)),
        ({"dp_replicate": 2}, 4, (2, 2, 1, 1)),
        ({"dp_replicate": 2, "dp_shard": 2}, 4, (2, 2, 1, 1)),
        ({"dp_shard": 2}, 2, (1, 2, 1, 1)),
        ({"sp": 4, "tp": 2}, 16, (1, 2, 4, 2)),
    ],
)
def test_the_mesh_takes_all_ranks(
    degrees: dict[str, int], ranks: int, expected: tuple[int, int, int, int]
) -> None:
    assert MeshShape.of(MeshConfig(**degrees), size=ranks) == MeshShape(*expected)


@pytest.mark.parametrize(
    ("degrees", "ranks"),
    [
        ({"dp_replicate": 2, "dp_shard": 2}, 2),
        ({"dp_replicate": 4}, 2),
        ({"dp_shard": 3}, 4),
        ({"dp_replicate": 3}, 4),
        ({"dp_shard": 2, "tp": 2}, 2),
        ({"sp": 3}, 4),
    ],
)
def test_a_mesh_that_does_not_fit_says_what_to_do(degrees: dict[str, int], ranks: int) -> None:
    with pytest.raises(ConfigError, match=f"number of ranks, found {ranks}; start with --nproc"):
        MeshShape.of(MeshConfig(**degrees), size=ranks)
