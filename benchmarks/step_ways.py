"""What the step benchmark compares: settings in; the clips of every micro-batch of every way to train out.

Clips are made up, the curriculum's lengths in equal shares, and every way trains on the same ones: `packed`
as the trainer packs them; `pad to longest` and `pad in batch` with as many clips in a batch as the budget
holds of the longest, padded to the longest of all or of their batch; `batch 1` a clip at a time. It is
arithmetic alone.
"""

from __future__ import annotations

import random
from typing import Annotated, Literal

from pydantic import Field

from schemas.bucket import PATCH
from schemas.config import Positive, PositiveFloat, Settings, Text
from trainer.packing import plan_packs

FPS, TEMPORAL, SPATIAL = 8, 4, 8
"""Of the clips, and of the encoder they would have come through."""
PACKED, PADDED, IN_BATCH, ONE = "packed", "pad to longest", "pad in batch", "batch 1"
Pixels = Annotated[int, Field(gt=0, multiple_of=SPATIAL * PATCH)]


class StepSettings(Settings):
    """What is measured."""

    model: Text
    """One of `benchmarks.models`."""
    durations_s: Annotated[tuple[PositiveFloat, ...], Field(min_length=1, strict=False)]
    height: Pixels
    width: Pixels
    prompt_tokens: Positive
    budget: Positive
    """Tokens of a pack, in units of the longest clip."""
    packs: Positive
    """Per rank and step, about."""
    dtype: Literal["float32", "bfloat16"]
    attention: Literal["auto", "flash_attn_3", "varlen", "flash_attn_2", "flex", "sdpa"] = "auto"
    recompute: Literal["none", "attention", "feed_forward", "block"] = "none"
    compile: bool = False
    layers: Positive | None = None
    """In place of the model's own number."""
    reps: Positive = 5
    saves: Positive = 3
    dataset: str = ""
    """To measure waiting for data on."""
    loader_steps: Positive = 30

    def frames(self, seconds: float) -> int:
        """Latent frames of a clip."""
        return int(seconds * FPS) // TEMPORAL + 1

    def tokens(self, seconds: float) -> int:
        """Video and prompt tokens of a clip."""
        side = SPATIAL * PATCH
        return self.frames(seconds) * (self.height // side) * (self.width // side) + self.prompt_tokens


Clip = tuple[float, float]
"""Its seconds, and those it is padded to."""
Way = list[list[Clip]]
"""Micro-batches of one rank, a forward and backward pass each."""


def plan_ways(settings: StepSettings, *, rank: int, ranks: int) -> dict[str, Way]:
    """The micro-batches of a rank: the same clips for every way, of each duration as many, but for those few
    that ranks cannot share. Where all clips are of one length there is nothing to pad."""
    longest = max(map(settings.tokens, settings.durations_s))
    once = sum(map(settings.tokens, settings.durations_s))
    wanted = settings.packs * ranks
    repeats = max(1, round(wanted * settings.budget * longest / once))
    seconds = list(settings.durations_s) * repeats
    random.Random(0).shuffle(seconds)
    planned = plan_packs(map(settings.tokens, seconds), capacity=settings.budget * longest)
    packs = [[seconds[i] for i in pack] for pack in planned]
    packs.sort(key=lambda pack: sum(settings.tokens(s) ** 2 for s in pack), reverse=True)
    # As many passes on every rank: FSDP gathers weights in each.
    packs = packs[: len(packs) // ranks * ranks]
    clips = [s for pack in packs for s in pack]
    random.Random(1).shuffle(clips)
    batches = [clips[i : i + settings.budget] for i in range(0, len(clips), settings.budget)]
    ways = {PACKED: [[(s, s) for s in pack] for pack in packs]}
    if len(set(settings.durations_s)) > 1:
        ways |= {
            PADDED: [[(s, max(settings.durations_s)) for s in batch] for batch in batches],
            IN_BATCH: [[(s, max(batch)) for s in batch] for batch in batches],
        }
    ways |= {
        # Those that run at the same time are of about the same length, as packs of one step are.
        ONE: [[(s, s)] for s in sorted(clips, reverse=True)],
    }
    return {name: way[: len(way) // ranks * ranks][rank::ranks] for name, way in ways.items()}
