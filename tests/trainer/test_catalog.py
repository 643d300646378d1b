"""The catalog while its index changes: what is read later is of the same rows, or an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.errors import DatasetError
from schemas.tables import sealed_parquet
from schemas.train_config import TrainConfig
from tests.trainer.catalogs import Clip, make_catalog, plan_config
from trainer.catalog import Catalog
from trainer.loader import Loader

CLIPS = [Clip(9, shard=i // 3, extra={"number": i}, weights=(float(i),) * 9) for i in range(12)]


def write(root: Path, rows: list[int], table: pa.Table) -> None:
    (root / "index.parquet").write_bytes(sealed_parquet(table.take(rows)))


@pytest.fixture
def opened(tmp_path: Path) -> tuple[Catalog, pa.Table]:
    """A catalog of the first six clips, and the index of all."""
    make_catalog(tmp_path / "set", CLIPS)
    table = pq.read_table(tmp_path / "set" / "index.parquet")
    write(tmp_path / "set", list(range(6)), table)
    return Catalog(tmp_path / "set"), table


@pytest.mark.parametrize(
    "rows", [[*range(6, 12), *range(6)], list(range(6, 12)), list(range(5)), [5, *range(5)]]
)
def test_an_index_that_changed_is_not_taken_for_the_old_one(
    opened: tuple[Catalog, pa.Table], rows: list[int]
) -> None:
    catalog, table = opened
    write(Path(catalog.dataset), rows, table)
    for again in (catalog.extra, catalog.frame_weights):
        with pytest.raises(
            DatasetError, match=r"index of .*set has changed since this run began: .*start again"
        ):
            again()


def test_rows_that_were_appended_change_nothing(opened: tuple[Catalog, pa.Table]) -> None:
    catalog, table = opened
    before = catalog.extra().to_pylist(), catalog.frame_weights().tolist()
    write(Path(catalog.dataset), list(range(12)), table)
    assert (catalog.extra().to_pylist(), catalog.frame_weights().tolist()) == before


def test_frame_weights_of_all_stages_are_those_of_the_start(opened: tuple[Catalog, pa.Table]) -> None:
    catalog, table = opened
    stages: list[dict[str, Any]] = [{"name": name, "steps": 3, "lr": {"peak": 1.0}} for name in "ab"]
    config = plan_config(loss={"keyframe_lambda": 2.0}).model_dump() | {"stages": stages}
    sizes: list[list[float]] = []
    for at in (6, 0):
        with Loader(catalog, config=TrainConfig.model_validate(config)) as loader:
            sizes.append([])
            for step in range(6):
                if step == at:
                    write(Path(catalog.dataset), [*range(6, 12), *range(6)], table)
                sizes[-1].append(loader.step_weights(step).num_video_tokens)
    assert sizes[0] == sizes[1]
