"""The objectives against diffusers' schedulers and training formulas."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddim_cogvideox import CogVideoXDDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpm_cogvideox import CogVideoXDPMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from schemas.errors import ConfigError
from schemas.train_config import LossConfig
from trainer.objective import Objective, ObjectiveName, Schedule, make_objective, read_schedule

STEPS = [0, 1, 500, 998, 999]
CLEAN = torch.randn(3, 4, 6, 8, generator=torch.Generator().manual_seed(1))


def objective(name: ObjectiveName = "v", schedule: Schedule | None = None, **loss: Any) -> Objective:
    return make_objective(LossConfig(objective=name, **loss), schedule or Schedule())


def noise(key: str) -> torch.Tensor:
    """What `noised` draws for CLEAN."""
    return objective("eps").noised(CLEAN, key=key, timestep=0)[1]


def stock_scheduler(which: Objective) -> CogVideoXDDIMScheduler:
    return CogVideoXDDIMScheduler.from_config(which.scheduler_config())


@pytest.mark.parametrize("name", ["v", "eps"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_schedule_is_that_of_diffusers(name: ObjectiveName, shift: float) -> None:
    which = objective(name, Schedule(snr_shift_scale=shift))
    ours, stock = which.schedule.alphas_cumprod(), stock_scheduler(which).alphas_cumprod
    torch.testing.assert_close(ours, stock, rtol=1e-12, atol=1e-15)
    assert (ours.diff() < 0).all()
    assert (ours[-1] == 0) == (name == "v")
    if name == "eps" and shift == 1:
        plain = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        torch.testing.assert_close(ours.float(), plain.alphas_cumprod, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["v", "eps"])
@pytest.mark.parametrize("timestep", STEPS)
def test_noising_and_target_are_those_of_diffusers(name: ObjectiveName, timestep: int) -> None:
    which = objective(name)
    noisy, target = which.noised(CLEAN, key="clip", timestep=timestep)
    scheduler, t, drawn = stock_scheduler(which), torch.IntTensor([timestep]), noise("clip")
    torch.testing.assert_close(
        noisy, scheduler.add_noise(CLEAN[None], drawn[None], t)[0], rtol=1e-5, atol=2e-6
    )
    expected = drawn if name == "eps" else scheduler.get_velocity(CLEAN[None], drawn[None], t)[0]
    torch.testing.assert_close(target, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("timestep", STEPS)
def test_the_error_of_v_is_the_weighted_error_of_the_clean_latents(timestep: int) -> None:
    """diffusers' examples/cogvideo weigh the error of get_velocity(output, noisy) by 1 / (1 - a)."""
    generator = torch.Generator().manual_seed(2)
    clean, output = torch.randn(2, 3, 4, 6, 8, generator=generator).double()
    noisy, target = objective().noised(clean, key="clip", timestep=timestep)
    scheduler, t = stock_scheduler(objective()), torch.IntTensor([timestep])
    predicted = scheduler.get_velocity(output[None], noisy[None], t)[0]
    stock = (predicted - clean).square().mean() / (1 - scheduler.alphas_cumprod[timestep])
    ours = (output - target).square().mean()
    assert torch.isfinite(ours)
    assert ours.item() == pytest.approx(stock.item(), rel=2e-4 if timestep < 2 else 1e-5)


