"""Resuming: what a run may change and what makes it another run, and what is said about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from schemas.card import Card, read_card
from schemas.errors import ConfigError, RunError, StaleDatasetError
from schemas.load import check_config
from schemas.train_config import TrainConfig
from tests.trainer.datasets import write_dataset
from trainer.checkpoint import FORMAT_VERSION, KEYS, Saved, checkpoints_folder
from trainer.resume import resume_notes, resume_point

LR = {"peak": 1e-3}
BEFORE: dict[str, Any] = {"name": "before", "steps": 1, "lr": LR}
STAGE: dict[str, Any] = {"name": "a", "steps": 5, "lr": LR}
LATER: dict[str, Any] = {"name": "later", "steps": 5, "lr": LR}


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Card:
    return read_card(write_dataset(tmp_path_factory.mktemp("data") / "set"))


def config(output: Path, **changes: Any) -> TrainConfig:
    tree: dict[str, Any] = {"dataset": "here", "output": str(output), "stages": [BEFORE, STAGE]}
    return check_config(tree | changes, TrainConfig, where="test")


def saved(config: TrainConfig, card: Card, *, step: int = 3, **changes: Any) -> Path:
    """A complete checkpoint of a run of `config`, after `step`, in its second stage."""
    path = checkpoints_folder(Path(config.output)) / f"step-{step:06d}"
    path.mkdir(parents=True)
    meta: dict[str, Any] = dict.fromkeys(KEYS, "") | {
        "format_version": FORMAT_VERSION,
        "step": step,
        "files": {},
        "stage": "a",
        "config": config.model_dump(mode="json"),
        "fingerprints": [card.fingerprint] * len(config.mixture),
        "plan_digest": "of then",
    }
    (path / "meta.json").write_text(json.dumps(meta | changes))
    return path


def resumed(config: TrainConfig, card: Card) -> Saved:
    found = resume_point(config, [card] * len(config.mixture))
    assert found is not None
    return found


def test_a_fresh_output_starts_at_the_beginning(tmp_path: Path, card: Card) -> None:
    assert resume_point(config(tmp_path), [card]) is None


FREE: dict[str, dict[str, Any]] = {
    "mesh.dp_replicate: 1 -> 2": {"mesh": {"dp_replicate": 2}},
    "optim.max_grad_norm: 1.0 -> 9.0": {"optim": {"max_grad_norm": 9.0}},
    "precision.param: 'float32' -> 'bfloat16'": {"precision": {"param": "bfloat16"}},
    "checkpoint.time_limit_s: 0.0 -> 600.0": {"checkpoint": {"time_limit_s": 600.0}},
    "model.attention: 'auto' -> 'sdpa'": {"model": {"attention": "sdpa"}},
    "model.recompute: 'none' -> 'block'": {"model": {"recompute": "block"}},
    "model.compile: False -> True": {"model": {"compile": True}},
    "data.readers: 2 -> 4": {"data": {"readers": 4}},
    "data.max_unreadable: 0 -> 3": {"data": {"max_unreadable": 3}},
    "data.cache: '' -> 'here'": {"data": {"cache": "here"}},
    "validation.samples: 0 -> 2": {"validation": {"samples": 2}},
    "stages.1.lr.peak: 0.001 -> 1.0": {"stages": [BEFORE, STAGE | {"lr": {"peak": 1.0}}]},
    "stages.1.steps: 5 -> 2": {"stages": [BEFORE, STAGE | {"steps": 2}]},
    "stages.1.mesh.tp: None -> 2": {"stages": [BEFORE, STAGE | {"mesh": {"tp": 2}}]},
}


@pytest.mark.parametrize("note", FREE)
def test_what_does_not_change_what_is_trained_may_change_and_is_said(
    tmp_path: Path, card: Card, note: str
) -> None:
    saved(config(tmp_path), card)
    changed = config(tmp_path, **FREE[note])
    lines = resume_notes(changed, resumed(changed, card), plan_digest="of then")
    assert note in lines
    assert lines[0].startswith("resuming after step 3 ")


@pytest.mark.parametrize(
    "changes",
    [
        {"stages": [BEFORE, STAGE, LATER]},
        {"stages": [BEFORE | {"lr": {"peak": 1.0}, "mesh": {"tp": 2}}, STAGE]},
        {"dataset": "moved"},
        {"dataset": "", "datasets": [{"path": "moved"}]},
    ],
)
def test_what_is_to_come_or_done_may_change_in_silence(
    tmp_path: Path, card: Card, changes: dict[str, Any]
) -> None:
    saved(config(tmp_path), card)
    changed = config(tmp_path, **changes)
    assert len(resume_notes(changed, resumed(changed, card), plan_digest="of then")) == 1


REFUSED: dict[str, dict[str, Any]] = {
    "model.num_layers: checkpoint 2, config 3; seed: checkpoint 0, config 1": {
        "model": {"num_layers": 3},
        "seed": 1,
    },
    "model.local_frames: checkpoint 0, config 3": {"model": {"local_frames": 3}},
    "data.slots: checkpoint 1, config 2": {"data": {"slots": 2}},
    "data.balance_packs: checkpoint 128, config 1": {"data": {"balance_packs": 1}},
    "data.captions: checkpoint 'each', config 'lot'": {"data": {"captions": "lot"}},
    "data.caption_dropout: checkpoint 0.0, config 0.1": {"data": {"caption_dropout": 0.1}},
    "loss.normalize: checkpoint 'per_clip', config 'per_token'": {"loss": {"normalize": "per_token"}},
    "loss.objective: checkpoint 'v', config 'flow'": {"loss": {"objective": "flow"}},
    "validation.share: checkpoint 0.0, config 0.1": {"validation": {"share": 0.1}},
    "datasets: checkpoint [1.0], config [0.5]": {
        "dataset": "",
        "datasets": [{"path": "here", "weight": 0.5}],
    },
    "stages.0.steps: checkpoint 1, config 2": {"stages": [BEFORE | {"steps": 2}, STAGE]},
    "stages.0.max_s: checkpoint None, config 1.0": {"stages": [BEFORE | {"max_s": 1.0}, STAGE]},
    "stages.0.filter.min_s: checkpoint 0.0, config 1.0": {
        "stages": [BEFORE | {"filter": {"min_s": 1.0}}, STAGE]
    },
    "stages.1.steps: checkpoint 5, config 1": {"stages": [BEFORE, STAGE | {"steps": 1}]},
    "stages.1.name: checkpoint 'a', config 'b'": {"stages": [BEFORE, STAGE | {"name": "b"}]},
    "stages.1.max_s: checkpoint None, config 1.0": {"stages": [BEFORE, STAGE | {"max_s": 1.0}]},
    "stages.1.slots: checkpoint None, config 2": {"stages": [BEFORE, STAGE | {"slots": 2}]},
    "stages.1.window: checkpoint 'prefix', config 'slice'": {"stages": [BEFORE, STAGE | {"window": "slice"}]},
    "stages.1.trainable: checkpoint [], config ['attn1']": {
        "stages": [BEFORE, STAGE | {"trainable": ["attn1"]}]
    },
    "stages.1.lora.rank: checkpoint None, config 4": {"stages": [BEFORE, STAGE | {"lora": {"rank": 4}}]},
    "stages.0.name: checkpoint 'before', config 'a'": {"stages": [STAGE]},
    "stages.1.name: checkpoint 'a', config None": {"stages": [STAGE]},
}


@pytest.mark.parametrize("message", REFUSED)
def test_another_model_objective_order_or_past_is_refused_field_by_field(
    tmp_path: Path, card: Card, message: str
) -> None:
    saved(config(tmp_path), card)
    with pytest.raises(ConfigError) as caught:
        resumed(config(tmp_path, **REFUSED[message]), card)
    assert message in str(caught.value)


def test_other_data_are_refused(tmp_path: Path, card: Card) -> None:
    two = [{"path": "here"}, {"path": "there"}]
    both = config(tmp_path, dataset="", datasets=two)
    saved(both, card, fingerprints=[card.fingerprint, "another"])
    with pytest.raises(StaleDatasetError, match=r"trained on other data: .*, another, here, there has"):
        resumed(both, card)


def test_a_new_order_of_samples_is_said(tmp_path: Path, card: Card) -> None:
    saved(config(tmp_path), card)
    lines = resume_notes(config(tmp_path), resumed(config(tmp_path), card), plan_digest="of now")
    assert lines[1].startswith("the samples of stage a, or how much of them it uses, have changed")


def test_checkpoints_of_which_none_is_complete_are_never_started_over(tmp_path: Path, card: Card) -> None:
    older, newer = saved(config(tmp_path), card, step=2), saved(config(tmp_path), card, step=3)
    (older / "meta.json").unlink()
    (older.parent / "step-000004").mkdir()
    notes = resume_notes(config(tmp_path), resumed(config(tmp_path), card), plan_digest="of then")
    assert "step-000004, which is newer but not complete: meta.json is missing" in notes[1]
    meta = json.loads((newer / "meta.json").read_text())
    del meta["plan_digest"]
    (newer / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(
        RunError, match=r"step-000002: meta.json is missing; step-000003: meta.json has no plan_digest;.*anew"
    ):
        resumed(config(tmp_path), card)
