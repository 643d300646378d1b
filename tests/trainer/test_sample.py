"""Samples against diffusers' own pipelines on the same noise."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel
from diffusers.pipelines.cogvideo.pipeline_cogvideox import CogVideoXPipeline
from diffusers.pipelines.cogvideo.pipeline_cogvideox_image2video import CogVideoXImageToVideoPipeline
from diffusers.schedulers.scheduling_ddim_cogvideox import CogVideoXDDIMScheduler

from schemas.errors import ConfigError
from schemas.train_config import LossConfig, MeshConfig, ValidationConfig
from tests.trainer.datasets import prompt_tensors, write_dataset
from tests.trainer.gloo import on_two_ranks
from tests.trainer.stock import clips, clips_for, packed_model, stock_model
from trainer.collate import PackedInputs, patchify
from trainer.model import PackedModel
from trainer.objective import Objective, Schedule, make_objective
from trainer.order import keyed_generator
from trainer.packing import Pack, Segment
from trainer.parallel import Member, World, join
from trainer.sample import draw, draw_samples, guidance_prompt, unpatchify
from trainer.stage_plan import Read
from trainer.visit import Visit

V = make_objective(LossConfig(), Schedule())
FLOW = make_objective(LossConfig(objective="flow", shift=3.0), Schedule())
STEPS = 3
EMPTY = torch.randn(7, 12, generator=torch.Generator().manual_seed(9))


def ours(
    predict: Any, model: PackedModel, reference: Segment, *, guidance: float, objective: Objective = V
) -> torch.Tensor:
    return draw(
        predict,
        reference,
        objective=objective,
        layout=model.layout,
        steps=STEPS,
        guidance=guidance,
        empty_prompt=None if guidance == 1 else EMPTY,
        device=torch.device("cpu"),
    )


class OnePicture:
    """A VAE that knows one picture, given as the model sees it."""

    config = SimpleNamespace(
        block_out_channels=(1, 1, 1, 1),
        temporal_compression_ratio=4,
        latent_channels=4,
        scaling_factor=1.0,
        invert_scale_latents=False,
    )

    def __init__(self, latents: torch.Tensor) -> None:
        self._latents = latents.movedim(1, 0)[None]

    def encode(self, _: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(latents=self._latents)


def stock(
    transformer: CogVideoXTransformer3DModel,
    reference: Segment,
    *,
    guidance: float,
    scheduler: CogVideoXDDIMScheduler | None = None,
) -> torch.Tensor:
    """What diffusers' pipeline gives for the same weights, prompts, image and noise."""
    parts: dict[str, Any] = {
        "tokenizer": None,
        "text_encoder": None,
        "vae": None,
        "transformer": transformer,
        "scheduler": scheduler or CogVideoXDDIMScheduler.from_config(V.scheduler_config()),
    }
    frames, channels, height, width = reference.latents.shape
    given: dict[str, Any] = {}
    if reference.image_latents is None:
        pipeline: Any = CogVideoXPipeline(**parts)
    else:
        pipeline = CogVideoXImageToVideoPipeline(**parts | {"vae": OnePicture(reference.image_latents)})
        given["image"] = torch.zeros(1, 3, height * 8, width * 8)
    pipeline.set_progress_bar_config(disable=True)
    filled = -frames % (transformer.config["patch_size_t"] or 1)
    noise = torch.randn(
        (frames + filled, channels, height, width), generator=keyed_generator(reference.key, "sample")
    )
    found: torch.Tensor = pipeline(
        **given,
        prompt_embeds=reference.prompt_embeds[None],
        negative_prompt_embeds=EMPTY[None] if guidance > 1 else None,
        height=height * 8,
        width=width * 8,
        num_frames=(frames - 1) * 4 + 1,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        latents=noise[None],
        output_type="latent",
        return_dict=False,
    )[0]
    return found[0, filled:]


