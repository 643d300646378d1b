"""The loader: a step number in, this rank's packs of that step out.

    catalog (what there is) -> curriculum (how much of each clip) -> plan (which clips share a pack,
    which packs a step) -> reader (bytes) -> packs

Its whole state is the step number: any step, asked for in any order, at any world size that divides
`data.slots`, gives the same clips with the same posterior draws. Steps asked for in sequence are read
ahead by one thread; reading, checksums and draws release the interpreter's lock.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from types import TracebackType

import numpy as np

from schemas.bucket import PATCH
from schemas.errors import ConfigError
from schemas.load import digest_of
from schemas.train_config import StageConfig, TrainConfig
from schemas.windows import prefix_frames
from trainer.catalog import Catalog
from trainer.curriculum import stage_at, total_steps
from trainer.packing import Pack
from trainer.plan import PLAN_VERSION, PackPlan, Plan, Step, rank_share
from trainer.reader import SampleReader


@dataclass(frozen=True)
class StepWeights:
    """Sizes of one step over all ranks, known from the plan: what a loss is divided by."""

    num_clips: int
    num_video_tokens: int
    num_tokens: int
    """Video and prompt tokens."""


@dataclass(frozen=True)
class StagePlan:
    """One stage: how much of every sample it uses, and its steps."""

    latent_frames: np.ndarray
    video_tokens: np.ndarray
    tokens: np.ndarray
    """Video and prompt tokens."""
    plan: Plan


class Loader:
    """Packs of any step; `rank` and `world_size` count data-parallel ranks only. A context manager."""

    def __init__(
        self, catalog: Catalog, *, config: TrainConfig, patch_t: int = 1, rank: int = 0, world_size: int = 1
    ) -> None:
        """`patch_t`: latent frames per token of the model, 2 for CogVideoX 1.5."""
        _check_slots(config.data.slots, world_size)
        self.catalog = catalog
        self.card = catalog.card
        self._config, self._rank, self._world_size = config, rank, world_size
        self._plans = {stage.name: _plan_stage(catalog, stage, config, patch_t) for stage in config.stages}
        # Reading ahead crosses into the next epoch while this one's last steps are still asked about;
        # remembering the steps in flight keeps the plan from going back and forth over that line.
        self._step_plan = lru_cache(maxsize=config.data.prefetch + 4)(self._plan_step)
        self._reader = SampleReader(self.catalog)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._requests: Iterator[tuple[StageConfig, PackPlan]] = iter(())
        self._pending: deque[Future[Pack]] = deque()
        self._next_step: int | None = None

    def packs(self, step: int) -> list[Pack]:
        """data.slots / world_size packs of this rank, for global `step` (counted over all stages)."""
        stage_at(step, self._config.stages)  # refuses a step outside the run
        if step != self._next_step:
            self._seek(step)
        self._next_step = None  # stays so where reading fails: the next call then starts afresh
        packs = [self._next_pack() for _ in range(self._config.data.slots // self._world_size)]
        self._next_step = step + 1
        return packs

    def step_weights(self, step: int) -> StepWeights:
        """Clips and video tokens of `step` over the packs of all ranks."""
        stage, packs = self._step_plan(step)
        rows = [row for pack in packs for row in pack.rows]
        plan = self._plans[stage.name]
        return StepWeights(len(rows), int(plan.video_tokens[rows].sum()), int(plan.tokens[rows].sum()))

    def plan_digest(self, stage: str) -> str:
        """Equal digests mean equal steps of a stage; in checkpoints, to notice a changed dataset."""
        data = self._config.data
        lengths = hashlib.sha256(self._plans[stage].tokens.tobytes()).hexdigest()
        key = [self.catalog.digest(), self._config.seed, data.budget_tokens, data.slots, stage, lengths]
        return digest_of([PLAN_VERSION, *key])

    def describe(self) -> str:
        """A few lines for the log: what there is to train on, and what each stage makes of it."""
        offsets, pts_s = self.catalog.pts_offsets, self.catalog.pts_s
        seconds = float((pts_s[offsets[1:] - 1] - pts_s[offsets[:-1]]).sum())
        lines = [
            f"{len(self.catalog)} samples, {seconds:.1f} s of video, {len(self.catalog.shard_sizes)} shards"
        ]
        for name, stage in self._plans.items():
            packs, fill = stage.plan.epoch_size()
            lines.append(
                f"stage {name}: {stage.tokens.min()} to {stage.tokens.max()} tokens a sample, {packs} packs "
                f"({packs / self._config.data.slots:.1f} steps) an epoch, {fill:.1%} full"
            )
        return "\n".join(lines)

    def close(self) -> None:
        """Stop reading ahead and close all files."""
        self._pool.shutdown(cancel_futures=True)
        self._reader.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _plan_step(self, step: int) -> tuple[StageConfig, Step]:
        stage, step_in_stage = stage_at(step, self._config.stages)
        return stage, self._plans[stage.name].plan.step(step_in_stage)

    def _seek(self, step: int) -> None:
        for pending in self._pending:
            pending.cancel()
        self._pending.clear()
        self._requests = self._requests_from(step)

    def _requests_from(self, step: int) -> Iterator[tuple[StageConfig, PackPlan]]:
        for later in range(step, total_steps(self._config.stages)):
            stage, packs = self._step_plan(later)
            for pack in rank_share(packs, rank=self._rank, world_size=self._world_size):
                yield stage, pack

    def _next_pack(self) -> Pack:
        prefetch = self._config.data.prefetch
        if prefetch == 0:
            return self._read(*next(self._requests))
        while len(self._pending) <= prefetch and (request := next(self._requests, None)):
            self._pending.append(self._pool.submit(self._read, *request))
        return self._pending.popleft().result()

    def _read(self, stage: StageConfig, pack: PackPlan) -> Pack:
        latent_frames = self._plans[stage.name].latent_frames
        catalog, seed = self.catalog, self._config.seed
        return Pack(
            tuple(
                self._reader.segment(
                    row,
                    latent_frames=int(latent_frames[row]),
                    key=f"{seed}/{stage.name}/{pack.epoch}/{catalog.sample_id(row)}/{catalog.caption_digest(row)}",
                )
                for row in pack.rows
            )
        )


def _check_slots(slots: int, world_size: int) -> None:
    if slots % world_size:
        above = -(-slots // world_size) * world_size
        ranks = [str(n) for n in range(1, slots + 1) if slots % n == 0]
        raise ConfigError(
            f"data.slots = {slots}: expected a multiple of the {world_size} data-parallel ranks; "
            f"set data.slots to {above}, or run on {' or '.join(ranks)} ranks"
        )


def _plan_stage(catalog: Catalog, stage: StageConfig, config: TrainConfig, patch_t: int) -> StagePlan:
    """Windows, token counts and plan of a stage; ConfigError where a sample does not fit a pack."""
    shapes = catalog.shapes
    latent_frames = shapes[:, 0]
    if stage.max_s is not None:
        geometry = catalog.card.geometry
        num_frames = prefix_frames(
            catalog.pts_s,
            catalog.pts_offsets,
            fps=catalog.fps,
            max_s=stage.max_s,
            frames=catalog.card.settings.frames,
            geometry=geometry,
        )
        counts, of_row = np.unique(num_frames, return_inverse=True)
        latent_frames = np.array([geometry.latent_frames(count) for count in counts.tolist()])[of_row]
    # A clip is filled up to whole patches in time, see fill_patches.
    patches = -(-latent_frames // patch_t)
    video_tokens = patches * (shapes[:, 2] // PATCH) * (shapes[:, 3] // PATCH)
    tokens = video_tokens + catalog.prompt_shapes[:, 0]
    budget = config.data.budget_tokens
    longest = int(tokens.argmax())
    if tokens[longest] > budget:
        raise ConfigError(
            f"data.budget_tokens = {budget}: sample {catalog.sample_id(longest)} alone needs "
            f"{tokens[longest]} tokens in stage {stage.name!r} ({video_tokens[longest]} video, "
            f"{catalog.prompt_shapes[longest, 0]} prompt); set data.budget_tokens to {tokens[longest]} or "
            "more, or the stage's max_s lower"
        )
    plan = Plan(
        tokens,
        shard_sizes=catalog.shard_sizes.tolist(),
        key=(catalog.card.fingerprint, stage.name, config.seed),
        capacity=budget,
        slots=config.data.slots,
    )
    return StagePlan(latent_frames, video_tokens, tokens, plan)
