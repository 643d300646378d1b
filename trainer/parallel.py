"""Ranks, devices and the mesh: which processes train, and what each of them shares with which others.

A rank has four coordinates: replica, shard, place in the sequence, place in the matrices. Replicas and shards
take packs of their own, the other two share a pack. What the mesh does to a model is `trainer.sharding`'s.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import HashStore, Store  # type: ignore[attr-defined]  # re-exported without __all__
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from schemas.errors import ConfigError, LatentpressError
from schemas.train_config import MeshConfig
from trainer.sequence import SequenceParallel

T = TypeVar("T")

PATIENCE = timedelta(minutes=30)
"""How long a rank waits for the others, as while the first one draws samples. Ranks that fail are killed by
their launcher at once; this ends the wait for those that hang."""


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
class MeshShape:
    """How many ranks share what; their product is the world size."""

    dp_replicate: int
    """Copies of all weights."""
    dp_shard: int
    """Shards of each copy, beside those over `sp`."""
    sp: int
    """Ranks that share a pack's tokens."""
    tp: int
    """Ranks that share a block's matrices."""

    @property
    def dp_size(self) -> int:
        """Data-parallel ranks: each takes packs of its own, and shares them with its sp and tp peers."""
        return self.dp_replicate * self.dp_shard

    def dp_rank(self, rank: int) -> int:
        """The same for all ranks that share a pack."""
        return rank // (self.sp * self.tp)

    @classmethod
    def of(cls, mesh: MeshConfig, *, size: int) -> MeshShape:
        """The shape for `size` ranks; ConfigError where they do not multiply to it."""
        given = cls(mesh.dp_replicate, mesh.dp_shard, mesh.sp, mesh.tp)
        others = given.dp_replicate * given.sp * given.tp
        if given.dp_shard == 1 and size % others == 0:
            return replace(given, dp_shard=size // others)
        if others * given.dp_shard != size:
            raise ConfigError(
                f"mesh: dp_replicate {given.dp_replicate} * dp_shard {given.dp_shard} * sp {given.sp} * tp "
                f"{given.tp} must be the number of ranks, found {size}; start with --nproc "
                f"{others * given.dp_shard}, or set mesh.dp_shard = 1, which takes all ranks that are left"
            )
        return given


@dataclass(frozen=True)
class World:
    """The running process group, seen through one mesh."""

    rank: int
    size: int
    device: torch.device
    shape: MeshShape
    mesh: DeviceMesh
    """What FSDP shards over, replicas first."""
    tp_mesh: DeviceMesh | None
    sp: SequenceParallel | None
    known: dict[MeshShape, World] = field(repr=False)
    """The meshes of these processes so far, this one among them: their process groups are made once."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def dp_size(self) -> int:
        """As of `MeshShape`; so is the next."""
        return self.shape.dp_size

    @property
    def dp_rank(self) -> int:
        return self.shape.dp_rank(self.rank)

    def under(self, mesh: MeshConfig) -> World:
        """The same processes under a stage's own mesh."""
        shape = MeshShape.of(mesh, size=self.size)
        if shape not in self.known:
            self.known[shape] = _world(self.rank, self.size, self.device, shape, known=self.known)
        return self.known[shape]

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over all ranks, the same on each.

        Tensor-parallel peers, who compute the same, count as one: by their mean.
        """
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return [float(value) / self.shape.tp for value in tensor.tolist()]

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

    def gather(self, values: list[T]) -> list[T]:
        """The values of all data-parallel ranks, one after the other, the same on each rank."""
        lists: list[list[T]] = [[] for _ in range(self.size)]
        dist.all_gather_object(lists, values)
        return [value for part in lists[:: self.size // self.dp_size] for value in part]

    def say(self, text: str) -> None:
        """Print once, not once per rank."""
        if self.is_main:
            print(text, flush=True)

    def barrier(self) -> None:
        dist.barrier()


@contextmanager
def join(member: Member, mesh: MeshConfig, *, deterministic: bool) -> Iterator[World]:
    """The process group and its mesh, on this rank's GPU where there is one, else on CPUs with gloo.

    ConfigError where there are more ranks than GPUs. On an error of one of several ranks the group is left as
    it is: ending it waits for the others, and these wait for this one. Its process has to end.
    """
    shape = MeshShape.of(mesh, size=member.size)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if member.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"rank {member.local_rank} of this machine has no GPU of its own: expected as many GPUs as "
                f"ranks, found torch.cuda.device_count() = {torch.cuda.device_count()}; start as many ranks"
            )
        device = torch.device("cuda", member.local_rank)
        torch.cuda.set_device(device)
    _set_deterministic(deterministic)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    given = dist.is_initialized()  # by Ray Train, which also ends it
    if given:
        pass
    elif member.store is None:
        dist.init_process_group(backend, timeout=PATIENCE)
    else:
        dist.init_process_group(
            backend, store=member.store, rank=member.rank, world_size=member.size, timeout=PATIENCE
        )
    known: dict[MeshShape, World] = {}
    known[shape] = _world(member.rank, member.size, device, shape, known=known)
    ended_well = False
    try:
        yield known[shape]
        ended_well = True
    finally:
        if not given and (ended_well or member.size == 1):
            dist.destroy_process_group()


def _world(
    rank: int, size: int, device: torch.device, shape: MeshShape, *, known: dict[MeshShape, World]
) -> World:
    """Ranks that talk most are neighbours: tensor-parallel peers first, then those that share a pack."""
    full = init_device_mesh(
        device.type,
        (shape.dp_replicate, shape.dp_shard * shape.sp, shape.tp),
        mesh_dim_names=("dp_replicate", "dp_shard", "tp"),
    )
    sequence = None
    if shape.sp > 1:
        peers = init_device_mesh(
            device.type,
            (shape.dp_replicate * shape.dp_shard, shape.sp, shape.tp),
            mesh_dim_names=("dp", "sp", "tp"),
        )
        sequence = SequenceParallel(peers.get_local_rank("sp"), shape.sp, peers.get_group("sp"))
    return World(
        rank=rank,
        size=size,
        device=device,
        shape=shape,
        # A mesh of two dimensions means HSDP to fully_shard; without replicas plain FSDP is meant.
        mesh=full["dp_replicate", "dp_shard"] if shape.dp_replicate > 1 else full["dp_shard"],
        tp_mesh=full["tp"] if shape.tp > 1 else None,
        sp=sequence,
        known=known,
    )


def _set_deterministic(enabled: bool) -> None:
    torch.use_deterministic_algorithms(enabled)
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        # Filling fresh memory with NaN finds reads of it, at the price of a pass over every tensor.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
