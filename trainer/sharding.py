"""A model over the mesh: built on the meta device it comes in, sharded and filled it goes out.

Always FSDP2 (`fully_shard`), also on one rank: one code path. Gradients are summed, not averaged, because
every loss is already divided by the size of the whole step; then neither the number of ranks nor how clips
fell to them changes the result. Tensor parallelism cuts the matrices of blocks by heads and by hidden width;
all else is computed alike on its ranks, whose copies stay equal because their gradients are.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from schemas.errors import ConfigError
from schemas.train_config import PrecisionConfig
from trainer.collate import PackedInputs
from trainer.parallel import World
from trainer.routes import BREAKING, compile_strictly
from trainer.sequence import PackedShare

Slices = tuple[slice, ...]
ReadSlice = Callable[[str, Slices], torch.Tensor]
"""Parameter name and slices of its full tensor -> those values."""
Recompute = Literal["none", "attention", "feed_forward", "block"]

PARTS = {"attention": "attend", "feed_forward": "feed", "block": "forward"}
"""Which method of a block each `model.recompute` is about."""

KEPT = {
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "flash_attn::_flash_attn_varlen_forward",
    "flash_attn_3::_flash_attn_forward",
    "flash_attn_3::fwd",  # the same, as older releases call it
    "torch_attn::_varlen_attn",
}
"""What is kept of what is recomputed: the results of attention, [L, E] a block, whose cost alone grows with
the square of a clip's length. Compiled flex attention has no name that torch could know: it is recomputed."""


class Columns(ColwiseParallel):
    """A linear layer by its outputs, with what its adapter has of them (B)."""

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        if name != "lora_A":
            _shard(module, ("weight", "bias"), 0, device_mesh)


class Rows(RowwiseParallel):
    """A linear layer by its inputs, with what its adapter has of them (A)."""

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        if name != "lora_B":
            _shard(module, ("weight",), 1, device_mesh)


def _shard(module: nn.Module, names: tuple[str, ...], dim: int, mesh: DeviceMesh) -> None:
    """Cut a module's own parameters; `distribute_module` makes the others whole on every rank."""
    for name in names:
        if (parameter := getattr(module, name)) is not None:
            cut = distribute_tensor(parameter.data, mesh, [Shard(dim)])
            module.register_parameter(name, nn.Parameter(cut, requires_grad=parameter.requires_grad))


