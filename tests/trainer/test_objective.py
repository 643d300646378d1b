"""The v objective against diffusers' CogVideoX scheduler and training formula."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers.schedulers.scheduling_ddim_cogvideox import CogVideoXDDIMScheduler
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import ConfigError
from trainer.objective import Schedule, VObjective, clip_errors, clip_weights, read_schedule

STEPS = [0, 1, 500, 998, 999]


def stock_scheduler(schedule: Schedule) -> CogVideoXDDIMScheduler:
    return CogVideoXDDIMScheduler.from_config(schedule.scheduler_config())


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_schedule_is_that_of_diffusers(shift: float) -> None:
    schedule = Schedule(snr_shift_scale=shift)
    ours, stock = schedule.alphas_cumprod(), stock_scheduler(schedule).alphas_cumprod
    torch.testing.assert_close(ours, stock, rtol=1e-12, atol=1e-15)
    assert ours[-1] == 0
    assert (ours.diff() < 0).all()


@pytest.mark.parametrize("timestep", STEPS)
def test_noising_and_target_are_those_of_diffusers(timestep: int) -> None:
    schedule = Schedule()
    clean = torch.randn(3, 4, 6, 8, generator=torch.Generator().manual_seed(1))
    noisy, target = VObjective(schedule).noised(clean, key="clip", timestep=timestep)
    last, _ = VObjective(schedule).noised(clean, key="clip", timestep=999)  # at zero SNR: the noise itself
    scheduler, t = stock_scheduler(schedule), torch.IntTensor([timestep])
    torch.testing.assert_close(
        noisy, scheduler.add_noise(clean[None], last[None], t)[0], rtol=1e-5, atol=2e-6
    )
    torch.testing.assert_close(
        target, scheduler.get_velocity(clean[None], last[None], t)[0], rtol=1e-5, atol=2e-6
    )


@pytest.mark.parametrize("timestep", STEPS)
def test_the_error_of_v_is_the_weighted_error_of_the_clean_latents(timestep: int) -> None:
    """diffusers' examples/cogvideo weigh the error of get_velocity(output, noisy) by 1 / (1 - a)."""
    schedule = Schedule()
    generator = torch.Generator().manual_seed(2)
    clean, output = torch.randn(2, 3, 4, 6, 8, generator=generator).double()
    noisy, target = VObjective(schedule).noised(clean, key="clip", timestep=timestep)
    scheduler, t = stock_scheduler(schedule), torch.IntTensor([timestep])
    predicted = scheduler.get_velocity(output[None], noisy[None], t)[0]
    stock = (predicted - clean).square().mean() / (1 - scheduler.alphas_cumprod[timestep])
    ours = clip_errors(output.flatten(1), target.flatten(1), lengths=[3])[0]
    assert torch.isfinite(ours)
    assert ours.item() == pytest.approx(stock.item(), rel=2e-4 if timestep < 2 else 1e-5)


def test_noise_and_timestep_are_functions_of_the_visit() -> None:
    objective = VObjective(Schedule())
    clean = torch.zeros(1, 2, 4, 4)
    first, again, other = (objective.noised(clean, key=key, timestep=9)[0] for key in ("a", "a", "b"))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    drawn = torch.tensor([objective.draw_timestep(f"visit {i}") for i in range(2000)])
    assert objective.draw_timestep("visit 7") == drawn[7]
    assert drawn.min() < 10
    assert drawn.max() > 989
    assert abs(drawn.float().mean() - 499.5) < 25  # four standard errors


@given(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=4), min_size=1, max_size=5))
def test_weights_of_a_step_sum_to_one_however_it_is_packed(packs: list[list[int]]) -> None:
    clips, tokens = sum(map(len, packs)), sum(map(sum, packs))

    def all_weights(packs: list[list[int]], normalize: str) -> torch.Tensor:
        return torch.cat(
            [
                clip_weights(pack, normalize=normalize, step_clips=clips, step_tokens=tokens)  # type: ignore[arg-type]
                for pack in packs
            ]
        )

    for normalize in ("per_clip", "per_token"):
        weights = all_weights(packs, normalize)
        assert weights.sum().item() == pytest.approx(1, abs=1e-5)
        assert torch.equal(weights, all_weights([[n] for pack in packs for n in pack], normalize))


def test_per_token_weighs_elements_alike_and_per_clip_clips() -> None:
    prediction, target = torch.zeros(4, 2), torch.tensor([[1.0], [2.0], [2.0], [3.0]]).expand(4, 2)
    errors = clip_errors(prediction, target, lengths=[1, 3])
    for normalize, expected in (("per_token", target.square().mean()), ("per_clip", (1 + 17 / 3) / 2)):
        weights = clip_weights([1, 3], normalize=normalize, step_clips=2, step_tokens=4)  # type: ignore[arg-type]
        assert (errors * weights).sum().item() == pytest.approx(float(expected))


def test_a_schedule_with_another_objective_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps(Schedule(snr_shift_scale=3.0).scheduler_config()))
    assert read_schedule(path) == Schedule(snr_shift_scale=3.0)
    path.write_text(json.dumps(Schedule().scheduler_config() | {"prediction_type": "epsilon"}))
    with pytest.raises(ConfigError, match="prediction_type = 'epsilon', expected 'v_prediction'"):
        read_schedule(path)
