"""The numbers of a stage's steps: what every rank saw of a step in; the record of the whole step out.

The first rank writes it, but all take part: one sum over the ranks makes the numbers of all from those of
each, and tells in passing whether any rank is to stop. The trade-off: what is not summed (time, waiting,
memory) is the first rank's alone.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

import torch

from schemas.train_config import StageConfig, TrainConfig
from trainer.curriculum import budget_of, slots_of, total_steps
from trainer.feed import StepData
from trainer.flops import device_peak
from trainer.loader import Loader
from trainer.metrics import Metrics, StepRecord, duration_sums, loss_by_duration, memory_gb
from trainer.model import PackedModel
from trainer.parallel import World

_RECENT = 20
"""Steps whose mean duration stands for those to come."""


class StepLog:
    """Writes the records of one stage's steps; every rank has one."""

    def __init__(
        self,
        config: TrainConfig,
        stage: StageConfig,
        model: PackedModel,
        *,
        loader: Loader,
        metrics: Metrics | None,
        world: World,
    ) -> None:
        """`metrics` on rank 0; `world` under the stage's mesh."""
        self._stage, self._loader, self._metrics, self._world = stage.name, loader, metrics, world
        self._total = total_steps(config.stages)
        self._room = slots_of(stage, config.data) * budget_of(stage, config.data)
        self._peak = device_peak(world.device, getattr(torch, config.precision.param))
        counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
        self._trained = sum(count for count, trained in counts if trained) / sum(count for count, _ in counts)
        self._durations_s: deque[float] = deque(maxlen=_RECENT)
        self._unreadable, self._counted = 0, 0.0

    def add(
        self,
        step: int,
        data: StepData,
        *,
        loss: torch.Tensor,
        clip_errors: Sequence[float],
        grad_norm: float,
        lr: float,
        started: float,
        waited_s: float,
        told: bool,
    ) -> bool:
        """Record a step, all ranks together; whether any of them is `told` to stop.

        `step` counts this one too; `loss` [] is the share of this rank's packs, `clip_errors` the error of
        each of their clips; `started`: when, by `time.perf_counter`.
        """
        found = zip(data.segments, clip_errors, strict=True)
        read = [(clip.seconds, error) for clip, error in found if clip.weight > 0]
        by_duration = duration_sums([seconds for seconds, _ in read], [error for _, error in read])
        flops = data.flops.training(trained=self._trained) / self._world.shape.sp
        lost = len(self._loader.unreadable.samples)
        whole_loss, any_told, flops, lost_by_rank, *by_duration = self._world.sum(
            [float(loss), told, flops, lost, *by_duration]
        )
        if lost_by_rank > self._counted:  # some rank found more: those of all ranks together, each once
            self._counted = lost_by_rank
            unreadable = self._loader.unreadable
            self._unreadable = unreadable.together(self._world.gather(unreadable.found()))
        seconds = time.perf_counter() - started
        self._durations_s.append(seconds)
        if self._metrics:
            record = StepRecord(
                step=step,
                stage=self._stage,
                loss=whole_loss,
                grad_norm=grad_norm,
                lr=lr,
                tokens=data.weights.num_tokens,
                tokens_per_s=data.weights.num_tokens / seconds,
                fill=data.weights.num_tokens / self._room,
                data_wait=waited_s / seconds,
                seconds=seconds,
                eta_s=(self._total - step) * sum(self._durations_s) / len(self._durations_s),
                mfu=flops / seconds / (self._peak * self._world.size) if self._peak else None,
                memory_gb=memory_gb(self._world.device),
                loss_by_duration=loss_by_duration(by_duration),
                unreadable=self._unreadable,
            )
            self._metrics.log(record)
        return any_told > 0
