"""The stage filter: what meets every condition, and what is said where nothing does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from schemas.errors import ConfigError
from tests.trainer.catalogs import Clip, make_catalog, plan_config, stage_plan
from trainer.catalog import Catalog
from trainer.mixture import Mixture

CLIPS = [
    Clip(5, extra={"style": "anime", "rating": 1}),  # 0.5 s
    Clip(9, extra={"style": "photo", "rating": 2}),  # 1 s
    Clip(17, extra={"style": "photo", "good": True}),  # 2 s
    Clip(17, width=48),  # 2 s
    Clip(25, extra={"style": "anime", "rating": "4", "good": "false", "topics": ["sea", 7]}),  # 3 s
]


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    return make_catalog(tmp_path_factory.mktemp("filter") / "set", CLIPS)


def used(catalog: Catalog, **filter_: Any) -> list[int]:
    """Numbers of the clips that a stage uses; the shape tells them apart."""
    plan = stage_plan(catalog, plan_config(stage={"filter": filter_}))
    extras = catalog.extra().to_pylist()
    kinds = [(clip.frames, clip.width, bool(clip.extra)) for clip in CLIPS]
    found = [
        (
            int(catalog.pts_offsets[row + 1] - catalog.pts_offsets[row]),
            int(catalog.shapes[row, 3]) * 8,
            bool(extras[row]),
        )
        for row in plan.rows
    ]
    return sorted(kinds.index(kind) for kind in found)


@pytest.mark.parametrize(
    ("filter_", "expected"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"min_s": 1.0}, [1, 2, 3, 4]),
        ({"min_s": 1.05}, [1, 2, 3, 4]),  # within half a frame
        ({"min_s": 1.07}, [2, 3, 4]),
        ({"longest_s": 1.95}, [0, 1, 2, 3]),
        ({"longest_s": 1.9}, [0, 1]),
        ({"min_s": 0.9, "longest_s": 2.0}, [1, 2, 3]),
        ({"buckets": ["17x32x48", "5x32x32"]}, [0, 3]),
        ({"tags": {"style": ["anime"]}}, [0, 4]),
        ({"tags": {"style": ["anime", "photo"], "rating": [2]}}, [1]),
        ({"tags": {"rating": [1, 2.0]}}, [0, 1]),
        ({"tags": {"good": [True]}}, [2]),
        ({"tags": {"style": ["photo"]}, "min_s": 1.5}, [2]),
        ({"tags": {"rating": [4]}}, [4]),  # a text, as of a CSV file
        ({"tags": {"good": [False]}}, [4]),
        ({"tags": {"topics": ["sky", "sea"]}}, [4]),
        ({"tags": {"topics": [7]}}, [4]),
    ],
)
def test_all_conditions_are_met(catalog: Catalog, filter_: dict[str, Any], expected: list[int]) -> None:
    assert used(catalog, **filter_) == expected


@pytest.mark.parametrize(
    ("filter_", "message"),
    [
        ({"min_s": 9.0, "tags": {"style": ["anime"]}}, "none of 5 samples .*: min_s 0, tags.style 2"),
        ({"tags": {"good": [1]}}, r'tags.good 0; good = \[1\] is .* "false" \(text\), true \(bool\)$'),
        ({"tags": {"rating": ["2", 4.0]}}, r'there is "4" \(text\), 1 \(number\), 2 \(number\)$'),
        ({"tags": {"topics": [8]}}, r'topics = \[8\] is wanted, and there is \["sea", 7\] \(list\)$'),
        ({"tags": {"stil": ["anime"]}}, "filter.tags names stil.*it had good, rating, style, topics"),
        ({"buckets": ["49x32x32"]}, "filter.buckets has 49x32x32; there are 17x32x32, 17x32x48"),
    ],
)
def test_what_nothing_meets_is_refused(catalog: Catalog, filter_: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"stage 'all': .*{message}"):
        used(catalog, **filter_)


def test_a_dataset_of_a_mixture_may_have_none(catalog: Catalog, tmp_path: Path) -> None:
    plain = make_catalog(tmp_path / "plain", [Clip(5)] * 3, seed=1)
    mixture = Mixture([plain, catalog])
    plan = stage_plan(mixture, plan_config(stage={"filter": {"tags": {"style": ["anime"]}}}))
    assert len(plan.rows) == 2
    assert (plan.rows >= 3).all()
    visited = {row for step in range(5) for pack in plan.step(step) for row in pack.rows}
    assert visited == set(plan.rows.tolist())
    assert [line for line in plan.describe() if "filter.tags" in line] == [
        f"stage all: {plain.dataset} has no sample with filter.tags style = ['anime']: it has no such column"
    ]
