"""Ranks, devices and the mesh: the only file that knows how many processes train and what each one holds.

Always FSDP2 (`fully_shard`), also on one rank: one code path. Gradients are summed, not averaged,
because every loss is already divided by the size of the whole step; then neither the number of ranks
nor how clips fell to them changes the result.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import HashStore, Store  # type: ignore[attr-defined]  # re-exported without __all__
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from schemas.errors import ConfigError, LatentpressError
from schemas.train_config import MeshConfig, PrecisionConfig

T = TypeVar("T")
Slices = tuple[slice, ...]
ReadSlice = Callable[[str, Slices], torch.Tensor]
"""Parameter name and slices of its full tensor -> those values."""


@dataclass(frozen=True)
class Member:
    """This process's place among the ranks; `store` is None where the environment tells (torchrun)."""

    rank: int
    local_rank: int
    size: int
    store: Store | None

    @classmethod
    def alone(cls) -> Member:
        return cls(rank=0, local_rank=0, size=1, store=HashStore())

    @classmethod
    def from_environment(cls) -> Member:
        """As torchrun, or a Slurm script in its manner, sets RANK, WORLD_SIZE and LOCAL_RANK."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        values = {"LOCAL_RANK": "0", **{name: os.environ[name] for name in names if name in os.environ}}
        if wrong := [name for name in names if not values.get(name, "").isdecimal()]:
            raise ConfigError(
                f"RANK is set, so this is one rank of a launcher: expected a number in {', '.join(wrong)}, "
                "as torchrun sets them; unset RANK to train here"
            )
        rank, size, local = (int(values[name]) for name in names)
        return cls(rank=rank, local_rank=local, size=size, store=None)


@dataclass(frozen=True)
class World:
    """The running process group."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over all ranks, the same on each."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return [float(value) for value in tensor.tolist()]

    def on_main(self, function: Callable[[], T]) -> T:
        """Call `function` on rank 0; its result, or its error, on every rank, so that none waits for it."""
        box: list[Any] = [None, None]
        if self.is_main:
            try:
                box[0] = function()
            except LatentpressError as error:
                box[1] = error
        dist.broadcast_object_list(box, src=0)
        if box[1] is not None:
            raise box[1]
        return cast(T, box[0])

    def gather(self, values: list[str]) -> list[str]:
        """The values of all ranks, rank after rank, the same on each."""
        lists: list[list[str]] = [[] for _ in range(self.size)]
        dist.all_gather_object(lists, values)
        return [value for part in lists for value in part]

    def say(self, text: str) -> None:
        """Print once, not once per rank."""
        if self.is_main:
            print(text, flush=True)

    def barrier(self) -> None:
        dist.barrier()


def mesh_shape(mesh: MeshConfig, *, size: int) -> tuple[int, int]:
    """(dp_replicate, dp_shard) for `size` ranks; ConfigError where they do not multiply to it."""
    shard = mesh.dp_shard
    if shard == 1 and size % mesh.dp_replicate == 0:
        shard = size // mesh.dp_replicate
    if mesh.dp_replicate * shard != size:
        raise ConfigError(
            f"mesh.dp_replicate = {mesh.dp_replicate} times mesh.dp_shard = {mesh.dp_shard} must be the "
            f"number of ranks, found {size}; start with --nproc {mesh.dp_replicate * mesh.dp_shard}, or set "
            "mesh.dp_shard = 1, which takes all ranks"
        )
    return mesh.dp_replicate, shard


@contextmanager
def join(member: Member, mesh: MeshConfig, *, deterministic: bool) -> Iterator[World]:
    """The process group and its mesh, on this rank's GPU where there is one, else on CPUs with gloo."""
    shape = mesh_shape(mesh, size=member.size)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", member.local_rank)
        torch.cuda.set_device(device)
    _set_deterministic(deterministic)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if member.store is None:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=member.store, rank=member.rank, world_size=member.size)
    try:
        full = init_device_mesh(device.type, shape, mesh_dim_names=("dp_replicate", "dp_shard"))
        # A mesh of two dimensions means HSDP to fully_shard; without replicas plain FSDP is meant.
        yield World(member.rank, member.size, device, full if shape[0] > 1 else full["dp_shard"])
    finally:
        dist.destroy_process_group()


def shard(model: nn.Module, *, blocks: Iterable[nn.Module], world: World, precision: PrecisionConfig) -> None:
    """Shard a meta-device model: each block on its own, then the rest with the root."""
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


def fill(model: nn.Module, read: ReadSlice | None, *, device: torch.device) -> None:
    """Give a sharded meta-device model its memory, and its values slice by slice.

    Each rank asks for what it holds only, so the weights do not depend on how many ranks there are.
    Without `read` the values are whatever was there: a checkpoint is about to be loaded.
    """
    model.to_empty(device=device)
    if read is None:
        return
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tensor = cast(DTensor, parameter)
            shape, offset = compute_local_shape_and_global_offset(
                tensor.shape, tensor.device_mesh, tensor.placements
            )
            slices = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
            tensor.to_local().copy_(read(name, slices))


def clip_grad_norm(parameters: Iterable[nn.Parameter], *, max_norm: float) -> float:
    """Scale gradients to a global norm of at most `max_norm`; returns the norm before, equal on all ranks.

    Grouped by mesh: torch's own `clip_grad_norm_` cannot mix parameters of different meshes.
    """
    groups: dict[DeviceMesh, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            groups.setdefault(cast(DTensor, parameter.grad).device_mesh, []).append(parameter)
    norms = [
        cast(DTensor, nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])).full_tensor()
        for group in groups.values()
    ]
    total = torch.linalg.vector_norm(torch.stack(norms))
    for group in groups.values():
        nn.utils.clip_grads_with_norm_(group, max_norm, total)
    return float(total)


def _set_deterministic(enabled: bool) -> None:
    torch.use_deterministic_algorithms(enabled)
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        # Filling fresh memory with NaN finds reads of it, at the price of a pass over every tensor.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
