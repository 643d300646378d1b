"""`train --check`: sound weights pass, one left at another value does not; and what cannot be told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel
from safetensors.torch import load_file, save_file

from schemas.errors import RunError
from tests.trainer.datasets import write_dataset
from tests.trainer.stock import CONFIGS
from tests.trainer.test_loop import config
from tests.trainer.test_parallel import alone
from trainer import check as module
from trainer.check import Finding
from trainer.checkpoint import locked
from trainer.export import export
from trainer.model_folder import WEIGHTS
from trainer.parallel import World


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def init(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model none of whose weights is where a random one starts."""
    folder = tmp_path_factory.mktemp("init")
    variant = CONFIGS["5b"] | {"in_channels": 16, "out_channels": 16, "text_embed_dim": 24}
    stock = CogVideoXTransformer3DModel(**variant | {"max_text_seq_length": 8})
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.1)
    stock.save_pretrained(folder)
    return folder


def findings(world: World, settings: Any) -> list[Finding]:
    return module.check(settings, world=world)


def outcomes(found: list[Finding]) -> list[bool | None]:
    return [finding.passed for finding in found]


def test_random_weights_pass_and_what_they_cannot_tell_is_said(dataset: Path, tmp_path: Path) -> None:
    found = alone(findings, config(dataset, tmp_path))
    assert outcomes(found) == [True, True, None, None]
    assert found[0].found == f"0 of {found[0].found.split()[2]} differ"
    assert "predict 0 whatever they are told" in found[3].found
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_what_a_killed_check_left_goes_and_nothing_of_a_run_at_work(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / ".tmp-check-old").mkdir()
    (tmp_path / ".tmp-check-old" / "large").write_bytes(b"weights")
    with locked(tmp_path), pytest.raises(RunError, match="another run is training into"):
        alone(findings, config(dataset, tmp_path))
    assert (tmp_path / ".tmp-check-old" / "large").exists()
    assert outcomes(alone(findings, config(dataset, tmp_path)))[0]
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_adapters_alone_beside_random_weights_are_pointed_out(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = {"name": "only", "steps": 6, "lr": {"peak": 1e-3}, "lora": {"rank": 2}}
    alone(findings, config(dataset, tmp_path, stages=[stage]))
    assert "adapters alone are trained, beside weights that are random" in capsys.readouterr().err


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_given_weights_are_told_from_nothing_and_hear_captions(
    dataset: Path, init: Path, tmp_path: Path, lora: dict[str, int] | None
) -> None:
    stage = {"name": "only", "steps": 6, "lr": {"peak": 1e-3}, "lora": lora}
    found = alone(findings, config(dataset, tmp_path, model={"init": str(init)}, stages=[stage]))
    # Noise is not what was trained: worse than predicting nothing, and said so.
    assert outcomes(found) == [True, True, False, True]


def test_one_parameter_at_another_value_is_named(
    dataset: Path, init: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losing(saved: Any, output: Path, *, merge: bool) -> None:
        export(saved, output, merge=merge)
        weights = load_file(output / f"{WEIGHTS}.safetensors")
        weights["proj_out.weight"] = torch.zeros_like(weights["proj_out.weight"])
        save_file(weights, output / f"{WEIGHTS}.safetensors", {"format": "pt"})

    monkeypatch.setattr(module, "export", losing)
    found = alone(findings, config(dataset, tmp_path, model={"init": str(init)}))
    assert outcomes(found)[:2] == [False, False]
    assert found[0].found.endswith("differ: proj_out.weight")
    # A head of zeros hears nothing.
    assert found[3].passed is False
