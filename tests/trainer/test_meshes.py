"""Every mesh trains the same: losses, gradients, norms and weights of one rank, and of the plain program."""

from __future__ import annotations

import functools
import inspect
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.distributed import distributed_c10d
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

from schemas.errors import ConfigError
from schemas.train_config import LoraConfig, LrConfig, MeshConfig, OptimConfig, PrecisionConfig
from tests.trainer.gloo import on_ranks
from tests.trainer.stock import SDPA, clips, tiny_architecture
from tests.trainer.test_parallel import Values, alone, assert_same, whole
from trainer import routes
from trainer.architecture import Architecture
from trainer.attention import Attention, within
from trainer.collate import PackedInputs, collate
from trainer.dit import PackedDiT
from trainer.lora import add_adapters
from trainer.model import PackedModel, build_model
from trainer.optim import make_optimizer
from trainer.parallel import World
from trainer.sharding import (
    KEPT,
    Recompute,
    Slices,
    clip_grad_norm,
    fill,
    parallelize,
    predict,
    reduce_over_replicas,
)


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
    """A tiny model whose heads four ranks can share: a CogVideoX, or a DiT with cross attention.

    What follows "with" is there too: long context, adapters.
    """
    tiny = tiny_architecture("5b")
    config = tiny.config | {"num_attention_heads": 4}
    if kind.startswith("cogvideox"):
        return replace(tiny, config=config)
    own = inspect.signature(PackedDiT).parameters
    config = {name: value for name, value in config.items() if name in own}
    config |= {"patch_size_t": 1, "text": "cross"}
    return replace(
        tiny,
        kind="dit",
        config=config,
        local_frames=2,
        long_context="linear" if "long context" in kind else "none",
    )


def model_of(kind: str, attention: Attention = SDPA) -> PackedModel:
    """The model on the meta device. Beside adapters only the norms of heads and long context are trained."""
    with torch.device("meta"):
        model = build_model(four_heads(kind), attention)
        if "adapters" in kind:
            add_adapters(model, LORA)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(bool(re.search(r"\.lora_|\.norm_q\.|\.long_context\.", name)))
    return model


LORA = LoraConfig(
    targets=("to_[qkv]", r"to_out\.0", r"net\.0\.proj", r"net\.2", r"norm1\.linear", "text_proj|linear_2"),
    rank=3,
    alpha=6.0,
)
"""Beside layers cut by their outputs, by their inputs and not at all."""

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
    model = model_of(kind)

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
        for number, (inputs, target) in enumerate(packs, start=1):
            if world.sp and number % 2:  # as the feed splits it, or as validation hands it over
                inputs = world.sp.split(inputs)
            share = (predict(model, inputs, world=world) - target).square().sum() / 1000 / world.shape.sp
            reduce_over_replicas(model, last=number == len(packs), precision=PrecisionConfig())
            share.backward()
            loss += share.item()
        losses += world.sum([loss])
        if not step:
            trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
            gradients = {name: whole(p.grad).clone() for name, p in trained.items()}
        norms.append(clip_grad_norm(model.parameters(), max_norm=5.0))
        for group in optimizer.param_groups:
            group["lr"] = 0.005
        optimizer.step()
        optimizer.zero_grad()
    return Course(losses, norms, gradients, {name: whole(p) for name, p in model.named_parameters()})


KINDS = (
    "cogvideox",
    "dit",
    "dit with long context",
    "cogvideox with adapters",
    "dit with long context, adapters",
)


def assert_same_course(found: Course, expected: Course) -> None:
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert found.norms == pytest.approx(expected.norms, rel=1e-5)
    assert_same(found.gradients, expected.gradients, tolerance=1e-5)
    assert_same(found.weights, expected.weights, tolerance=1e-5)
    assert abs(expected.losses[-1] / expected.losses[0] - 1) > 0.1  # weights were changed
    assert min(expected.norms) > 5.0  # by clipped gradients


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Course]:
    return {kind: alone(course, kind) for kind in KINDS}


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
    [
        ("dit with long context", 4, mesh(dp_shard=2, sp=2)),
        ("dit with long context", 2, mesh(tp=2)),
        ("dit", 2, mesh(tp=2)),
        ("cogvideox with adapters", 4, mesh(dp_shard=2, tp=2)),
        ("cogvideox with adapters", 4, mesh(dp_replicate=2, tp=2)),
        ("dit with long context, adapters", 4, mesh(sp=2, tp=2)),
    ],
    ids=str,
)
def test_every_kind_of_layer_is_shared(
    one_rank: dict[str, Course], kind: str, ranks: int, degrees: MeshConfig
) -> None:
    for found in on_ranks(ranks, course, kind, mesh=degrees):
        assert_same_course(found, one_rank[kind])


