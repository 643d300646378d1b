"""Checkpoints: completeness, what a kill leaves behind, keep-k, resharding, refusal of another run's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from schemas.card import Card, read_card
from schemas.errors import ConfigError, RunError, StaleDatasetError
from schemas.load import check_config
from schemas.train_config import OptimConfig, TrainConfig
from tests.trainer.datasets import write_dataset
from tests.trainer.gloo import on_two_ranks
from tests.trainer.stock import clips, pack_inputs
from tests.trainer.test_parallel import Values, alone, sharded_model, whole
from trainer import checkpoint
from trainer.checkpoint import Saved, examine, find_checkpoint, locked, newest
from trainer.objective import clip_errors
from trainer.optim import make_optimizer, set_lr
from trainer.parallel import World
from trainer.resume import resume_notes, resume_point

META = dict.fromkeys(
    ("stage", "stopped", "config", "fingerprint", "plan_digest", "transformer", "schedule", "inputs"), ""
)


def train_and_save(world: World, output: str, steps: list[int], keep: int = 2) -> Values:
    """A checkpoint after each number of `steps`; returns the state of the last one."""
    model = sharded_model(world)
    optimizer = make_optimizer(model, OptimConfig())
    set_lr(optimizer, 1e-3)
    inputs, target = pack_inputs(clips(), variant="5b")
    for step in range(1, steps[-1] + 1):
        clip_errors(model(inputs), target, lengths=inputs.video_lengths).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in steps:
            checkpoint.save(
                Path(output), step=step, model=model, optimizer=optimizer, meta=META, world=world, keep=keep
            )
    return flat_state(model, optimizer)


def load(world: World, path: str) -> Values:
    model = sharded_model(world, seed=1)
    optimizer = make_optimizer(model, OptimConfig())
    saved = find_checkpoint(Path(path))
    checkpoint.load_model(saved, model)
    checkpoint.load_optimizer(saved, model, optimizer)
    return flat_state(model, optimizer)


def flat_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Values:
    """Whole weights and moments, by name."""
    state = {name: whole(parameter) for name, parameter in model.named_parameters()}
    for name, moments in checkpoint.optimizer_state(model, optimizer).items():
        state |= {f"{name}/{key}": whole(value) for key, value in moments.items() if key != "step"}
        state[f"{name}/step"] = moments["step"]
    return state


def assert_equal(found: Values, expected: Values) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Values]:
    """A run folder with checkpoints of two ranks after steps 2 and 3, and the state after 3."""
    output = tmp_path_factory.mktemp("run")
    return output, on_two_ranks(train_and_save, str(output), [1, 2, 3])[0]


@pytest.fixture
def folder(run: tuple[Path, Values], tmp_path: Path) -> Path:
    """A copy of its checkpoints folder."""
    return Path(shutil.copytree(checkpoint.checkpoints_folder(run[0]), tmp_path / "checkpoints"))


def test_two_ranks_reload_on_two_and_on_one(run: tuple[Path, Values]) -> None:
    output, expected = run
    assert any(value.abs().max() > 0 for name, value in expected.items() if name.endswith("exp_avg"))
    for found in (*on_two_ranks(load, str(output)), alone(load, str(output))):
        assert_equal(found, expected)


def test_the_newest_are_kept_and_named(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-000002", "step-000003"]
    assert (folder / "latest").read_text().strip() == "step-000003"
    for start in (folder, folder.parent, folder / "step-000003"):
        assert find_checkpoint(start).step == 3
    assert find_checkpoint(folder / "step-000002").step == 2


@pytest.mark.parametrize("damage", ["no meta", "torn meta", "no file", "short file", "temporary name"])
def test_an_incomplete_checkpoint_is_passed_over(folder: Path, damage: str) -> None:
    last = folder / "step-000003"
    data = next(last.glob("*.distcp"))
    if damage == "no meta":
        (last / "meta.json").unlink()
    elif damage == "torn meta":
        (last / "meta.json").write_bytes((last / "meta.json").read_bytes()[:-20])
    elif damage == "no file":
        data.unlink()
    elif damage == "short file":
        data.write_bytes(data.read_bytes()[:-1])
    else:
        last.rename(folder / ".tmp-step-000003")
    assert not isinstance(examine(last), Saved)
    saved = newest(folder)
    assert saved is not None
    assert saved.step == 2


def test_a_save_that_dies_leaves_the_previous_one_and_is_cleaned_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone(train_and_save, str(tmp_path), [1])
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write_durably", lambda path, text: (_ for _ in ()).throw(OSError("gone")))
        with pytest.raises(RunError, match="gone; what is saved stays"):
            alone(train_and_save, str(tmp_path), [2])
    folder = checkpoint.checkpoints_folder(tmp_path)
    assert (folder / ".tmp-step-000002").is_dir()
    assert find_checkpoint(tmp_path).step == 1
    (folder / "step-000002").mkdir()  # and a bare folder under the final name
    alone(train_and_save, str(tmp_path), [2])
    assert find_checkpoint(tmp_path).step == 2
    assert not list(folder.glob(".tmp-*"))


def test_a_full_disk_is_one_error_and_what_is_saved_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone(train_and_save, str(tmp_path), [1])

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem.FileSystemWriter.write_data", full)
    with pytest.raises(RunError, match=r"step-000002 cannot be saved: .*No space left.*what is saved stays"):
        alone(train_and_save, str(tmp_path), [2])
    assert find_checkpoint(tmp_path).step == 1


def test_where_there_is_none_the_message_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found no complete one"):
        find_checkpoint(tmp_path)


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Card:
    return read_card(write_dataset(tmp_path_factory.mktemp("data") / "set"))


STAGE = {"name": "a", "steps": 5, "lr": {"peak": 1e-3}}


def config(output: Path, **changes: object) -> TrainConfig:
    tree: dict[str, object] = {"dataset": "here", "output": str(output), "stages": [STAGE]}
    return check_config(tree | changes, TrainConfig, where="test")


def saved_by(config: TrainConfig, folder: Path, *, fingerprint: str, stage: str = "a") -> None:
    """Make the checkpoint in `folder` one of a run of `config`."""
    path = folder / "step-000003" / "meta.json"
    meta = json.loads(path.read_text())
    changed = {"config": config.model_dump(mode="json"), "fingerprint": fingerprint, "stage": stage}
    path.write_text(json.dumps(meta | changed))


def test_another_dataset_or_model_is_refused_field_by_field(folder: Path, card: Card) -> None:
    output = folder.parent
    saved_by(config(output), folder, fingerprint=card.fingerprint)
    resumed = resume_point(config(output), card)
    assert resumed is not None
    assert resumed.step == 3
    free = {"optim": {"max_grad_norm": 9.0}, "model": {"attention": "sdpa"}, "checkpoint": {"every": 7}}
    assert resume_point(config(output, **free), card) is not None
    notes = resume_notes(config(output, **free), resumed, plan_digest="")
    assert "optim.max_grad_norm: 1.0 -> 9.0" in notes
    assert len(notes) == 4
    with pytest.raises(
        ConfigError, match=r"model.num_layers: checkpoint 2, config 3; seed: checkpoint 0, config 1"
    ):
        resume_point(config(output, model={"num_layers": 3}, seed=1), card)
    with pytest.raises(ConfigError, match=r"data.slots: checkpoint 1, config 2"):
        resume_point(config(output, data={"slots": 2}), card)
    with pytest.raises(ConfigError, match=r"loss.normalize: checkpoint 'per_clip', config 'per_token'"):
        resume_point(config(output, loss={"normalize": "per_token"}), card)
    saved_by(config(output), folder, fingerprint="another")
    with pytest.raises(StaleDatasetError, match="another dataset"):
        resume_point(config(output), card)


BEFORE = STAGE | {"name": "before", "steps": 1}
LATER = STAGE | {"name": "later"}


@pytest.mark.parametrize(
    "stages",
    [
        [BEFORE, STAGE, LATER],
        [BEFORE, STAGE | {"steps": 2}],
        [BEFORE, STAGE | {"max_s": 1.0, "lr": {"peak": 1.0}}],
        [BEFORE | {"lr": {"peak": 1.0}}, STAGE],
    ],
)
def test_what_is_to_come_may_change(folder: Path, card: Card, stages: list[dict[str, object]]) -> None:
    saved_by(config(folder.parent, stages=[BEFORE, STAGE]), folder, fingerprint=card.fingerprint)
    assert resume_point(config(folder.parent, stages=stages), card) is not None


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([BEFORE | {"steps": 2}, STAGE], "stages.0.steps: checkpoint 1, config 2"),
        ([BEFORE | {"max_s": 1.0}, STAGE], "stages.0.max_s: checkpoint None, config 1.0"),
        ([BEFORE, STAGE | {"steps": 1}], "stages.1.steps: checkpoint 5, config 1"),
        ([BEFORE, STAGE | {"name": "b"}], "stages.1.name: checkpoint 'a', config 'b'"),
        ([BEFORE, STAGE | {"trainable": ["attn1"]}], r"stages.1.trainable: .* config \['attn1'\]"),
        (
            [STAGE],
            "stages.0.name: checkpoint 'before', config 'a'; .*stages.1.name: checkpoint 'a', config None",
        ),
    ],
)
def test_what_is_past_may_not(
    folder: Path, card: Card, stages: list[dict[str, object]], message: str
) -> None:
    saved_by(config(folder.parent, stages=[BEFORE, STAGE]), folder, fingerprint=card.fingerprint)
    with pytest.raises(ConfigError, match=message):
        resume_point(config(folder.parent, stages=stages), card)


def test_checkpoints_of_which_none_is_complete_are_never_started_over(folder: Path, card: Card) -> None:
    saved_by(config(folder.parent), folder, fingerprint=card.fingerprint)
    meta = json.loads((folder / "step-000003" / "meta.json").read_text())
    (folder / "step-000002" / "meta.json").unlink()
    saved = resume_point(config(folder.parent), card)
    assert saved is not None
    (folder / "step-000004").mkdir()
    notes = resume_notes(config(folder.parent), saved, plan_digest="")
    assert "step-000004, which is newer but not complete: meta.json is missing" in notes[1]
    del meta["plan_digest"]
    (folder / "step-000003" / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(
        RunError, match=r"step-000002: meta.json is missing; step-000003: meta.json has no plan_digest;.*anew"
    ):
        resume_point(config(folder.parent), card)


def test_another_format_is_refused(folder: Path) -> None:
    path = folder / "step-000003" / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2}))
    with pytest.raises(RunError, match="expected format_version 1, found 2"):
        newest(folder)


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "run"),
        pytest.raises(RunError, match="another run is training"),
        locked(tmp_path / "run"),
    ):
        pass
    with locked(tmp_path / "run"):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="expected a folder"), locked(tmp_path / "file"):
        pass


def test_a_fresh_output_starts_at_the_beginning(tmp_path: Path, card: Card) -> None:
    assert resume_point(config(tmp_path), card) is None