@pytest.mark.parametrize("variant", ["5b", "2b", "1.5", "5b-i2v", "1.5-i2v"])
@pytest.mark.parametrize("guidance", [1.0, 6.0])
def test_a_sample_is_what_the_stock_pipeline_draws(variant: str, guidance: float) -> None:
    reference, model = clips_for(variant)[0], packed_model(variant)
    assert (reference.image_latents is not None) == variant.endswith("i2v")
    expected = stock(stock_model(variant), reference, guidance=guidance)
    found = ours(model, model, reference, guidance=guidance)
    assert found.shape == reference.latents.shape
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("objective", [V, FLOW, make_objective(LossConfig(objective="eps"), Schedule())])
def test_a_model_that_knows_the_clip_draws_it(objective: Objective) -> None:
    """The sampler inverts each objective: given what training calls the target, it returns the clip."""
    reference, model = clips([(3, 8, 12, 7)])[0], packed_model("5b")
    clean = reference.latents

    def knowing(inputs: PackedInputs) -> torch.Tensor:
        timestep = inputs.timesteps[0].item()
        noisy = unpatchify(inputs.video, shape=tuple(clean.shape), patch=2, patch_t=1)
        if objective.name == "flow":
            target = (noisy - clean) / max(timestep / 1000, 1e-6)
        else:
            a = objective.schedule.alphas_cumprod()[int(timestep)]
            noise = (noisy - a.sqrt() * clean) / (1 - a).sqrt()
            target = noise if objective.name == "eps" else a.sqrt() * noise - (1 - a).sqrt() * clean
        return patchify(target.float(), patch=2, patch_t=1)

    found = ours(knowing, model, reference, guidance=1.0, objective=objective)
    torch.testing.assert_close(found, clean, rtol=1e-3, atol=1e-3)


def test_patches_are_put_back_where_they_were() -> None:
    latents = torch.randn(4, 3, 6, 8)
    for patch_t in (1, 2):
        patches = patchify(latents, patch=2, patch_t=patch_t)
        assert torch.equal(unpatchify(patches, shape=(4, 3, 6, 8), patch=2, patch_t=patch_t), latents)


@contextmanager
def one_rank() -> Iterator[World]:
    with join(Member.alone(), MeshConfig(), deterministic=True) as world:
        yield world


class Reader:
    """Reads clips by their number, and notes which."""

    def __init__(self) -> None:
        self.opened: list[int] = []

    def read(self, clips_: Sequence[Read]) -> Pack:
        self.opened += [visit.row for _, visit in clips_]
        return Pack(tuple(clips()[visit.row] for _, visit in clips_))

    def prompt(self, clip: Read) -> torch.Tensor | None:
        raise AssertionError("samples are of the clips' own captions")


def sampled(world: World) -> tuple[int, list[int], list[torch.Tensor]]:
    """Forward passes that this rank made, the clips that it read, and the samples of three."""
    model, calls = packed_model("5b"), 0

    def predict(inputs: PackedInputs) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return model(inputs)

    reader = Reader()
    samples = draw_samples(
        predict,
        [(0, Visit(number, 0, 1, "")) for number in range(3)],
        reader=reader,
        objective=V,
        layout=model.layout,
        config=ValidationConfig(sample_steps=STEPS),
        empty_prompt=EMPTY,
        world=world,
    )
    return calls, reader.opened, samples


def test_ranks_share_the_samples_and_make_as_many_forward_passes() -> None:
    with one_rank() as world:
        calls, opened, alone = sampled(world)
    assert (calls, opened) == (3 * STEPS, [0, 1, 2])
    assert [sample.shape for sample in alone] == [clip.latents.shape for clip in clips()[:3]]
    for rank, (calls, opened, shared) in enumerate(on_two_ranks(sampled)):
        assert (calls, opened) == (2 * STEPS, [[0, 2], [1, 2]][rank])
        for found, expected in zip(shared, alone, strict=True):
            assert torch.equal(found, expected)


def test_the_prompt_that_is_guided_against_is_the_empty_one(tmp_path: Path, monkeypatch: Any) -> None:
    dataset = write_dataset(tmp_path / "set")
    prompt = guidance_prompt(dataset, guidance=6.0)
    assert prompt is not None
    np.testing.assert_array_equal(prompt.numpy(), prompt_tensors(-1)["prompt_embeds"].data)
    assert guidance_prompt(dataset, guidance=1.0) is None
    monkeypatch.setattr("trainer.sample.lacks_empty_prompt", lambda _: True)
    with pytest.raises(ConfigError, match=re.escape("set validation.guidance = 1")):
        guidance_prompt(dataset, guidance=6.0)
