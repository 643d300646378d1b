"""What ranks must agree on before and while they read: one plan, and how many samples are lost."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from schemas.errors import LatentpressError
from schemas.load import check_config
from schemas.tables import sealed_parquet
from schemas.train_config import TrainConfig
from tests.trainer.datasets import write_dataset
from tests.trainer.gloo import on_two_ranks
from trainer import loop
from trainer.catalog import Catalog
from trainer.loader import Loader
from trainer.metrics import read_records
from trainer.parallel import World


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "set")


def config(dataset: Path, output: Path, **data: Any) -> TrainConfig:
    tree = {
        "dataset": str(dataset),
        "output": str(output),
        "model": {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 16, "time_embed_dim": 16},
        "data": {"budget_tokens": 64, "slots": 2, "prefetch": 0, **data},
        "stages": [{"name": "only", "steps": 6, "lr": {"peak": 1e-3}}],
    }
    output.mkdir()
    return check_config(tree, TrainConfig, where="test")


def outcome(world: World, configs: list[TrainConfig]) -> str:
    """What training said when it ended early on this rank, each with its own config."""
    try:
        loop.train(configs[world.rank], world=world)
    except LatentpressError as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_ranks_with_different_indexes_do_not_begin(dataset: Path, tmp_path: Path, share: float) -> None:
    """The second rank's has one sample less: of those trained on, or of those held out alone."""
    settings = config(dataset, tmp_path / "run").model_dump() | {"validation": {"share": share}}
    with Loader(Catalog(dataset), config=TrainConfig.model_validate(settings)) as loader:
        (plan,) = loader._plans.values()
        lost = loader.mixture.sample_id(int(plan.is_held_out.argmax() if share else plan.rows[0]))
        digest = loader.plan_digest("only")
    other = tmp_path / "other"
    shutil.copytree(dataset, other)
    table = pq.read_table(other / "index.parquet")
    kept = [row for row, found in enumerate(table["sample_id"].to_pylist()) if found != lost]
    (other / "index.parquet").write_bytes(sealed_parquet(table.take(kept)))
    configs = [TrainConfig.model_validate(settings | {"dataset": str(path)}) for path in (dataset, other)]
    with Loader(Catalog(other), config=configs[1]) as loader:
        assert (loader.plan_digest("only") == digest) == bool(share)
    for said in on_two_ranks(outcome, configs):
        assert said.startswith("DatasetError: expected the same plan on every rank")


def damage(dataset: Path, sample_ids: set[str]) -> None:
    for row in pq.read_table(dataset / "index.parquet").to_pylist():
        if row["sample_id"] in sample_ids:
            with (dataset / row["shard"]).open("r+b") as file:
                file.seek(row["mean_offset"])
                byte = file.read(1)[0]
                file.seek(row["mean_offset"])
                file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("limit", [1, 2])
def test_lost_samples_are_counted_over_all_ranks_and_each_once(
    dataset: Path, tmp_path: Path, limit: int
) -> None:
    settings = config(dataset, tmp_path / "run", max_unreadable=limit)
    firsts = set()
    for rank in range(2):  # one damaged sample for each rank in the first step; later both meet both
        with Loader(Catalog(dataset), config=settings, rank=rank, world_size=2) as loader:
            firsts.add(loader.packs(0)[0].segments[0].sample_id)
    damage(dataset, firsts)
    said = on_two_ranks(outcome, [settings] * 2)
    counts = [record["unreadable"] for record in read_records(Path(settings.output) / "metrics.jsonl")]
    if limit == 1:
        assert all(
            "2 samples cannot be read, on all ranks together, data.max_unreadable = 1" in one for one in said
        )
        assert counts == []
    else:
        assert said == ["", ""]
        assert counts == [2] * 6
