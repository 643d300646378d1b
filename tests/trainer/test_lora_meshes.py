"""Adapters and long context that ranks share: saved under one mesh, read under any, exported and merged."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from schemas.train_config import LrConfig, MeshConfig, OptimConfig
from tests.trainer.gloo import on_ranks
from tests.trainer.test_checkpoint import assert_equal, flat_state
from tests.trainer.test_export import INPUTS, run_config
from tests.trainer.test_lineage import save_stage, sharded
from tests.trainer.test_meshes import LORA, four_heads
from tests.trainer.test_parallel import Values, alone
from trainer import checkpoint
from trainer.checkpoint import find_checkpoint
from trainer.export import export
from trainer.lineage import load_weights
from trainer.lora import ADAPTER
from trainer.model_folder import WEIGHTS
from trainer.optim import make_optimizer
from trainer.parallel import World

PLAN = four_heads("dit with long context, adapters")
MORE = {"inputs": INPUTS, "config": run_config({"name": "first"})}


def loaded(world: World, run: str) -> Values:
    """Weights and moments of a checkpoint."""
    model = sharded(world, PLAN, LORA)
    optimizer = make_optimizer(model, OptimConfig(), LrConfig(peak=1.0))
    saved = find_checkpoint(Path(run))
    checkpoint.load_model(saved, model)
    checkpoint.load_optimizer(saved, model, optimizer)
    return flat_state(model, optimizer)


def merged(world: World, run: str) -> Values:
    """Weights of a next stage without adapters."""
    model = sharded(world, PLAN, None)
    load_weights(find_checkpoint(Path(run)), model, seed=0)
    return flat_state(model, make_optimizer(model, OptimConfig(), LrConfig(peak=1.0)))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Values]:
    """A checkpoint of four ranks that share every matrix, after a step, and its weights."""
    output = tmp_path_factory.mktemp("run")
    args = str(output), LORA, PLAN, None, 0.1, MORE
    return output, on_ranks(4, save_stage, *args, mesh=MeshConfig(tp=4))[0]


def test_what_ranks_share_is_read_again_by_any_number(run: tuple[Path, Values]) -> None:
    output, weights = run
    expected = alone(loaded, str(output))
    assert_equal({name: expected[name] for name in weights}, weights)
    assert len(expected) > len(weights)  # moments
    for ranks, mesh in ((2, MeshConfig(tp=2)), (4, MeshConfig(dp_shard=2, tp=2)), (2, MeshConfig())):
        for found in on_ranks(ranks, loaded, str(output), mesh=mesh):
            assert_equal(found, expected)


def test_what_ranks_share_is_what_one_exports_and_merges(run: tuple[Path, Values], tmp_path: Path) -> None:
    output, weights = run
    assert_equal(alone(save_stage, str(tmp_path / "one"), LORA, PLAN, None, 0.1, MORE), weights)
    files = []
    for folder in (output, tmp_path / "one"):
        export(find_checkpoint(folder), tmp_path / f"{folder.name} merged", merge=True)
        files.append(load_file(tmp_path / f"{folder.name} merged" / f"{WEIGHTS}.safetensors"))
    assert_equal(*files)
    changed = [name for name, value in files[0].items() if not value.equal(weights[name])]
    assert len(changed) == len([name for name in weights if ADAPTER.search(name)]) / 2 > 0
    for found in on_ranks(2, merged, str(output), mesh=MeshConfig(tp=2)):
        assert_equal(found, files[0])
