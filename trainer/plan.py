"""The global plan: what each epoch visits in, the packs of any step out, the same on every rank.

A pure function of its key and the visits: nothing to save, nothing to send. Every epoch packs each of its
visits once; packs that do not fill a step are carried into the next epoch's steps, so none is dropped or
doubled. The price: step k is found by planning all epochs before it (three to five seconds per million
visits, and a tenth of a millisecond for each epoch); an epoch is planned lazily while it is trained on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, count, islice
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from trainer.mixture import Visits
from trainer.order import key_of, permutation
from trainer.packing import iter_packs

PLAN_VERSION = 3
"""Part of every plan digest; raised when the same inputs would give other steps."""

_KEPT = 16
"""Steps that are remembered behind the newest: going back further plans the epoch again."""

LINEAR_COST = 6 * 3072
"""Attention costs 4 * l^2 * D FLOPs a layer, the rest 24 * l * D^2: in units of 4 * D, l^2 + 6 * D * l.
D is CogVideoX-5B's; it only decides which of two packs counts as the dearer."""


class PackPlan(NamedTuple):
    """One pack before it is read."""

    epoch: int
    """That asked for it."""
    rows: tuple[int, ...]
    passes: tuple[int, ...]
    """As in `Visits`, one for each row."""
    cost: int
    """Of the work on it, in the plan's unit."""


Step = list[PackPlan]
Epochs = Callable[[int], tuple[Visits, np.ndarray]]
"""Number of an epoch -> its visits and the tokens [m] of each."""


class Plan:
    """The steps of one stage. Not thread-safe."""

    def __init__(
        self,
        epochs: Epochs,
        *,
        costs: np.ndarray,
        key: Sequence[str | int],
        capacity: int,
        slots: int,
        balance_packs: int,
    ) -> None:
        """`costs` [rows] is what the work on a row costs, in any unit; `key` names dataset, stage and seed.

        The order of `balance_packs` packs is given up so that the packs of a step cost about the same: 128
        keep 94-98 % of 8 ranks busy for curriculum, log-normal and uniform lengths, against 57-83 % for packs
        as they come.
        """
        self._epochs, self._costs, self._key = epochs, costs, tuple(key)
        self._capacity, self._slots = capacity, slots
        self.window = max(1, balance_packs // slots) * slots
        """Packs among which the order is given up: whole steps."""
        # What each epoch starts from; later ones are appended as they are reached.
        self._starts: list[tuple[int, Step]] = [(0, [])]
        self._open(0)

    def step(self, step: int) -> Step:
        """The `slots` packs of a step of this stage, dearest first; any step, in any order."""
        if step < self._starts[self._epoch][0] + self._made - len(self._steps):
            self._open(max(e for e, (first, _) in enumerate(self._starts) if first <= step))
        while (at := step - self._starts[self._epoch][0]) >= self._made:
            planned = next(self._source, None)
            if planned is None:
                self._next_epoch()
            else:
                self._steps.append(planned)
                self._made += 1
        return self._steps[at - self._made]

    def epoch_size(self) -> tuple[int, float]:
        """Packs an epoch takes and how full they are (0..1), extrapolated from the first 1024 packs of the
        first epoch that visits anything."""
        _, tokens = next(found for found in map(self._epochs, count()) if len(found[1]))
        packs = list(islice(iter_packs(_ints(tokens), capacity=self._capacity), 1024))
        used = int(sum(tokens[pack].sum() for pack in packs))
        return round(len(packs) * int(tokens.sum()) / used), used / (len(packs) * self._capacity)

    def _open(self, epoch: int) -> None:
        self._epoch = epoch
        self._steps: deque[Step] = deque(maxlen=_KEPT)
        self._made = 0
        self._carry: Step = []
        self._source = self._epoch_steps(epoch, self._starts[epoch][1])

    def _next_epoch(self) -> None:
        if self._epoch + 1 == len(self._starts):
            first = self._starts[self._epoch][0] + self._made
            self._starts.append((first, self._carry))
        self._open(self._epoch + 1)

    def _epoch_steps(self, epoch: int, carry: Step) -> Iterator[Step]:
        """The epoch's steps; what is left for the next one goes to `self._carry`."""
        pending = list(carry)
        for number, pack in enumerate(self._packs(epoch)):
            pending.append(pack)
            if len(pending) == self.window:
                yield from self._balance(pending, key_of(*self._key, epoch, "steps", number))
                pending = []
        whole = len(pending) // self._slots * self._slots
        yield from self._balance(pending[:whole], key_of(*self._key, epoch, "steps"))
        self._carry = pending[whole:]

    def _packs(self, epoch: int) -> Iterator[PackPlan]:
        visits, tokens = self._epochs(epoch)
        packs = iter_packs(_ints(tokens), capacity=self._capacity)
        while some := list(islice(packs, 128)):  # at once, which is cheaper than one by one
            ends = np.cumsum([len(pack) for pack in some])
            members = np.fromiter(chain.from_iterable(some), np.int64, int(ends[-1]))
            rows, passes = visits.rows[members], visits.passes[members]
            costs = np.diff(np.cumsum(self._costs[rows])[ends - 1], prepend=0).tolist()
            all_rows, all_passes, first = rows.tolist(), passes.tolist(), 0
            for end, cost in zip(ends.tolist(), costs, strict=True):
                yield PackPlan(epoch, tuple(all_rows[first:end]), tuple(all_passes[first:end]), cost)
                first = end

    def _balance(self, packs: Step, key: int) -> Iterator[Step]:
        """Group packs of like cost into steps, then shuffle the steps: cheap ones must not come first."""
        packs = sorted(packs, key=attrgetter("cost"), reverse=True)
        for number in permutation(len(packs) // self._slots, key=key):
            yield packs[number * self._slots : (number + 1) * self._slots]


def rank_share(step: Step, *, rank: int, world_size: int) -> Step:
    """The packs of a rank. Ranks run their i-th packs at the same time, so those are neighbours in cost."""
    return step[rank::world_size]


def _ints(values: np.ndarray) -> memoryview:
    """Yields Python ints one at a time, without a list of the whole epoch."""
    return memoryview(values)  # type: ignore[arg-type]
