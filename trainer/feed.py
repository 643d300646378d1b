"""The feed: the steps of a stage in; each step's batches out, made by a thread while the step before runs.

Noising, collating, splitting and pinning take the host's time, which the device would wait for. The
trade-off: the batches of one more step are held in host memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

from trainer.architecture import Architecture
from trainer.batch import Batch, prepare
from trainer.flops import Flops, PackShape, pack_flops
from trainer.loader import Loader
from trainer.objective import Objective
from trainer.packing import Segment, StepWeights
from trainer.parallel import World


@dataclass(frozen=True, eq=False)
class StepData:
    """What one rank needs for one step."""

    batches: list[Batch]
    """On the host, one per pack; of the inputs only what this rank computes."""
    segments: list[Segment]
    """Clips of all packs, in their order."""
    weights: StepWeights
    """Sizes of the step over all ranks."""
    flops: Flops
    """Of a forward pass over this rank's packs, whole."""


def feed(
    loader: Loader,
    *,
    steps: range,
    architecture: Architecture,
    objective: Objective,
    world: World,
    ahead: bool,
) -> Iterator[StepData]:
    """The data of each of `steps`, which lie in one stage; one step ahead of who asks where `ahead`."""
    layout = architecture.layout

    def make(step: int) -> StepData:
        packs = loader.packs(step)
        batches = [prepare(pack, objective=objective, layout=layout) for pack in packs]
        flops = sum(
            (pack_flops(architecture, PackShape.of(batch.inputs)) for batch in batches), Flops(0.0, 0.0)
        )
        if world.sp is not None:
            batches = [replace(batch, inputs=world.sp.split(batch.inputs)) for batch in batches]
        return StepData(
            batches=[batch.pinned() for batch in batches] if world.device.type == "cuda" else batches,
            segments=[segment for pack in packs for segment in pack.segments],
            weights=loader.step_weights(step),
            flops=flops,
        )

    if not ahead:
        yield from map(make, steps)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="feed") as thread:
        pending: Future[StepData] | None = None
        for step in steps:
            data = pending.result() if pending else make(step)
            pending = thread.submit(make, step + 1) if step + 1 in steps else None
            yield data
