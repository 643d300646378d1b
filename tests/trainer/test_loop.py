"""The loop end to end on a small dataset: resume, ranks, stages, no-op training, failures."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel

from schemas.errors import RunError
from schemas.load import check_config
from schemas.train_config import ModelConfig, TrainConfig
from tests.trainer.datasets import write_dataset
from tests.trainer.gloo import on_two_ranks
from tests.trainer.stock import CONFIGS, SDPA, stock_loss
from tests.trainer.test_parallel import Values, alone
from trainer import loop, sharding
from trainer.architecture import architecture, data_shape
from trainer.catalog import Catalog
from trainer.checkpoint import checkpoints_folder, find_checkpoint
from trainer.export import export
from trainer.layout import fill_patches
from trainer.loader import Loader
from trainer.metrics import read_records
from trainer.model import build_model
from trainer.model_folder import WEIGHTS
from trainer.parallel import World
from trainer.weights import initial_values

STAGES: list[dict[str, Any]] = [{"name": "only", "steps": 6, "lr": {"peak": 3e-3, "warmup": 2}}]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "set")


def config(dataset: Path, output: Path, **changes: Any) -> TrainConfig:
    tree: dict[str, Any] = {
        "dataset": str(dataset),
        "output": str(output),
        "model": {"num_attention_heads": 2, "attention_head_dim": 16, "time_embed_dim": 16},
        "data": {"budget_tokens": 64, "slots": 2},
        "checkpoint": {"every": 2, "keep": 9},
        "stages": STAGES,
    }
    return check_config(tree | changes, TrainConfig, where="test")


def run(world: World, config: TrainConfig) -> None:
    Path(config.output).mkdir(parents=True, exist_ok=True)
    loop.train(config, world=world)


def run_and_stop(world: World, config: TrainConfig, after: int) -> None:
    """Rank 1 alone is told to stop while step `after` runs."""
    clip_grad_norm = sharding.clip_grad_norm
    calls: list[None] = []

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if world.rank == 1 and len(calls) == after:
            os.kill(os.getpid(), signal.SIGUSR1)
        return clip_grad_norm(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "clip_grad_norm", counting)
        run(world, config)


def losses(output: Path) -> list[tuple[int, float, float]]:
    return [(r["step"], r["loss"], r["grad_norm"]) for r in read_records(output / "metrics.jsonl")]


def saved_bytes(output: Path) -> dict[str, bytes]:
    """Weights and moments of the newest checkpoint, as each rank wrote them."""
    return {path.name: path.read_bytes() for path in find_checkpoint(output).path.glob("*.distcp")}


def exported(output: Path, folder: Path) -> Values:
    from safetensors.torch import load_file

    export(find_checkpoint(output), folder)
    return load_file(folder / f"{WEIGHTS}.safetensors")


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of six steps on two ranks."""
    output = tmp_path_factory.mktemp("undisturbed")
    on_two_ranks(run, config(dataset, output))
    return output


