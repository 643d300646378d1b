"""The stage filter: conditions on samples in, the samples that meet all of them out.

Decided once, from the index alone; what nothing meets is a mistake in the config, and said with how many
samples each condition lets through, and which values there are. The trade-off: conditions on columns of the
manifest parse those of every sample once.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from schemas.errors import ConfigError
from schemas.train_config import StageConfig
from schemas.windows import durations
from trainer.catalog import Catalog
from trainer.mixture import Mixture


def filtered(mixture: Mixture, stage: StageConfig) -> tuple[np.ndarray, list[str]]:
    """(bool [n]: the rows that a stage may use, lines on datasets that its tags leave out whole).

    ConfigError where no row is left.
    """
    wanted, notes, there = stage.filter, list[str](), ""
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
        tagged, notes, there = _tagged(mixture, wanted.tags, stage.name)
        conditions |= {f"tags.{name}": meets for name, meets in tagged.items()}
    meets_all = np.logical_and.reduce([np.ones(len(mixture), bool), *conditions.values()])
    if not meets_all.any():
        counts = ", ".join(f"{name} {int(meets.sum())}" for name, meets in conditions.items())
        raise ConfigError(
            f"stage {stage.name!r}: none of {len(mixture)} samples meets all of its filter; each: {counts}"
            + there
        )
    return meets_all, notes


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
_KINDS = {str: "text", bool: "bool", int: "number", float: "number", list: "list", dict: "table"}
_SHOWN = 5
"""Values of a column that a message names."""


class _Tagged(NamedTuple):
    """One dataset held against the wanted tags."""

    meets: np.ndarray
    """bool [n, tags]."""
    columns: set[str]
    """All that the manifest had besides its own."""
    values: dict[str, Counter[str]]
    """Wanted columns that it had: how often there is which value, as JSON."""


def _tagged(mixture: Mixture, tags: Tags, stage: str) -> tuple[dict[str, np.ndarray], list[str], str]:
    """(Which rows have a wanted value, for each column; lines on datasets that have none of it; what values
    there are in columns where no row has one). ConfigError where no row has a column.
    """
    parts = [_tags_of(catalog, tags) for catalog in mixture.catalogs]
    columns = set().union(*(part.columns for part in parts))
    if unknown := sorted(tags.keys() - columns):
        raise ConfigError(
            f"stage {stage!r}: filter.tags names {', '.join(unknown)}, which the manifest had no column of; "
            f"it had {', '.join(sorted(columns)) or 'none besides its own'}"
        )
    meets = {name: np.concatenate([part.meets[:, i] for part in parts]) for i, name in enumerate(tags)}
    notes = [
        f"{catalog.dataset} has no sample with filter.tags {name} = {list(tags[name])}: it has "
        + _said(part.values[name])
        for catalog, part in zip(mixture.catalogs, parts, strict=True)
        for i, name in enumerate(tags)
        if not part.meets[:, i].any()
    ]
    there = [
        f"; {name} = {list(tags[name])} is wanted, and there is "
        + _said(sum((part.values[name] for part in parts), Counter[str]()))
        for name in tags
        if not meets[name].any()
    ]
    return meets, notes, "".join(there)


def _tags_of(catalog: Catalog, tags: Tags) -> _Tagged:
    distinct = catalog.extra().dictionary_encode()
    meets = np.zeros((len(distinct.dictionary), len(tags)), bool)
    found = _Tagged(meets, set(), {name: Counter() for name in tags})
    for number, text in enumerate(distinct.dictionary):
        cells: dict[str, Any] = json.loads(text.as_py() or "{}")
        found.columns.update(cells)
        for i, name in enumerate(tags):
            if name in cells:
                found.values[name][json.dumps(cells[name])] += 1
                meets[number, i] = any(_matches(cells[name], value) for value in tags[name])
    return found._replace(meets=meets[distinct.indices.to_numpy()])


def _matches(cell: object, value: object) -> bool:
    """Whether a cell is the value, its text (all that a CSV file has), or a list with it."""
    if isinstance(cell, list):
        return any(_matches(item, value) for item in cell)
    if isinstance(cell, str):
        return cell in (value, json.dumps(value))
    # Python takes True for 1; a manifest does not.
    return cell == value and isinstance(cell, bool) == isinstance(value, bool)


def _said(values: Counter[str]) -> str:
    """Some values, as JSON, with what they are."""
    if not values:
        return "no such column"
    shown = sorted(values, key=lambda text: (-values[text], text))[:_SHOWN]
    named = [f"{text} ({_KINDS.get(type(json.loads(text)), 'nothing')})" for text in shown]
    more = f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else ""
    return ", ".join(named) + more
