"""Every mesh trains the same: losses, gradients, norms and weights of one rank, and of the plain program."""

from __future__ import annotations

import functools
import inspect
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from schemas.errors import ConfigError
from schemas.train_config import LrConfig, MeshConfig, OptimConfig, PrecisionConfig
from tests.trainer.gloo import on_ranks
from tests.trainer.stock import SDPA, clips, tiny_architecture
from tests.trainer.test_parallel import Values, alone, assert_same, whole
from trainer.architecture import Architecture
from trainer.collate import PackedInputs, collate
from trainer.dit import PackedDiT
from trainer.model import build_model
from trainer.optim import make_optimizer
from trainer.parallel import World
from trainer.sharding import Recompute, Slices, clip_grad_norm, fill, parallelize


@dataclass(frozen=True)
class Course:
    """What some steps of training came to."""

    losses: list[float]
    norms: list[float]
    gradients: Values
    """Of the first step."""
    weights: Values
    """After the last."""


def four_heads(kind: str) -> Architecture:
    """A tiny model whose heads four ranks can share: a CogVideoX, or a DiT with cross attention."""
    tiny = tiny_architecture("5b")
    config = tiny.config | {"num_attention_heads": 4}
    if kind == "cogvideox":
        return replace(tiny, config=config)
    own = inspect.signature(PackedDiT).parameters
    config = {name: value for name, value in config.items() if name in own}
    config |= {"patch_size_t": 1, "text": "cross"}
    return replace(
        tiny,
        kind="dit",
        config=config,
        local_frames=2,
        long_context="linear" if kind == "dit with long context" else "none",
    )


PACKS = ([0, 1], [2], [3, 1, 0], [2, 3])
"""Clips of each pack of a step."""


def packs_of(world: World, architecture: Architecture) -> list[tuple[PackedInputs, torch.Tensor]]:
    """Inputs and targets of this rank's packs."""
    segments, made = clips(), []
    for numbers in PACKS[world.dp_rank :: world.dp_size]:
        chosen = [segments[i] for i in numbers]
        inputs = collate(
            [segment.latents for segment in chosen],
            [segment.prompt_embeds for segment in chosen],
            [100 + i for i in numbers],
            layout=architecture.layout,
        )
        made.append((inputs, -inputs.video))
    return made


def course(
    world: World,
    kind: str,
    recompute: Recompute = "none",
    compile: bool = False,
    mesh: MeshConfig | None = None,
    steps: int = 2,
) -> Course:
    """Train a tiny model for some steps on the packs of `PACKS`, as the loop does."""
    world = world.under(mesh) if mesh else world
    architecture = four_heads(kind)
    with torch.device("meta"):
        model = build_model(architecture, SDPA)

    def read(name: str, slices: Slices) -> torch.Tensor:
        generator = torch.Generator().manual_seed(len(name) * 1000 + sum(map(ord, name)))
        value = torch.randn(shapes[name], generator=generator) * 0.15
        return (value + ("norm" in name and value.ndim == 1))[slices]

    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    parallelize(model, world=world, precision=PrecisionConfig(), recompute=recompute, compile=compile)
    fill(model, read, device=world.device)
    # A large epsilon: where gradients are nearly 0, rounding alone would decide which way AdamW goes.
    optimizer = make_optimizer(model, OptimConfig(eps=1e-2, weight_decay=0.1), LrConfig(peak=1.0))
    packs = packs_of(world, architecture)
    losses, norms, gradients = [], [], {}
    for step in range(steps):
        loss = 0.0
        for inputs, target in packs:
            if world.sp:
                part = world.sp.split(inputs)
                prediction = world.sp.gather(model(part), part)
                share = (prediction - target).square().sum() / 1000 / world.sp.size
            else:
                share = (model(inputs) - target).square().sum() / 1000
            share.backward()
            loss += share.item()
        losses += world.sum([loss])
        if not step:
            gradients = {name: whole(p.grad).clone() for name, p in model.named_parameters()}
        norms.append(clip_grad_norm(model.parameters(), max_norm=5.0))
        for group in optimizer.param_groups:
            group["lr"] = 0.005
        optimizer.step()
        optimizer.zero_grad()
    return Course(losses, norms, gradients, {name: whole(p) for name, p in model.named_parameters()})


def assert_same_course(found: Course, expected: Course) -> None:
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert found.norms == pytest.approx(expected.norms, rel=1e-5)
    assert_same(found.gradients, expected.gradients, tolerance=1e-5)
    assert_same(found.weights, expected.weights, tolerance=1e-5)
    assert abs(expected.losses[-1] / expected.losses[0] - 1) > 0.1  # weights were changed
    assert min(expected.norms) > 5.0  # by clipped gradients


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Course]:
    return {kind: alone(course, kind) for kind in ("cogvideox", "dit", "dit with long context")}


