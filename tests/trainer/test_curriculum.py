"""Stages and learning rate are plain arithmetic with exact answers."""

from __future__ import annotations

from itertools import pairwise

import pytest

from schemas.errors import ConfigError
from schemas.train_config import LrConfig, StageConfig, TrainConfig
from trainer.curriculum import Source, first_weights, lr_at, stage_at, total_steps

STAGES = tuple(
    StageConfig(name=name, steps=steps, lr=LrConfig(peak=1.0))
    for name, steps in (("a", 3), ("b", 1), ("c", 2))
)


def test_every_step_belongs_to_one_stage_in_order() -> None:
    found = [(stage.name, inside) for stage, inside in (stage_at(step, STAGES) for step in range(6))]
    assert found == [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("c", 0), ("c", 1)]
    assert total_steps(STAGES) == 6


@pytest.mark.parametrize("step", [-1, 6])
def test_a_step_outside_the_run_says_where_it_ends(step: int) -> None:
    with pytest.raises(ConfigError, match=rf"step = {step} is outside .* 3 stages have steps 0 to 5"):
        stage_at(step, STAGES)


def test_a_stage_brings_weights_or_goes_on_and_the_first_has_the_models() -> None:
    stages = [{"name": name, "steps": 1, "lr": {"peak": 1.0}, "init": name} for name in ("own", "", "later")]
    model = {"init": "base", "revision": "v1"}
    config = TrainConfig.model_validate({"dataset": "d", "output": "o", "model": model, "stages": STAGES})
    assert first_weights(config, 0) == Source("base", revision="v1", key="model.init")
    stages[1]["name"] = "next"
    config = config.model_copy(update={"stages": tuple(map(StageConfig.model_validate, stages))})
    assert [first_weights(config, number) for number in range(3)] == [
        Source("own", revision="", key="stages.0.init"),
        None,
        Source("later", revision="", key="stages.2.init"),
    ]


def test_warmup_then_cosine_to_zero() -> None:
    lr = LrConfig(peak=8.0, warmup=4)
    rates = [lr_at(step, lr, steps=12) for step in range(13)]
    assert rates[:5] == [2.0, 4.0, 6.0, 8.0, 8.0]
    assert rates[8] == pytest.approx(4.0)
    assert rates[12] == pytest.approx(0.0, abs=1e-12)
    assert all(a > b for a, b in pairwise(rates[4:]))


def test_constant_stays_at_its_peak() -> None:
    lr = LrConfig(peak=3.0, warmup=2, kind="constant")
    assert [lr_at(step, lr, steps=5) for step in range(5)] == [1.5, 3.0, 3.0, 3.0, 3.0]