def course_of_two_stages(world: World) -> Course:
    assert world.under(MeshConfig()) is world
    return course(world, "cogvideox", mesh=mesh(tp=2))


def groups_of_meshes(world: World) -> list[int]:
    """How many process groups there are after each change of mesh."""
    made = [world.under(mesh(sp=2)), world.under(mesh(dp_replicate=2))]
    groups = [len(distributed_c10d._world.pg_map)]
    for degrees in (MeshConfig(), mesh(sp=2), mesh(dp_replicate=2), mesh(dp_shard=2)):
        made.append(world.under(degrees).under(degrees))
        groups.append(len(distributed_c10d._world.pg_map))
    assert made[2:] == [world, made[0], made[1], world]
    return groups


def test_stages_share_the_groups_of_their_meshes() -> None:
    for groups in on_ranks(2, groups_of_meshes):
        assert len(set(groups)) == 1


def meetings_of_replicas(world: World, reduce: str) -> list[int]:
    """How often replicas add up gradients in each of three backward passes of a step, the last one last."""
    architecture = four_heads("cogvideox")
    with torch.device("meta"):
        model = build_model(architecture, SDPA)
    precision = PrecisionConfig.model_validate({"reduce": reduce})
    parallelize(model, world=world, precision=precision)
    fill(model, lambda name, slices: torch.ones([s.stop - s.start for s in slices]), device=world.device)
    met = []
    for last in (False, False, True):
        inputs, _ = packs_of(world, architecture)[0]
        reduce_over_replicas(model, last=last, precision=precision)
        loss = predict(model, inputs, world=world).square().sum()
        with CommDebugMode() as heard:
            loss.backward()
        met.append(heard.get_comm_counts().get(torch.ops.c10d.allreduce_, 0))
    return met


@pytest.mark.parametrize(("reduce", "expected"), [("float32", [0, 0, 3]), ("bfloat16", [3, 3, 3])])
def test_replicas_meet_once_a_step(reduce: str, expected: list[int]) -> None:
    """Two blocks and the rest."""
    for met in on_ranks(2, meetings_of_replicas, reduce, mesh=mesh(dp_replicate=2)):
        assert met == expected


def test_a_stage_has_a_mesh_of_its_own(one_rank: dict[str, Course]) -> None:
    for found in on_ranks(2, course_of_two_stages):
        assert_same_course(found, one_rank["cogvideox"])


def dynamo_warnings(test: Callable[..., None]) -> Callable[..., None]:
    """What torch.compile warns itself of, and hides where warnings are no errors."""
    for text in (
        "The .grad attribute of a Tensor",
        "<class 'torch.autograd.function.Function'> should not",
        ".*torch.jit.script",
    ):
        test = pytest.mark.filterwarnings(f"ignore:{text}")(test)
    return test


@pytest.mark.parametrize("recompute", ["attention", "feed_forward", "block"])
@pytest.mark.parametrize("kind", ["cogvideox", "dit with long context"])
def test_recomputing_changes_nothing(one_rank: dict[str, Course], kind: str, recompute: Recompute) -> None:
    found = alone(course, kind, recompute)
    assert found.losses == one_rank[kind].losses
    assert found.norms == one_rank[kind].norms
    assert_same(found.weights, one_rank[kind].weights, tolerance=0)


class Attended(TorchDispatchMode):
    """Counts the kernels of attention that run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """So that there is something compiled under it."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name() in KEPT
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recompute", ["none", "attention", "block"])
def test_attention_is_kept_where_its_block_is_recomputed(recompute: Recompute) -> None:
    with Attended() as attended:
        alone(course, "cogvideox", recompute)
    blocks, steps, segments = 2, 2, sum(map(len, PACKS))
    assert attended.count == blocks * steps * segments


def aot_eager(test: pytest.MonkeyPatch) -> None:
    """All of torch.compile but its kernels, whose compilation would take a minute."""
    test.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