def mesh(**degrees: int) -> MeshConfig:
    return MeshConfig.model_validate(degrees)


@pytest.mark.parametrize(
    ("ranks", "degrees"),
    [
        (4, mesh()),
        (4, mesh(dp_replicate=2)),
        (2, mesh(tp=2)),
        (4, mesh(dp_shard=2, tp=2)),
        (4, mesh(dp_replicate=2, tp=2)),
        (2, mesh(sp=2)),
        (4, mesh(dp_shard=2, sp=2)),
        (4, mesh(dp_replicate=2, sp=2)),
        (4, mesh(sp=2, tp=2)),
    ],
    ids=str,
)
def test_training_is_the_same_under_every_mesh(
    one_rank: dict[str, Course], ranks: int, degrees: MeshConfig
) -> None:
    for found in on_ranks(ranks, course, "cogvideox", mesh=degrees):
        assert_same_course(found, one_rank["cogvideox"])


@pytest.mark.parametrize(
    ("kind", "ranks", "degrees"),
    [("dit with long context", 4, mesh(dp_shard=2, sp=2)), ("dit", 2, mesh(tp=2))],
    ids=str,
)
def test_every_kind_of_attention_is_shared(
    one_rank: dict[str, Course], kind: str, ranks: int, degrees: MeshConfig
) -> None:
    for found in on_ranks(ranks, course, kind, mesh=degrees):
        assert_same_course(found, one_rank[kind])


def course_of_two_stages(world: World) -> Course:
    assert world.under(MeshConfig()) is world
    return course(world, "cogvideox", mesh=mesh(tp=2))


def test_a_stage_has_a_mesh_of_its_own(one_rank: dict[str, Course]) -> None:
    for found in on_ranks(2, course_of_two_stages):
        assert_same_course(found, one_rank["cogvideox"])


def dynamo_warnings(test: Callable[..., None]) -> Callable[..., None]:
    """What torch.compile warns itself of, and hides where warnings are no errors."""
    for text in ("The .grad attribute of a Tensor", "<class 'torch.autograd.function.Function'> should not"):
        test = pytest.mark.filterwarnings(f"ignore:{text}")(test)
    return test


@pytest.mark.parametrize("recompute", ["attention", "feed_forward", "block"])
@pytest.mark.parametrize("kind", ["cogvideox", "dit with long context"])
def test_recomputing_changes_nothing(one_rank: dict[str, Course], kind: str, recompute: Recompute) -> None:
    found = alone(course, kind, recompute)
    assert found.losses == one_rank[kind].losses
    assert found.norms == one_rank[kind].norms
    assert_same(found.weights, one_rank[kind].weights, tolerance=0)


@dynamo_warnings
def test_compiled_blocks_change_nothing(one_rank: dict[str, Course], monkeypatch: pytest.MonkeyPatch) -> None:
    """All of torch.compile but its kernels, whose compilation would take a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    assert_same_course(alone(course, "cogvideox", "feed_forward", True), one_rank["cogvideox"])


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile makes C++ of a CPU's kernels: needs g++"
)
@dynamo_warnings
def test_compiled_kernels_change_nothing(one_rank: dict[str, Course]) -> None:
    assert_same_course(alone(course, "cogvideox", "none", True), one_rank["cogvideox"])


def refused(world: World, degrees: MeshConfig, kind: str, lora: bool = False) -> str:
    """What sharding a model under another mesh is refused with."""
    with torch.device("meta"):
        model: Any = build_model(four_heads(kind), SDPA)
        if lora:
            model.transformer_blocks[0].attn1.to_q.lora_A = torch.nn.Linear(64, 2, bias=False)
    with pytest.raises(ConfigError) as error:
        parallelize(model, world=world.under(degrees), precision=PrecisionConfig())
    return str(error.value)


def test_what_cannot_be_shared_is_refused() -> None:
    for message in on_ranks(3, refused, mesh(sp=3), "cogvideox"):
        assert message == "mesh.sp = 3 times mesh.tp = 1 must divide the model's 4 heads"
    assert "long_context cannot be cut" in on_ranks(2, refused, mesh(tp=2), "dit with long context")[0]
    assert "LoRA adapters (lora) cannot be cut" in on_ranks(2, refused, mesh(tp=2), "cogvideox", True)[0]
