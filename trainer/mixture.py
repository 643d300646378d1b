"""The mixture: several datasets in; one numbering of all their samples, and the order of visits to them, out.

A weight is how often an epoch visits each sample of a dataset, exactly: an epoch takes so many visits off the
dataset's endless order, which is one keyed order of all its samples after another (a *pass*). With 0.5 two
epochs make a pass, with 1.5 an epoch is a pass and half of the next. The trade-off: datasets whose latents or
prompts do not mean the same numbers are refused, never converted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from schemas.adoption import read_adoptions
from schemas.card import UNKNOWN, Card
from schemas.errors import ConfigError
from schemas.train_config import DatasetConfig
from trainer.catalog import Catalog
from trainer.inputs import inputs_of
from trainer.order import key_of, keyed_order, keyed_shares, permutation


class Mixture:
    """Samples of several catalogs, numbered catalog by catalog. ConfigError where they do not go together."""

    def __init__(self, catalogs: Sequence[Catalog], *, weights: Sequence[float] | None = None) -> None:
        self.catalogs = tuple(catalogs)
        # As written: 0.1 is a tenth, not the binary fraction next to it.
        self.weights = tuple(Fraction(str(weight)) for weight in weights or [1.0] * len(self.catalogs))
        first, *others = self.catalogs
        for other in others:
            if problems := [*_unlike(first, other)]:
                raise ConfigError(
                    f"datasets: {other.dataset} and {first.dataset} cannot be trained on together: "
                    + "; ".join(problems)
                )
        self.starts = np.concatenate([[0], np.cumsum([len(catalog) for catalog in self.catalogs])])
        """[datasets + 1]: dataset i has the rows starts[i] to starts[i + 1]."""

    @classmethod
    def of(cls, datasets: Sequence[DatasetConfig]) -> Mixture:
        """Opened as configured, see `TrainConfig.mixture`."""
        return cls([Catalog(each.path) for each in datasets], weights=[each.weight for each in datasets])

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def card(self) -> Card:
        """The first dataset's: what latents and prompts are is the same in all."""
        return self.catalogs[0].card

    def locate(self, row: int) -> tuple[int, int]:
        """(dataset, row of its catalog)."""
        dataset = int(np.searchsorted(self.starts, row, side="right")) - 1
        return dataset, row - int(self.starts[dataset])

    def sample_id(self, row: int) -> str:
        dataset, row = self.locate(row)
        return self.catalogs[dataset].sample_id(row)

    @cached_property
    def row_hashes(self) -> np.ndarray:
        """[n], as of the catalogs; so are the next two."""
        return np.concatenate([catalog.row_hashes for catalog in self.catalogs])

    @cached_property
    def clip_hashes(self) -> np.ndarray:
        return np.concatenate([catalog.clip_hashes for catalog in self.catalogs])

    @cached_property
    def source_hashes(self) -> np.ndarray:
        return np.concatenate([catalog.source_hashes for catalog in self.catalogs])


def _unlike(first: Catalog, other: Catalog) -> Iterator[str]:
    """What of the second dataset a model of the first one does not know, in words."""
    said = [(inputs_of(each.card), _adopted(each)) for each in (first, other)]
    for family in ("latents", "prompts"):
        (have, also), (want, too) = ((fields[family], adopted) for fields, adopted in said)
        for name in sorted((have.keys() | want.keys()) - {"image"}):
            old, new = have.get(name), want.get(name)
            one_has_images = name == "image_scaling" and None in (old, new)
            if old == new or UNKNOWN in (old, new) or one_has_images:
                continue
            if old not in too.get(name, ()) and new not in also.get(name, ()):
                yield f"{name} is {new!r} and {old!r}"
    if first.card.geometry != other.card.geometry:
        yield f"the encoders' geometry is {other.card.geometry} and {first.card.geometry}"
    widths = [int(each.prompt_shapes[0, 1]) for each in (first, other)]
    if widths[0] != widths[1]:
        yield f"prompts are {widths[1]} and {widths[0]} wide"


def _adopted(catalog: Catalog) -> dict[str, list[Any]]:
    """Field -> the values taken on beside the card's."""
    values: dict[str, list[Any]] = {}
    for record in read_adoptions(catalog.dataset):
        for name, (_, value) in record["fields"].items():
            values.setdefault(name, []).append(value)
    return values


class Visits(NamedTuple):
    """Who is visited in one epoch, in order."""

    rows: np.ndarray
    """int64 [m], of the mixture."""
    passes: np.ndarray
    """int64 [m]: which pass over its dataset a visit belongs to. A row comes once in a pass at most."""


class DatasetOrder:
    """The endless order of one dataset: visit by visit, pass after pass."""

    def __init__(
        self,
        rows: np.ndarray,
        *,
        shards: np.ndarray,
        weight: Fraction,
        key: int,
        clips: np.ndarray | None = None,
    ) -> None:
        """`rows` are what is visited, and `shards` the shard of each, ascending. With `clips`, a hash of the
        clip of each, a pass visits every clip once, with one caption: the first by lot, then they take turns.
        """
        self._rows, self._key = rows, key
        self._firsts = np.arange(len(rows))
        if clips is not None and len(rows):
            self._firsts = np.flatnonzero(np.append(True, clips[1:] != clips[:-1]))
        self._counts = np.diff(np.append(self._firsts, len(rows)))
        self._hashes = None if clips is None else clips[self._firsts]
        # A shard without any such row must not move the others.
        self._shard_sizes = np.unique(shards[self._firsts], return_counts=True)[1].tolist()
        self.visits = weight * len(self._firsts)
        """Of an epoch, on average."""

    def epoch(self, number: int) -> Visits:
        """What an epoch visits: none at all where the weight is small and the dataset too."""
        size = len(self._firsts)
        first, last = (int(epoch * self.visits) for epoch in (number, number + 1))
        rows, passes = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for turn in range(first // max(1, size), -(-last // max(1, size))):
            rows.append(self._pass(turn)[max(0, first - turn * size) : last - turn * size])
            passes.append(np.full(len(rows[-1]), turn))
        return Visits(np.concatenate(rows), np.concatenate(passes))

    def _pass(self, turn: int) -> np.ndarray:
        order = keyed_order(self._shard_sizes, key=key_of(self._key, turn, "samples"))
        chosen = self._firsts
        if self._hashes is not None:
            begins = (keyed_shares(self._hashes, key=self._key) * self._counts).astype(np.int64)
            chosen = chosen + (begins + turn) % self._counts
        return self._rows[chosen[order]]


def mixed(parts: Sequence[Visits], *, key: int) -> Visits:
    """The visits of one epoch to all datasets: each dataset's in their order, the datasets shuffled."""
    if len(parts) == 1:
        return parts[0]
    sizes = [len(part.rows) for part in parts]
    owner = np.repeat(np.arange(len(parts)), sizes)[permutation(sum(sizes), key=key)]
    rows, passes = (np.empty(len(owner), np.int64) for _ in range(2))
    for number, part in enumerate(parts):
        rows[owner == number], passes[owner == number] = part
    return Visits(rows, passes)
