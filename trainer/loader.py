"""The loader: a step number in, this rank's packs of that step out.

    mixture (what there is) -> stage plan (how much of each clip, with which caption) -> plan (which clips
    share a pack, which packs a step) -> reader (bytes) -> packs

Its whole state is the step number: any step, asked for in any order, at any world size that divides the
slots, gives the same clips with the same draws. Steps asked for in sequence are read ahead by
`data.readers` threads; reading, checksums and draws release the interpreter's lock.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from types import TracebackType
from typing import Literal

import numpy as np
import torch

from schemas.errors import ConfigError
from schemas.load import digest_of
from schemas.train_config import StageConfig, TrainConfig
from schemas.windows import durations
from trainer.architecture import Architecture
from trainer.catalog import Catalog
from trainer.curriculum import slots_of, stage_at, total_steps
from trainer.frame_weights import FrameWeights
from trainer.mixture import Mixture
from trainer.packing import Pack, Segment, StepWeights
from trainer.parallel import MeshShape, World
from trainer.plan import Step, rank_share
from trainer.reader import SampleReader, Unreadable
from trainer.stage_plan import Read, StagePlan, counted

Share = tuple[int, int]
"""Data-parallel rank and size."""


class Loader:
    """Packs of any step; a context manager."""

    def __init__(
        self,
        catalog: Catalog | Mixture,
        *,
        config: TrainConfig,
        patch_t: int = 1,
        images: bool = False,
        local_frames: int = 0,
        text: Literal["joint", "cross"] = "joint",
        rank: int = 0,
        world_size: int = 1,
        shares: Mapping[str, Share] | None = None,
    ) -> None:
        """`patch_t` (2 for CogVideoX 1.5) and `local_frames`: latent frames per token and attention span of
        the model; `images`: it takes an image condition; `text`: "cross" where it keeps prompts out of its
        stream. `rank` and `world_size` count data-parallel ranks only, `shares` are those of stages with a
        mesh of their own, by name.

        ConfigError where a stage asks for what the samples, the budget or the ranks cannot give.
        """
        self.mixture = catalog if isinstance(catalog, Mixture) else Mixture([catalog])
        self.card = self.mixture.card
        self._config = config
        self._shares = {stage.name: (rank, world_size) for stage in config.stages} | dict(shares or {})
        for stage in config.stages:
            _check_slots(stage, config, self._shares[stage.name][1])
        weights = FrameWeights(self.mixture, keyframe_lambda=config.loss.keyframe_lambda)
        self._plans = {
            stage.name: StagePlan(
                self.mixture,
                stage,
                config,
                weights=weights,
                patch_t=patch_t,
                local_frames=local_frames,
                images=images,
                text=text,
            )
            for stage in config.stages
        }
        # Reading ahead crosses into the next epoch while this one's last steps are still asked about;
        # remembering the steps in flight keeps the plan from going back and forth over that line.
        self._step_plan = lru_cache(maxsize=config.data.prefetch + 4)(self._plan_step)
        data = config.data
        meshes = [stage.mesh or config.mesh for stage in config.stages]
        shared = any(mesh.sp * mesh.tp > 1 for mesh in meshes)
        self.unreadable = Unreadable(data.max_unreadable, shared=shared)
        self._readers = [
            SampleReader(
                each, images=images, unreadable=self.unreadable, cache=data.cache, cache_gb=data.cache_gb
            )
            for each in self.mixture.catalogs
        ]
        self._pool = ThreadPoolExecutor(data.readers, thread_name_prefix="read-ahead")
        self._requests: Iterator[list[Read]] = iter(())
        self._pending: deque[Future[Pack]] = deque()
        self._next_step: int | None = None

    def packs(self, step: int) -> list[Pack]:
        """This rank's packs, slots / data-parallel size, of global `step` (counted over all stages)."""
        stage, _ = stage_at(step, self._config.stages)  # refuses a step outside the run
        if step != self._next_step:
            self._seek(step)
        self._next_step = None  # stays so where reading fails: the next call then starts afresh
        count = slots_of(stage, self._config.data) // self._shares[stage.name][1]
        packs = [self._next_pack() for _ in range(count)]
        self._next_step = step + 1
        return packs

    def step_weights(self, step: int) -> StepWeights:
        """Sizes of `step` over the packs of all ranks."""
        stage, packs = self._step_plan(step)
        return self._plans[stage.name].step_weights(packs)

    def latent_shapes(self) -> set[tuple[int, int, int]]:
        """T, H, W of the windows that any stage trains on, or holds out for looks."""
        return set().union(*(plan.latent_shapes for plan in self._plans.values()))

    def held_out(self, stage: str, limit: int) -> list[list[Read]]:
        """At most `limit` clips that are never trained on, as `stage` sees them, in packs: the same on every
        rank, with the same keys in every run. Where validation.share is 0, clips that are trained on."""
        return self._plans[stage].validation_reads(limit)

    def read(self, clips: Sequence[Read]) -> Pack:
        """Clips as one pack, read by all threads."""
        return Pack(tuple(self._pool.map(self._segment, clips)))

    def prompt(self, clip: Read) -> torch.Tensor | None:
        """The caption [S, D] of a clip alone; None where it cannot be read."""
        dataset, visit = clip
        return self._readers[dataset].prompt(visit)

    def plan_digest(self, stage: str) -> str:
        """Equal digests mean equal steps of a stage; in checkpoints, to notice a changed dataset."""
        return self._plans[stage].digest()

    def digest(self) -> str:
        """Equal on ranks whose steps and held-out clips are the same in all stages."""
        held_out = [self.mixture.row_hashes[plan.is_held_out] for plan in self._plans.values()]
        state = hashlib.sha256(np.concatenate(held_out).tobytes()).hexdigest()
        return digest_of([state, *(plan.digest() for plan in self._plans.values())])

    def describe(self) -> str:
        """A few lines for the log: what there is to train on, and what each stage makes of it."""
        several = len(self.mixture.catalogs) > 1
        lines = []
        for catalog, weight in zip(self.mixture.catalogs, self.mixture.weights, strict=True):
            frames = catalog.card.settings.frames
            seconds = durations(catalog.pts_s, catalog.pts_offsets, fps=catalog.fps, frames=frames).sum()
            lines.append(
                (f"{catalog.dataset}, {float(weight):g} times an epoch: " if several else "")
                + f"{counted(len(catalog), 'sample')}, {seconds:.1f} s of video, "
                + counted(int(catalog.shards[-1]) + 1, "shard")
            )
        return "\n".join([*lines, *(line for plan in self._plans.values() for line in plan.describe())])

    def close(self) -> None:
        """Stop reading ahead and close all files."""
        self._pool.shutdown(cancel_futures=True)
        for reader in self._readers:
            reader.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _plan_step(self, step: int) -> tuple[StageConfig, Step]:
        stage, step_in_stage = stage_at(step, self._config.stages)
        return stage, self._plans[stage.name].step(step_in_stage)

    def _seek(self, step: int) -> None:
        for pending in self._pending:
            pending.cancel()
        self._pending.clear()
        self._requests = self._requests_from(step)

    def _requests_from(self, step: int) -> Iterator[list[Read]]:
        for later in range(step, total_steps(self._config.stages)):
            stage, packs = self._step_plan(later)
            rank, world_size = self._shares[stage.name]
            for pack in rank_share(packs, rank=rank, world_size=world_size):
                yield self._plans[stage.name].reads(pack)

    def _next_pack(self) -> Pack:
        prefetch = self._config.data.prefetch
        if prefetch == 0:
            return self._read(next(self._requests))
        while len(self._pending) <= prefetch and (request := next(self._requests, None)):
            self._pending.append(self._pool.submit(self._read, request))
        return self._pending.popleft().result()

    def _read(self, reads: list[Read]) -> Pack:
        return Pack(tuple(map(self._segment, reads)))

    def _segment(self, read: Read) -> Segment:
        dataset, visit = read
        return self._readers[dataset].segment(visit)


