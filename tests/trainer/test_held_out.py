"""What is held out is never trained on, in no dataset, and is the same in every run."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from schemas.errors import ConfigError
from tests.trainer.catalogs import Clip, make_catalog, plan_config, stage_plan
from trainer.held_out import _SPLIT, held_out_rows
from trainer.mixture import Mixture
from trainer.order import hash_strings, keyed_shares

SHARE = {"share": 0.3}


def clips(first: int, last: int, *, shard_of: int = 4) -> list[Clip]:
    """Two clips of each of some files, one of them with two captions."""
    return [
        Clip(5 + 4 * (n % 3), source=f"file {n}", shard=n // shard_of, prompts=prompts)
        for n in range(first, last)
        for prompts in ((4,), (5, 6))
    ]


def sources(mixture: Mixture, rows: np.ndarray) -> set[str]:
    digests = [str(text) for each in mixture.catalogs for text in each._column("source_digest").to_pylist()]
    return {digests[row] for row in rows.tolist()}


def test_a_file_is_held_out_whole_and_in_every_dataset(tmp_path: Path) -> None:
    one = Mixture([make_catalog(tmp_path / "one", clips(0, 60))])
    other = Mixture([make_catalog(tmp_path / "other", clips(30, 90, shard_of=7), seed=1)])
    held, also = (sources(each, np.flatnonzero(held_out_rows(each, share=0.3))) for each in (one, other))
    shared = {f"file {n}" for n in range(30, 60)}
    assert held & shared == also & shared
    assert 3 < len(held & shared) < 20
    assert not held & sources(one, np.flatnonzero(~held_out_rows(one, share=0.3)))
    both = Mixture([*one.catalogs, *other.catalogs])
    assert sources(both, np.flatnonzero(held_out_rows(both, share=0.3))) == held | also


def test_the_split_does_not_move() -> None:
    """Another hash would train on what earlier runs held out."""
    draws = keyed_shares(hash_strings(pa.array(["content:abc", "a", "a" * 70])), key=_SPLIT)
    assert draws.tolist() == pytest.approx([0.143262471410631, 0.157140411367443, 0.877102160471872])


def test_a_larger_share_holds_out_more_of_the_same(tmp_path: Path) -> None:
    many = Mixture([make_catalog(tmp_path / "many", [Clip(5) for _ in range(2000)])])
    splits = [held_out_rows(many, share=share) for share in (0.0, 0.02, 0.1, 0.5)]
    assert [round(split.mean(), 2) for split in splits] == pytest.approx([0, 0.02, 0.1, 0.5], abs=0.03)
    assert not splits[0].any()
    assert all((less <= more).all() for less, more in pairwise(splits))


@pytest.mark.parametrize("captions", ["each", "lot"])
def test_held_out_clips_are_never_trained_on(tmp_path: Path, captions: str) -> None:
    mixture = Mixture([make_catalog(tmp_path / "set", clips(0, 20))])
    config = plan_config(validation=SHARE, data={"captions": captions, "slots": 2})
    plan = stage_plan(mixture, config)
    steps = [plan.step(step) for step in range(40)]
    assert steps[-1][0].epoch > 2
    trained = {row for step in steps for pack in step for row in pack.rows}
    held = set(np.flatnonzero(plan.is_held_out).tolist())
    assert held
    assert trained == set(range(len(mixture))) - held
    looked_at = [visit for pack in plan.validation_reads(100) for _, visit in pack]
    assert {visit.row for visit in looked_at} <= held
    assert sources(mixture, np.array([visit.row for visit in looked_at])) == sources(
        mixture, np.array([*held])
    )


def test_validation_takes_each_clip_once_the_same_ones_each_time(tmp_path: Path) -> None:
    catalog = make_catalog(tmp_path / "set", clips(0, 30))
    more = make_catalog(tmp_path / "more", clips(0, 40), seed=1)
    config = plan_config(
        validation=SHARE, data={"caption_dropout": 0.5}, stage={"window": "slice", "max_frames": 5}
    )
    looked = [visit for pack in stage_plan(catalog, config).validation_reads(100) for _, visit in pack]
    ids = [catalog.sample_id(visit.row) for visit in looked]
    assert len(set(ids)) == len(ids) > 8
    assert all(
        (visit.first, visit.latent_frames, visit.empty_prompt, visit.drop_image) == (0, 2, False, False)
        for visit in looked
    )
    assert {visit.key for visit in looked} == {
        f"validation/{catalog.sample_id(visit.row)}/{catalog.caption_digest(visit.row)}" for visit in looked
    }
    other = plan_config(
        seed=7,
        validation=SHARE,
        data={"slots": 4},
        stage={"name": "other", "budget_tokens": 60, "max_frames": 5},
    )
    again = [visit.key for pack in stage_plan(catalog, other).validation_reads(100) for _, visit in pack]
    assert sorted(again) == sorted(visit.key for visit in looked)
    few = [visit.key for pack in stage_plan(catalog, config).validation_reads(5) for _, visit in pack]
    assert len(few) == 5
    assert set(few) <= set(again)
    grown = {visit.key for pack in stage_plan(more, config).validation_reads(100) for _, visit in pack}
    assert grown >= set(again)


def test_validation_does_not_depend_on_the_order_of_datasets(tmp_path: Path) -> None:
    """The second one has clips of the first, under the same names."""
    one = make_catalog(tmp_path / "one", clips(0, 30))
    other = make_catalog(tmp_path / "other", clips(0, 40), seed=1)
    config = plan_config(validation=SHARE)
    keys = []
    for catalogs in ([one, other], [other, one]):
        plan = stage_plan(Mixture(catalogs), config)
        keys.append(sorted(visit.key for pack in plan.validation_reads(100) for _, visit in pack))
    assert keys[0] == keys[1]
    assert len(set(keys[0])) == len(keys[0]) > 8


def test_without_a_share_validation_is_of_training_clips(tmp_path: Path) -> None:
    plan = stage_plan(make_catalog(tmp_path / "set", clips(0, 10)), plan_config())
    looked = [visit.row for pack in plan.validation_reads(6) for _, visit in pack]
    assert len(looked) == 6
    assert set(looked) <= set(plan.rows.tolist())


def test_a_split_that_leaves_nothing_is_refused(tmp_path: Path) -> None:
    catalog = make_catalog(tmp_path / "set", clips(0, 6))
    with pytest.raises(
        ConfigError, match=r"share = 1e-05: none of the 6 source files of stage 'all' is held"
    ):
        stage_plan(catalog, plan_config(validation={"share": 0.00001}))
    with pytest.raises(ConfigError, match=r"all of the 6 source files of stage 'all' are held out.*or less"):
        stage_plan(catalog, plan_config(validation={"share": 1.0}))
