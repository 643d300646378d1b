"""Losses against brute force: every element of every clip, without patches, packs or ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from schemas.bucket import Geometry
from schemas.train_config import LossConfig
from trainer.batch import Batch, prepare
from trainer.collate import patchify
from trainer.layout import Layout, fill_patches
from trainer.losses import batch_loss, clip_losses, latent_frame_weights
from trainer.objective import Objective, Schedule, make_objective
from trainer.packing import Pack, Segment, StepWeights

OBJECTIVE = make_objective(LossConfig(), Schedule())
SHAPES = ((3, 4, 6), (1, 8, 4), (4, 4, 4), (2, 6, 6), (5, 4, 2))
"""T, H, W of the clips; with two frames a patch some must be filled up."""


def layout(patch_t: int) -> Layout:
    return Layout(
        patch=2,
        patch_t=patch_t,
        in_channels=3,
        out_channels=3,
        head_dim=16,
        width=32,
        positions="counted",
        base=(2, 2, 2),
        max_text=9,
    )


def segments(*, weighted: bool = True, unreadable: Sequence[int] = ()) -> list[Segment]:
    made = []
    for i, (frames, height, width) in enumerate(SHAPES):
        generator = torch.Generator().manual_seed(i)
        made.append(
            Segment(
                sample_id=f"clip{i}",
                key=f"visit{i}",
                latents=torch.randn(frames, 3, height, width, generator=generator),
                prompt_embeds=torch.randn(2 + i, 5, generator=generator),
                frame_weights=1 + torch.rand(frames, generator=generator) if weighted else None,
                weight=float(i not in unreadable),
            )
        )
    return made


def prediction_of(segment: Segment, *, patch_t: int) -> torch.Tensor:
    """[T, C, H, W], what a model might say; the same in every pack."""
    clean = fill_patches(segment.latents, patch_t=patch_t)
    return torch.randn(clean.shape, generator=torch.Generator().manual_seed(100 + len(clean)))


def batch_of(clips: Sequence[Segment], *, patch_t: int) -> tuple[torch.Tensor, Batch]:
    """(prediction, batch) of one pack."""
    batch = prepare(Pack(tuple(clips)), objective=OBJECTIVE, layout=layout(patch_t))
    predictions = [patchify(prediction_of(s, patch_t=patch_t), patch=2, patch_t=patch_t) for s in clips]
    return torch.cat(predictions), batch


def weights_of(segment: Segment, *, patch_t: int) -> torch.Tensor:
    weights = torch.ones(len(segment.latents)) if segment.frame_weights is None else segment.frame_weights
    missing = -len(weights) % patch_t
    return torch.cat([weights[:1].expand(missing), weights]).double()


def brute_force(clips: Sequence[Segment], *, patch_t: int, loss: LossConfig) -> float:
    """The loss of a step of these clips, frame by frame."""
    total, tokens = 0.0, 0.0
    losses, sizes = [], []
    for segment in clips:
        clean = fill_patches(segment.latents, patch_t=patch_t)
        timestep = OBJECTIVE.draw_timestep(segment.key)
        target = OBJECTIVE.noised(clean, key=segment.key, timestep=timestep)[1].double()
        found, weights = (
            prediction_of(segment, patch_t=patch_t).double(),
            weights_of(segment, patch_t=patch_t),
        )
        error = sum(w * (f - t).square().mean() for w, f, t in zip(weights, found, target, strict=True))
        error = error / weights.sum()
        if loss.consistency_alpha and len(clean) > 1:
            pairs = [(weights[i] + weights[i + 1]) / 2 for i in range(len(clean) - 1)]
            changes = [
                ((found[i + 1] - found[i]) - (target[i + 1] - target[i])).square().mean()
                for i in range(len(clean) - 1)
            ]
            change = sum(w * c for w, c in zip(pairs, changes, strict=True)) / sum(pairs)
            error = error + loss.consistency_alpha * change
        losses.append(float(error) * segment.weight)
        sizes.append(float(weights.sum()) * clean.shape[2] * clean.shape[3] / 4 / patch_t)
    if loss.normalize == "per_clip":
        return sum(losses) / len(losses)
    total, tokens = sum(e * n for e, n in zip(losses, sizes, strict=True)), sum(sizes)
    return total / tokens


def step_weights(clips: Sequence[Segment], *, patch_t: int) -> StepWeights:
    """As the plan counts them."""
    sizes = [
        float(weights_of(s, patch_t=patch_t).sum()) * s.latents.shape[2] * s.latents.shape[3] / 4 / patch_t
        for s in clips
    ]
    return StepWeights(num_clips=len(clips), num_video_tokens=sum(sizes), num_tokens=0)


@pytest.mark.parametrize("patch_t", [1, 2])
@pytest.mark.parametrize("normalize", ["per_clip", "per_token"])
@pytest.mark.parametrize("alpha", [0.0, 0.7])
@pytest.mark.parametrize("weighted", [True, False])
def test_shares_of_a_step_sum_to_brute_force_however_it_is_packed(
    patch_t: int, normalize: Literal["per_clip", "per_token"], alpha: float, weighted: bool
) -> None:
    clips, loss = segments(weighted=weighted), LossConfig(normalize=normalize, consistency_alpha=alpha)
    expected = brute_force(clips, patch_t=patch_t, loss=loss)
    step = step_weights(clips, patch_t=patch_t)
    for packs in ([clips], [clips[:2], clips[2:]], [[clip] for clip in reversed(clips)]):
        found = 0.0
        for pack in packs:
            prediction, batch = batch_of(pack, patch_t=patch_t)
            found += batch_loss(prediction, batch, loss=loss, step=step)[0].item()
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_gradients_do_not_depend_on_the_packs(alpha: float) -> None:
    clips, loss = segments(), LossConfig(normalize="per_token", consistency_alpha=alpha)
    step = step_weights(clips, patch_t=2)

    def gradients(packs: Sequence[Sequence[Segment]]) -> torch.Tensor:
        parts = []
        for pack in packs:
            prediction, batch = batch_of(pack, patch_t=2)
            prediction.requires_grad_()
            batch_loss(prediction, batch, loss=loss, step=step)[0].backward()
            assert prediction.grad is not None
            parts.append(prediction.grad)
        return torch.cat(parts)

    whole = gradients([clips])
    assert whole.abs().min() > 0
    torch.testing.assert_close(gradients([[clip] for clip in clips]), whole, rtol=1e-5, atol=1e-8)


def test_a_clip_that_could_not_be_read_adds_nothing_and_moves_no_denominator() -> None:
    clips, loss = segments(unreadable=[2]), LossConfig()
    prediction, batch = batch_of(clips, patch_t=1)
    prediction.requires_grad_()
    share, errors = batch_loss(prediction, batch, loss=loss, step=step_weights(clips, patch_t=1))
    share.backward()
    assert share.item() == pytest.approx(brute_force(clips, patch_t=1, loss=loss), rel=1e-5)
    assert prediction.grad is not None
    silent = [bool((part == 0).all()) for part in prediction.grad.split(batch.lengths)]
    assert silent == [False, False, True, False, False]
    assert len(errors) == len(clips)
    assert not errors.requires_grad


def test_a_clip_that_is_not_finite_is_told_from_the_others() -> None:
    prediction, batch = batch_of(segments(), patch_t=1)
    clean = clip_losses(prediction, batch, consistency_alpha=0.5)
    prediction[batch.lengths[0]] = float("nan")
    errors = clip_losses(prediction, batch, consistency_alpha=0.5)
    assert errors.isfinite().tolist() == [True, False, True, True, True]
    assert torch.equal(errors[2:], clean[2:])


def test_the_prediction_may_be_of_a_narrow_type() -> None:
    prediction, batch = batch_of(segments(), patch_t=1)
    losses = clip_losses(prediction.bfloat16(), batch)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, clip_losses(prediction, batch), rtol=1e-2, atol=0)


GEOMETRIES = (
    Geometry(temporal=4, spatial=8, channels=16),
    Geometry(temporal=8, spatial=8, channels=16),
    Geometry(temporal=4, spatial=8, channels=16, causal=False),
    Geometry(temporal=4, spatial=8, channels=16, segment_frames=9),
    Geometry(temporal=4, spatial=8, channels=16, causal=False, segment_frames=8),
)


@given(
    st.sampled_from(GEOMETRIES),
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.floats(0.5, 5.0),
    st.integers(0, 2**32 - 1),
)
def test_keyframe_weights_follow_the_pixel_frames(
    geometry: Geometry, steps: list[int], factor: float, seed: int
) -> None:
    counts = [geometry.frame_least + geometry.frame_step * (n - 1) for n in steps]
    activity = np.random.default_rng(seed).exponential(size=sum(counts)).astype(np.float32)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    found = latent_frame_weights(activity, offsets, geometry=geometry, keyframe_lambda=factor)
    expected: list[float] = []
    for start, count in zip(offsets, counts, strict=False):
        piece = geometry.segment_frames or count
        for first in range(start, start + count, piece):
            groups = [[first]] if geometry.causal else []
            rest = range(first + geometry.causal, first + piece, geometry.temporal)
            groups += [list(range(at, at + geometry.temporal)) for at in rest]
            assert len(groups) == geometry.latent_frames(count) // (count // piece)
            for group in groups:
                mean = float(np.mean([activity[i] for i in group], dtype=np.float64))
                expected.append(1 + (factor - 1) * min(1.0, max(0.0, mean - 1)))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found.dtype == np.float32


def test_a_lambda_of_one_weighs_all_frames_alike() -> None:
    activity = np.array([0.2, 5.0, 1.0, 0.3, 2.0, 3.0], np.float32)
    offsets = np.array([0, 1, 6])
    weights = latent_frame_weights(activity, offsets, geometry=GEOMETRIES[0], keyframe_lambda=1.0)
    assert weights.tolist() == [1.0, 1.0, 1.0]
    weights = latent_frame_weights(activity, offsets, geometry=GEOMETRIES[0], keyframe_lambda=3.0)
    assert weights.tolist() == pytest.approx([1.0, 3.0, 1 + 2 * 0.575])


@pytest.mark.parametrize("timestep", [None, 700])
def test_a_batch_is_noised_by_its_clips_keys_alone(timestep: int | None) -> None:
    def batch(pack: Sequence[Segment]) -> Batch:
        return prepare(Pack(tuple(pack)), objective=OBJECTIVE, layout=layout(2), timestep=timestep)

    clips = segments()
    whole, parts = batch(clips), [batch([clip]) for clip in clips]
    assert torch.equal(whole.inputs.video, torch.cat([part.inputs.video for part in parts]))
    assert torch.equal(whole.target, torch.cat([part.target for part in parts]))
    assert whole.inputs.timesteps.tolist() == [int(part.inputs.timesteps) for part in parts]
    if timestep:
        assert set(whole.inputs.timesteps.tolist()) == {timestep}


def test_the_objective_of_flow_has_timesteps_that_are_no_whole_numbers() -> None:
    flow: Objective = make_objective(LossConfig(objective="flow"), Schedule())
    arguments: dict[str, Any] = {"objective": flow, "layout": layout(1)}
    pack = Pack(tuple(segments()))
    assert prepare(pack, **arguments).inputs.timesteps.dtype == torch.float32
    assert (
        prepare(pack, **arguments, timestep=flow.timestep_at(1.0)).inputs.timesteps.tolist() == [1000.0] * 5
    )


@pytest.mark.gpu
def test_a_loss_on_the_device_is_that_of_the_host_and_waits_for_nothing() -> None:
    device, clips = torch.device("cuda"), segments()
    loss = LossConfig(normalize="per_token", consistency_alpha=0.7)
    step = step_weights(clips, patch_t=2)
    prediction, batch = batch_of(clips, patch_t=2)
    there, moved = prediction.to(device).requires_grad_(), batch.to(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        share, errors = batch_loss(there, moved, loss=loss, step=step)
        share.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected, expected_errors = batch_loss(prediction.requires_grad_(), batch, loss=loss, step=step)
    expected.backward()
    torch.testing.assert_close(share.cpu(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(errors.cpu(), expected_errors, rtol=1e-5, atol=0)
    assert there.grad is not None
    torch.testing.assert_close(there.grad.cpu(), prediction.grad, rtol=1e-4, atol=1e-8)