def open_loader(config: TrainConfig, mixture: Mixture, *, architecture: Architecture, world: World) -> Loader:
    """This rank's loader of a run, for a model of `architecture`."""
    return Loader(
        mixture,
        config=config,
        patch_t=architecture.layout.patch_t,
        images=architecture.layout.image,
        local_frames=architecture.layout.local_frames,
        text=architecture.layout.text,
        shares={stage.name: _share(stage, config, world) for stage in config.stages},
    )


def _share(stage: StageConfig, config: TrainConfig, world: World) -> Share:
    """This rank's under a stage's mesh; as alone in it where the ranks do not make that mesh."""
    mesh = stage.mesh or config.mesh
    try:
        shape = MeshShape.of(mesh, size=world.size)
    except ConfigError:  # a stage that is over, or one that says so when it begins
        return 0, mesh.dp_replicate * mesh.dp_shard
    return shape.dp_rank(world.rank), shape.dp_size


def _check_slots(stage: StageConfig, config: TrainConfig, world_size: int) -> None:
    slots = slots_of(stage, config.data)
    if slots % world_size:
        name = "data.slots" if stage.slots is None else f"slots of stage {stage.name!r}"
        above = -(-slots // world_size) * world_size
        ranks = [str(n) for n in range(1, slots + 1) if slots % n == 0]
        raise ConfigError(
            f"{name} = {slots}: expected a multiple of the {world_size} data-parallel ranks; "
            f"run on {' or '.join(ranks)} ranks, or set {name} to {above} in a run that has not begun"
        )