class HeadNorm(ParallelStyle):
    """A norm over the width of a head, [L, N, D]: its weights are whole on every rank, its heads are not.

    As a DTensor its gradient is known to be a part, and is summed over the ranks.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(
            module,
            device_mesh,
            # What these give takes the place of the input and of the output, which torch's types do not say.
            input_fn=lambda module, inputs, mesh: DTensor.from_local(inputs[0], mesh, [Shard(1)]),  # type: ignore[arg-type]
            output_fn=lambda module, output, mesh: output.to_local(),
        )


STYLES: tuple[tuple[str, type[ParallelStyle]], ...] = (
    (r"\.to_[qkv]$", Columns),
    (r"\.norm_[qk]$", HeadNorm),
    (r"\.to_out\.0$", Rows),
    (r"^long_context\.(query|key|value)$", Columns),
    (r"^long_context\.norm_out$", HeadNorm),
    (r"^long_context\.out$", Rows),
    (r"^ff\.net\.0\.proj$", Columns),
    (r"^ff\.net\.2$", Rows),
)
"""How the modules of a block are cut, by their names in it. Modulation layers are not: a column-wise cut
would part shifts from scales."""


def parallelize(
    model: nn.Module,
    *,
    world: World,
    precision: PrecisionConfig,
    recompute: Recompute = "none",
    compile: bool = False,
) -> None:
    """Make a meta-device model one of `world`; ConfigError where the mesh does not fit it.

    The order matters: matrices are cut while they are whole, what is recomputed is part of what is compiled,
    and FSDP gathers around it all. Where the compiler must break off around attention (`_breaks`), compiled
    parts are in what is recomputed instead: it goes on after a break, but not within one recomputation.
    """
    blocks = cast(Sequence[nn.Module], model.transformer_blocks)
    check_mesh(model, sp=world.shape.sp, tp=world.shape.tp)
    if world.tp_mesh is not None:
        for block in blocks:
            _cut(block, world.tp_mesh)
    if world.sp is not None:
        _share_packs(model, world)
    breaks = compile and recompute in ("attention", "block") and _breaks(model, world)
    for block in blocks:
        if compile:
            compile_strictly()
        if breaks:
            for part in ("attend", "feed"):
                setattr(block, part, torch.compile(getattr(block, part)))
        if recompute != "none":
            part = PARTS[recompute]
            # Nothing in a block is random, and a copy of the generators' states would wait for the device.
            recomputed = functools.partial(
                checkpoint,
                getattr(block, part),
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=functools.partial(create_selective_checkpoint_contexts, _keep),
            )
            setattr(block, part, recomputed)
        if compile and not breaks:
            block.forward = torch.compile(block.forward)
    policy = MixedPrecisionPolicy(
        param_dtype=getattr(torch, precision.param),
        reduce_dtype=getattr(torch, precision.reduce),
        # The model casts what it is given; index tables and rotary tables must keep their type.
        cast_forward_inputs=False,
    )
    for module in (*blocks, model):
        fully_shard(module, mesh=world.mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The factor alone fails on gloo, which has no pre-multiplied sum.
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def _breaks(model: nn.Module, world: World) -> bool:
    """Whether attention has parts that the compiler leaves as they are.

    Those are loops over segments, masks, and what ranks trade: they must trade in one order, which kernels
    compiled on each rank by itself do not promise.
    """
    return world.sp is not None or model.route in BREAKING


def _keep(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """For torch's selective checkpointing: whether an operation's result is kept."""
    return CheckpointPolicy.MUST_SAVE if operation.name() in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def check_mesh(model: nn.Module, *, sp: int, tp: int) -> None:
    """ConfigError where heads do not divide by what shares them."""
    layout: Any = model.layout
    heads = layout.width // layout.head_dim
    if heads % (sp * tp):
        raise ConfigError(f"mesh.sp = {sp} times mesh.tp = {tp} must divide the model's {heads} heads")


def _cut(block: nn.Module, mesh: DeviceMesh) -> None:
    """Tensor parallelism for one block."""
    names = dict(block.named_modules())
    plan = {name: style() for name in names for pattern, style in STYLES if re.search(pattern, name)}
    parallelize_module(block, mesh, plan)


def _share_packs(model: Any, world: World) -> None:
    """Give the model attention over ranks that share a pack."""
    assert world.sp is not None
    model.attention = world.sp.attention(model.attention)
    model.context_attention = world.sp.attention(model.context_attention)
    if hasattr(model, "cross_attention"):
        model.cross_attention = world.sp.cross(model.cross_attention)


def fill(model: nn.Module, read: ReadSlice | None, *, device: torch.device) -> None:
    """Give a sharded meta-device model its memory, and its values slice by slice.

    Each rank asks for what it holds only, so the weights do not depend on how many ranks there are.
    Without `read` the values are whatever was there: a checkpoint is about to be loaded.
    """
    model.to_empty(device=device)
    if read is None:
        return
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            local, slices = local_part(tensor)
            local.copy_(read(name, slices))


def local_part(tensor: torch.Tensor) -> tuple[torch.Tensor, Slices]:
    """What this rank holds of a parameter, and where that lies in it. Of a buffer every rank has all."""
    if not isinstance(tensor, DTensor):
        return tensor, tuple(slice(0, size) for size in tensor.shape)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    slices = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
    return tensor.to_local(), slices


def predict(model: nn.Module, inputs: PackedInputs, *, world: World) -> torch.Tensor:
    """The prediction [V, P] for a pack, or this rank's share of it, on the host.

    Ranks that share a pack call together, and each gets all of its prediction.
    """
    if world.sp is None:
        return cast(torch.Tensor, model(inputs.to(world.device)))
    run = inputs if isinstance(inputs, PackedShare) else world.sp.split(inputs)
    return world.sp.gather(model(run.to(world.device)), run)


def reduce_over_replicas(model: nn.Module, *, last: bool, precision: PrecisionConfig) -> None:
    """Before each backward pass of a step: replicas add up their gradients after its `last` one.

    Until then each adds up its own, in the type of the reduction; where that is short they meet every time.
    """
    cast(FSDPModule, model).set_requires_all_reduce(last or precision.reduce != "float32")


def clip_grad_norm(parameters: Iterable[nn.Parameter], *, max_norm: float) -> float:
    """Scale gradients to a global norm of at most `max_norm`; returns the norm before, equal on all ranks.

    torch's own `clip_grad_norm_` cannot mix parameters of different meshes. Here each rank adds up what it
    holds, and sums go over those dimensions of a mesh that shard; over the others all ranks have the same.
    """
    groups: dict[tuple[DeviceMesh, tuple[int, ...]], list[torch.Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            # The mesh of the parameter: what torch remembers of operations may give a gradient an equal one
            # of process groups that are no more.
            grad, mesh = cast(DTensor, parameter.grad), cast(DTensor, parameter).device_mesh
            sharded = tuple(i for i, p in enumerate(grad.placements) if not p.is_replicate())
            groups.setdefault((mesh, sharded), []).append(grad.to_local())
    squares = []
    for (mesh, sharded), grads in groups.items():
        square = torch.stack(torch._foreach_norm(grads)).double().square().sum()
        for dim in sharded:
            dist.all_reduce(square, group=mesh.get_group(dim))
        squares.append(square)
    norm = float(torch.stack(squares).sum().sqrt())
    if norm > max_norm:
        for grads in groups.values():
            torch._foreach_mul_(grads, max_norm / norm)
    return norm
