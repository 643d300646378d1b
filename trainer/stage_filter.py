"""The stage filter: conditions on samples in, the samples that meet all of them out.

Decided once, from the index alone; what nothing meets is a mistake in the config, and said with how many
samples each condition lets through. The trade-off: conditions on columns of the manifest parse those of every
sample once.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from schemas.errors import ConfigError
from schemas.train_config import StageConfig
from schemas.windows import durations
from trainer.catalog import Catalog
from trainer.mixture import Mixture


def filtered(mixture: Mixture, stage: StageConfig) -> np.ndarray:
    """bool [n]: the rows that a stage may use; ConfigError where there are none."""
    wanted = stage.filter
    conditions: dict[str, np.ndarray] = {}
    if wanted.min_s or wanted.longest_s is not None:
        seconds, half = _durations(mixture)  # times are rounded: half a frame either way, as for windows
        if wanted.min_s:
            conditions["min_s"] = seconds >= wanted.min_s - half
        if wanted.longest_s is not None:
            conditions["longest_s"] = seconds <= wanted.longest_s + half
    if wanted.buckets:
        conditions["buckets"] = _in_buckets(mixture, wanted.buckets, stage.name)
    if wanted.tags:
        for name, meets in _tagged(mixture, wanted.tags, stage.name).items():
            conditions[f"tags.{name}"] = meets
    meets_all = np.logical_and.reduce([np.ones(len(mixture), bool), *conditions.values()])
    if not meets_all.any():
        counts = ", ".join(f"{name} {int(meets.sum())}" for name, meets in conditions.items())
        raise ConfigError(
            f"stage {stage.name!r}: none of {len(mixture)} samples meets all of its filter; each: {counts}"
        )
    return meets_all


def _durations(mixture: Mixture) -> tuple[np.ndarray, np.ndarray]:
    """(source seconds of each sample, half a frame of it)."""
    seconds = [
        durations(each.pts_s, each.pts_offsets, fps=each.fps, frames=each.card.settings.frames)
        for each in mixture.catalogs
    ]
    return np.concatenate(seconds), np.concatenate([0.5 / each.fps for each in mixture.catalogs])


def _in_buckets(mixture: Mixture, names: tuple[str, ...], stage: str) -> np.ndarray:
    known = {name for catalog in mixture.catalogs for name in catalog.bucket_names}
    if unknown := sorted(set(names) - known):
        raise ConfigError(
            f"stage {stage!r}: filter.buckets has {', '.join(unknown)}; there are {', '.join(sorted(known))}"
        )
    meets = [np.isin(each.bucket_names, names)[each.buckets] for each in mixture.catalogs]
    return np.concatenate(meets)


Tags = dict[str, tuple[str | int | float | bool, ...]]


def _tagged(mixture: Mixture, tags: Tags, stage: str) -> dict[str, np.ndarray]:
    """Which rows have a wanted value, for each column; ConfigError where no sample has the column."""
    columns: set[str] = set()
    parts = [_tags_of(catalog, tags, columns) for catalog in mixture.catalogs]
    if unknown := sorted(tags.keys() - columns):
        raise ConfigError(
            f"stage {stage!r}: filter.tags names {', '.join(unknown)}, which the manifest had no column of; "
            f"it had {', '.join(sorted(columns)) or 'none besides its own'}"
        )
    return {name: np.concatenate([part[:, i] for part in parts]) for i, name in enumerate(tags)}


def _tags_of(catalog: Catalog, tags: Tags, columns: set[str]) -> np.ndarray:
    """bool [n, tags]; adds the names of all columns found to `columns`."""
    distinct = catalog.extra().dictionary_encode()
    meets = np.zeros((len(distinct.dictionary), len(tags)), bool)
    for number, text in enumerate(distinct.dictionary):
        cells: dict[str, Any] = json.loads(text.as_py() or "{}")
        columns.update(cells)
        meets[number] = [any(_equal(cells.get(name), value) for value in tags[name]) for name in tags]
    return meets[distinct.indices.to_numpy()]


def _equal(cell: object, value: object) -> bool:
    """Python takes True for 1; a manifest does not."""
    return cell == value and isinstance(cell, bool) == isinstance(value, bool)