@pytest.mark.parametrize("name", ["v", "eps", "flow"])
def test_a_right_prediction_is_one_step_from_the_clip(name: ObjectiveName) -> None:
    """What each objective calls its target is what diffusers' scheduler takes for its model's output."""
    which = objective(name)
    timestep = which.timestep_at(0.5)
    noisy, target = which.noised(CLEAN, key="clip", timestep=timestep)
    if name == "flow":
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(which.scheduler_config())
        scheduler.set_timesteps(timesteps=[timestep], sigmas=[timestep / 1000])
        found = scheduler.step(target, scheduler.timesteps[0], noisy).prev_sample
    else:
        kind = DDIMScheduler if name == "eps" else CogVideoXDDIMScheduler
        found = kind.from_config(which.scheduler_config())
        found.set_timesteps(1)
        found = found.step(target, int(timestep), noisy).pred_original_sample
        if name == "eps":  # DDIMScheduler knows no SNR shift, which is 1 here
            assert which.schedule.snr_shift_scale == 1
    torch.testing.assert_close(found, CLEAN, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_noises_and_shifts_as_diffusers_does(shift: float) -> None:
    which = objective("flow", shift=shift)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(which.scheduler_config())
    for at in (0, 300, 999):
        timestep = scheduler.timesteps[at]
        noisy, target = which.noised(CLEAN, key="clip", timestep=timestep.item())
        expected = scheduler.scale_noise(CLEAN, timestep[None], noise("clip"))
        torch.testing.assert_close(noisy, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(target, noise("clip") - CLEAN)
    # Evenly drawn timesteps are shifted as the scheduler shifts its evenly spaced ones.
    drawn = torch.tensor([which.draw_timestep(f"visit {i}") for i in range(2000)]).sort().values
    expected = scheduler.timesteps.flip(0).repeat_interleave(2)
    assert (drawn - expected).abs().max() < 1000 * 0.05  # Kolmogorov-Smirnov, p = 1e-4, times the slope


def test_logit_normal_timesteps_have_that_distribution() -> None:
    which = objective("flow", timesteps="logit_normal")
    drawn = torch.tensor([which.draw_timestep(f"visit {i}") for i in range(2000)]) / 1000
    logits = torch.logit(drawn)
    assert abs(logits.mean()) < 0.1
    assert abs(logits.std() - 1) < 0.07
    assert 0 < drawn.min() < 0.1
    assert 0.9 < drawn.max() < 1


def test_noise_and_timestep_are_functions_of_the_visit() -> None:
    which = objective()
    clean = torch.zeros(1, 2, 4, 4)
    first, again, other = (which.noised(clean, key=key, timestep=9)[0] for key in ("a", "a", "b"))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    drawn = torch.tensor([which.draw_timestep(f"visit {i}") for i in range(2000)])
    assert drawn.dtype == torch.int64
    assert which.draw_timestep("visit 7") == drawn[7]
    assert drawn.min() < 10
    assert drawn.max() > 989
    assert abs(drawn.float().mean() - 499.5) < 25  # four standard errors


def test_shares_of_a_schedule_are_its_timesteps() -> None:
    assert [objective().timestep_at(share) for share in (0.0, 0.5, 1.0)] == [0, 500, 999]
    assert [objective("flow", shift=3.0).timestep_at(share) for share in (0.0, 0.5, 1.0)] == [0, 500, 1000]


@pytest.mark.parametrize("name", ["v", "eps", "flow"])
def test_a_written_schedule_is_read_again(name: ObjectiveName, tmp_path: Path) -> None:
    loss = LossConfig(objective=name, shift=3.0 if name == "flow" else 1.0)
    which = make_objective(loss, Schedule(snr_shift_scale=1.0 if name == "flow" else 3.0))
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps(which.scheduler_config()))
    assert read_schedule(path) == which.schedule
    assert make_objective(loss, which.schedule) == which


@pytest.mark.parametrize("kind", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler])
@pytest.mark.parametrize("left_out", ["snr_shift_scale", "beta_start", "beta_end", "num_train_timesteps"])
def test_what_a_schedule_leaves_out_is_what_diffusers_takes(kind: Any, left_out: str, tmp_path: Path) -> None:
    path = tmp_path / "scheduler_config.json"
    given = objective().scheduler_config() | {"_class_name": kind.__name__}
    del given[left_out]
    path.write_text(json.dumps(given))
    stock = kind.from_config(given).alphas_cumprod
    torch.testing.assert_close(read_schedule(path).alphas_cumprod(), stock, rtol=1e-12, atol=1e-15)
    shifted = left_out == "snr_shift_scale"
    assert torch.allclose(stock, Schedule().alphas_cumprod(), rtol=1e-6) != shifted


def test_a_schedule_of_another_objective_is_refused(tmp_path: Path) -> None:
    flow = objective("flow", shift=3.0).schedule
    for schedule, loss, message in (
        (replace(Schedule(), objective="eps"), LossConfig(), "'v': the scheduler of model.init says 'eps'"),
        (flow, LossConfig(), "set loss.objective = 'flow'"),
        (flow, LossConfig(objective="flow"), "set loss.shift = 3,"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_objective(loss, schedule)
    path = tmp_path / "scheduler_config.json"
    for change, message in (
        ({"prediction_type": "sample"}, "prediction_type = 'sample', expected 'v_prediction'"),
        ({"prediction_type": "epsilon"}, "rescale_betas_zero_snr = True, expected False"),
        ({"beta_end": -1}, "beta_end = -1, expected a positive float"),
        ({"trained_betas": [0.1, 0.2]}, r"trained_betas = \[0.1, 0.2\], expected None"),
        ({"_class_name": "MyScheduler"}, "_class_name = 'MyScheduler': expected a scheduler of diffusers"),
        ({"_class_name": "AutoencoderKL"}, "_class_name = 'AutoencoderKL': expected a scheduler"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "invert_sigmas = True"),
    ):
        path.write_text(json.dumps(objective().scheduler_config() | change))
        with pytest.raises(ConfigError, match=message):
            read_schedule(path)
