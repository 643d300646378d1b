"""The loader: a step number in, this rank's packs of that step out.

    catalog (what there is) -> curriculum (how much of each clip) -> plan (which clips share a pack,
    which packs a step) -> reader (bytes) -> packs

Its whole state is the step number: any step, asked for in any order, at any world size that divides
`data.slots`, gives the same clips with the same posterior draws. Steps asked for in sequence are read
ahead by one thread; reading, checksums and draws release the interpreter's lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from types import TracebackType

import numpy as np

from schemas.bucket import PATCH
from schemas.config import StageConfig, TrainConfig
from schemas.errors import ConfigError
from schemas.load import digest_of
from trainer.catalog import Catalog
from trainer.curriculum import prefix_frames, stage_at, total_steps
from trainer.packing import Pack
from trainer.plan import PLAN_VERSION, PackPlan, Plan, Step, rank_share
from trainer.reader import SampleReader


@dataclass(frozen=True)
class StepWeights:
    """Sizes of one step over all ranks, known from the plan: what a loss is divided by."""

    num_clips: int
    num_video_tokens: int


class Loader:
    """Packs of any step; `rank` and `world_size` count data-parallel ranks only. A context manager."""

    def __init__(self, dataset: Path, *, config: TrainConfig, rank: int = 0, world_size: int = 1) -> None:
        _check_slots(config.data.slots, world_size)
        self._catalog = Catalog(dataset)
        self.card = self._catalog.card
        self.prompt_width = int(self._catalog.prompt_shapes[0, 1])
        self._stages = config.stages
        self._stage_data = {stage.name: StageData(self._catalog, stage, config) for stage in config.stages}
        self._rank, self._world_size = rank, world_size
        self._reader = SampleReader(self._catalog)
        # The reading thread and the training thread ask for the same steps, a few apart: the cache keeps
        # the plan from going back over an epoch's end for the later of the two.
        self._plan_lock = Lock()
        self._planned = lru_cache(maxsize=config.data.prefetch + 4)(self._plan_step)
        self._prefetch = config.data.prefetch
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._pending: deque[Future[Pack]] = deque()
        ...
