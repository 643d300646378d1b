"""The global plan: token counts of all samples in, the packs of any step out, the same on every rank.

A pure function of (fingerprint, seed, stage, epoch) and the samples' lengths: nothing to save, nothing
to send. Every epoch packs every sample once; packs that do not fill a step are carried into the next
epoch's steps, so none is dropped or doubled. The price: step k is found by planning all epochs before
it (two to three seconds per million samples); an epoch is planned lazily while it is trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from trainer.order import key_of, keyed_order, permutation
from trainer.packing import iter_packs

PLAN_VERSION = 2
"""Part of every plan digest; raised when the same inputs would give other steps."""

BALANCE_PACKS = 128
"""Packs whose order is given up so that the packs of one step cost about the same: 93-98 % of 8 ranks
busy for curriculum, log-normal and uniform lengths, against 61-83 % for packs as they come."""

_LINEAR_COST = 6 * 3072
"""Attention costs 4 * l^2 * D FLOPs a layer, the rest 24 * l * D^2: in units of 4 * D, l^2 + 6 * D * l.
D is CogVideoX-5B's; it only decides which of two packs counts as the dearer."""


@dataclass(frozen=True)
class PackPlan:
    """One pack before it is read: rows of the catalog, and the epoch that asked for them."""

    epoch: int
    rows: tuple[int, ...]


Step = list[PackPlan]


class Plan:
    """The steps of one stage. Not thread-safe."""

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        shard_sizes: Sequence[int],
        key: Sequence[str | int],
        capacity: int,
        slots: int,
    ) -> None:
        """`lengths` [n] are tokens a sample, shard by shard; `key` names dataset, stage and seed."""
        self._lengths = lengths
        self._shard_sizes = shard_sizes
        self._key = tuple(key)
        self._capacity = capacity
        self._slots = slots
        # What each epoch starts from; later ones are appended as they are reached.
        self._starts: list[tuple[int, Step]] = [(0, [])]
        self._open(0)

    def step(self, step: int) -> Step:
        """The `slots` packs of a step of this stage, dearest first; any step, in any order."""
        if step < self._starts[self._epoch][0]:
            self._open(max(e for e, (first, _) in enumerate(self._starts) if first <= step))
        while (at := step - self._starts[self._epoch][0]) >= len(self._steps):
            planned = next(self._source, None)
            if planned is None:
                self._next_epoch()
            else:
                self._steps.append(planned)
        return self._steps[at]

    def epoch_size(self) -> tuple[int, float]:
        """Packs an epoch takes and how full they are (0..1), extrapolated from the first 1024."""
        packs = list(islice(self._packs(0), 1024))
        tokens = sum(int(self._lengths[list(pack.rows)].sum()) for pack in packs)
        share = tokens / int(self._lengths.sum())
        return round(len(packs) / share), tokens / (len(packs) * self._capacity)

    def _open(self, epoch: int) -> None:
        self._epoch = epoch
        self._steps: list[Step] = []
        self._carry: Step = []
        self._source = self._epoch_steps(epoch, self._starts[epoch][1])

    def _next_epoch(self) -> None:
        if self._epoch + 1 == len(self._starts):
            first = self._starts[self._epoch][0] + len(self._steps)
            self._starts.append((first, self._carry))
        self._open(self._epoch + 1)

    def _epoch_steps(self, epoch: int, carry: Step) -> Iterator[Step]:
        """The epoch's steps; what is left for the next one goes to `self._carry`."""
        window = max(1, BALANCE_PACKS // self._slots) * self._slots
        pending = list(carry)
        for number, pack in enumerate(self._packs(epoch)):
            pending.append(pack)
            if len(pending) == window:
                yield from self._balance(pending, key_of(*self._key, epoch, "steps", number))
                pending = []
        whole = len(pending) // self._slots * self._slots
        yield from self._balance(pending[:whole], key_of(*self._key, epoch, "steps"))
        self._carry = pending[whole:]

    def _packs(self, epoch: int) -> Iterator[PackPlan]:
        rows = keyed_order(self._shard_sizes, key=key_of(*self._key, epoch, "samples"))
        # A memoryview yields Python ints one at a time, without a list of the whole epoch.
        for pack in iter_packs(memoryview(self._lengths[rows]), capacity=self._capacity):
            yield PackPlan(epoch, tuple(rows[pack].tolist()))

    def _balance(self, packs: Step, key: int) -> Iterator[Step]:
        """Group packs of like cost into steps, then shuffle the steps: cheap ones must not come first."""
        packs = sorted(packs, key=self._cost, reverse=True)
        for number in permutation(len(packs) // self._slots, key=key):
            yield packs[number * self._slots : (number + 1) * self._slots]

    def _cost(self, pack: PackPlan) -> int:
        return sum(length * (length + _LINEAR_COST) for length in self._lengths[list(pack.rows)].tolist())


def rank_share(step: Step, *, rank: int, world_size: int) -> Step:
    """The packs of a rank. Ranks run their i-th packs at the same time, so those are neighbours in cost."""
    return step[rank::world_size]