def test_a_run_leaves_what_it_promises(undisturbed: Path) -> None:
    records = read_records(undisturbed / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert all(0 < record["fill"] <= 1 and 0 <= record["data_wait"] <= 1 for record in records)
    assert records[1]["lr"] == 3e-3
    assert (undisturbed / "loss.png").read_bytes().startswith(b"\x89PNG")
    meta = find_checkpoint(undisturbed).meta
    assert (meta["step"], meta["stage"], meta["mesh"]["ranks"]) == (6, "only", 2)
    for key in ("plan_digest", "config_digest", "fingerprints", "inputs", "versions", "architecture"):
        assert meta[key], key


def test_stopped_and_resumed_equals_undisturbed_bit_for_bit(
    dataset: Path, undisturbed: Path, tmp_path: Path
) -> None:
    settings = config(dataset, tmp_path)
    on_two_ranks(run_and_stop, settings, 3)
    assert find_checkpoint(tmp_path).step == 3
    assert find_checkpoint(tmp_path).meta["stopped"]
    on_two_ranks(run, settings)
    assert losses(tmp_path) == losses(undisturbed)
    assert saved_bytes(tmp_path) == saved_bytes(undisturbed)
    assert len(saved_bytes(tmp_path)) == 2


def test_a_damaged_checkpoint_is_neither_resumed_nor_exported(
    dataset: Path, undisturbed: Path, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed, tmp_path / "run")
    last = find_checkpoint(tmp_path / "run")
    path = sorted(last.path.glob("*.distcp"))[-1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    longer = config(dataset, tmp_path / "run", stages=[STAGES[0] | {"steps": 7}])
    with pytest.raises(
        RunError, match=f"is damaged: {path.name} is not as it was saved; .* to go on from step-000004"
    ):
        alone(run, longer)
    with pytest.raises(RunError, match="is damaged"):
        export(last, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_resuming_an_older_checkpoint_repeats_the_same_steps(
    dataset: Path, undisturbed: Path, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    for step in (4, 6):
        shutil.rmtree(checkpoints_folder(tmp_path) / f"step-{step:06d}")
    on_two_ranks(run, config(dataset, tmp_path))
    assert losses(tmp_path) == losses(undisturbed)
    assert saved_bytes(tmp_path) == saved_bytes(undisturbed)


def test_one_rank_trains_as_two_do(dataset: Path, undisturbed: Path, tmp_path: Path) -> None:
    alone(run, config(dataset, tmp_path / "run"))
    for (step, loss, norm), (_, want_loss, want_norm) in zip(
        losses(tmp_path / "run"), losses(undisturbed), strict=True
    ):
        assert loss == pytest.approx(want_loss, rel=1e-6), step
        assert norm == pytest.approx(want_norm, rel=1e-5), step
    ours, theirs = exported(tmp_path / "run", tmp_path / "a"), exported(undisturbed, tmp_path / "b")
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("normalize", ["per_clip", "per_token"])
def test_a_learning_rate_of_zero_changes_nothing_through_save_resume_and_export(
    dataset: Path, tmp_path: Path, normalize: str
) -> None:
    stages = [{"name": "still", "steps": 2, "lr": {"peak": 0.0}}]
    settings = config(dataset, tmp_path / "run", stages=stages, loss={"normalize": normalize})
    alone(run, settings)
    longer = settings.model_copy(update={"stages": (settings.stages[0].model_copy(update={"steps": 3}),)})
    alone(run, longer)
    found = exported(tmp_path / "run", tmp_path / "out")
    plan = architecture(settings.model, data_shape(Catalog(dataset)))
    model = build_model(plan, SDPA)
    read = initial_values("random", model, seed=settings.seed)
    for name, parameter in model.named_parameters():
        assert torch.equal(found[name], read(name, tuple(slice(0, n) for n in parameter.shape))), name
    # And the folder that was written starts a run with the same first loss.
    again = config(
        dataset,
        tmp_path / "again",
        model=ModelConfig(init=str(tmp_path / "out")).model_dump(),
        stages=stages,
        loss={"normalize": normalize},
    )
    alone(run, again)
    assert losses(tmp_path / "again") == losses(tmp_path / "run")[:2]


def test_a_stage_trains_what_it_names_and_starts_from_the_last(dataset: Path, tmp_path: Path) -> None:
    first = {"name": "all", "steps": 1, "lr": {"peak": 1e-3, "kind": "constant"}}
    second = first | {"name": "part", "steps": 2, "trainable": ["proj_out"]}
    alone(run, config(dataset, tmp_path / "run", stages=[first, second], checkpoint={"every": 1, "keep": 9}))
    steps = checkpoints_folder(tmp_path / "run")
    before, after = (exported(steps / f"step-{step:06d}", tmp_path / f"export-{step}") for step in (1, 3))
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        "proj_out.weight",
        "proj_out.bias",
    }
    assert [r["stage"] for r in read_records(tmp_path / "run" / "metrics.jsonl")] == ["all", "part", "part"]


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_clip(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.objective import Objective

    noised = Objective.noised

    def poisoned(self: Objective, clean: torch.Tensor, **draw: Any) -> Any:
        noisy, target = noised(self, clean, **draw)
        return noisy, target * (float("nan") if len(clean) == 6 else 1)

    monkeypatch.setattr(Objective, "noised", poisoned)
    culprit = next(i for i, shape in enumerate(Catalog(dataset).shapes) if shape[0] == 6)
    with pytest.raises(RunError, match="gradient norm is nan") as caught:
        alone(run, config(dataset, tmp_path))
    assert Catalog(dataset).sample_id(culprit) in str(caught.value)
    assert str(caught.value).count(", ") < 3


def test_per_token_weighs_what_a_model_of_two_frames_a_patch_sees(dataset: Path, tmp_path: Path) -> None:
    """CogVideoX 1.5: the loss of a step is the mean over every element, and the plan counts its tokens."""
    variant = CONFIGS["1.5"] | {"in_channels": 16, "out_channels": 16, "text_embed_dim": 24}
    folder = tmp_path / "init"
    stock = CogVideoXTransformer3DModel(**variant | {"max_text_seq_length": 8})
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.1)
    stock.save_pretrained(folder)
    stages = [{"name": "still", "steps": 3, "lr": {"peak": 0.0}}]
    settings = config(
        dataset,
        tmp_path / "run",
        model={"init": str(folder)},
        stages=stages,
        loss={"normalize": "per_token"},
    )
    alone(run, settings)
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    odd = 0
    with Loader(Catalog(dataset), config=settings, patch_t=2) as loader:
        for step, record in enumerate(records):
            segments = [segment for pack in loader.packs(step) for segment in pack.segments]
            clips = [fill_patches(segment.latents, patch_t=2) for segment in segments]
            odd += sum(len(s.latents) % 2 for s in segments)
            lengths = [len(clip) // 2 * (clip.shape[2] // 2) * (clip.shape[3] // 2) for clip in clips]
            errors = [stock_loss(stock, segment).item() for segment in segments]
            mean = sum(e * n for e, n in zip(errors, lengths, strict=True)) / sum(lengths)
            assert record["loss"] == pytest.approx(mean, rel=1e-3)
            assert record["tokens"] == sum(lengths) + sum(len(s.prompt_embeds) for s in segments)
    assert odd > 2


def test_metrics_after_the_checkpoint_are_cut_on_resume(dataset: Path, tmp_path: Path) -> None:
    settings = config(dataset, tmp_path, stages=[STAGES[0] | {"steps": 3}])
    alone(run, settings)
    path = tmp_path / "metrics.jsonl"
    before = losses(tmp_path)
    path.write_text(path.read_text() + json.dumps({"step": 4, "loss": 1.0}) + '\n\0damaged\n{"step": 5, "lo')
    longer = config(dataset, tmp_path, stages=[STAGES[0] | {"steps": 4}])
    alone(run, longer)
    assert losses(tmp_path)[:3] == before
    assert [step for step, _, _ in losses(tmp_path)] == [1, 2, 3, 4]