@dynamo_warnings
@pytest.mark.parametrize("recompute", ["feed_forward", "block"])
def test_compiled_blocks_change_nothing(
    one_rank: dict[str, Course], monkeypatch: pytest.MonkeyPatch, recompute: Recompute
) -> None:
    aot_eager(monkeypatch)
    assert_same_course(alone(course, "cogvideox", recompute, True), one_rank["cogvideox"])


def compiled_course(world: World, recompute: Recompute) -> tuple[Course, int, int]:
    """Also how many operations were compiled, and how many kernels of attention ran."""
    torch._dynamo.reset()
    counters.clear()
    with pytest.MonkeyPatch.context() as patch, Attended() as attended:
        aot_eager(patch)
        found = course(world, "cogvideox", recompute, True)
    return found, counters["stats"]["calls_captured"], attended.count


def test_compiled_blocks_share_their_packs(one_rank: dict[str, Course]) -> None:
    """Also what is recomputed is compiled, but for attention, which is kept."""
    plain, block = (on_ranks(2, compiled_course, part, mesh=mesh(sp=2)) for part in ("none", "block"))
    for (_, expected, kernels), (found, compiled, attended) in zip(plain, block, strict=True):
        assert_same_course(found, one_rank["cogvideox"])
        assert compiled == expected > 100
        assert attended == kernels


def test_compiled_blocks_share_their_matrices(one_rank: dict[str, Course]) -> None:
    for found, compiled, _ in on_ranks(2, compiled_course, "none", mesh=mesh(tp=2)):
        assert_same_course(found, one_rank["cogvideox"])
        assert compiled > 100


def one_pack(world: World, recompute: Recompute, compile: bool, attention: Attention) -> Values:
    """Gradients of a model of one block."""
    architecture = four_heads("cogvideox")
    architecture = replace(architecture, config=architecture.config | {"num_layers": 1})
    with torch.device("meta"):
        model = build_model(architecture, attention)
    parallelize(model, world=world, precision=PrecisionConfig(), recompute=recompute, compile=compile)
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(p.shape, generator=generator) * 0.1 for name, p in model.state_dict().items()}
    fill(model, lambda name, slices: values[name][slices], device=world.device)
    inputs, target = packs_of(world, architecture)[0]
    (predict(model, inputs, world=world) - target.to(world.device)).square().sum().backward()
    return {name: whole(p.grad).cpu() for name, p in model.named_parameters()}


@pytest.mark.skipif(
    shutil.which("g++") is None, reason="torch.compile makes C++ of a CPU's kernels: needs g++"
)
@dynamo_warnings
def test_compiled_kernels_change_nothing() -> None:
    assert_same(alone(one_pack, "none", True, SDPA), alone(one_pack, "none", False, SDPA), tolerance=1e-5)


@pytest.mark.gpu
@dynamo_warnings
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_compiled_kernels_change_nothing_on_a_gpu(recompute: Recompute) -> None:
    """Through varlen attention, which compiles with its block."""
    cross = routes.ROUTES["varlen"]()

    def in_bfloat16(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *bounds: Any) -> torch.Tensor:
        return cross(q.bfloat16(), k.bfloat16(), v.bfloat16(), *bounds).float()

    varlen = Attention("varlen", "", within(in_bfloat16), in_bfloat16)
    expected = alone(one_pack, "none", False, varlen, gpu=True)
    assert_same(alone(one_pack, recompute, True, varlen, gpu=True), expected, tolerance=2e-2)


@pytest.mark.gpu
def test_one_rank_with_nccl_computes_what_a_cpu_does() -> None:
    found = alone(one_pack, "block", False, SDPA, gpu=True)
    assert_same(found, alone(one_pack, "block", False, SDPA), tolerance=1e-3)


def refused(world: World, degrees: MeshConfig) -> str:
    """What sharding a model under another mesh is refused with."""
    with pytest.raises(ConfigError) as error:
        parallelize(model_of("cogvideox"), world=world.under(degrees), precision=PrecisionConfig())
    return str(error.value)


def test_heads_that_cannot_be_shared_are_refused() -> None:
    for message in on_ranks(3, refused, mesh(sp=3)):
        assert message == "mesh.sp = 3 times mesh.tp = 1 must divide the model's 4 heads"
