"""Collation: what is refused, where patches, spans, prompts and image latents lie in the stream."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.pipelines.cogvideo.pipeline_cogvideox_image2video import CogVideoXImageToVideoPipeline
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import ConfigError
from tests.trainer.stock import clips, clips_for, pack_inputs, tiny_architecture
from trainer.attention import host_bounds
from trainer.collate import collate, patchify, with_image
from trainer.layout import Layout, fill_patches, num_spans, span_patches


def test_a_pack_whose_parts_disagree_is_refused() -> None:
    inputs, _ = pack_inputs(clips_for("5b-i2v"), variant="5b-i2v")
    assert inputs.cos is not None
    assert inputs.learned_row is not None
    for change in (
        {"max_seqlen": 3},
        {"max_clip": 3},
        {"max_text": 3},
        {"cu_seqlens": inputs.cu_seqlens[[0, -1]]},
        {"clip_seqlens": inputs.clip_seqlens[[0, -1]]},
        {"text_seqlens": inputs.text_seqlens[[0, -1]]},
        {"video": inputs.video[:-1]},
        {"cos": inputs.cos[:-1]},
        {"learned_row": inputs.learned_row[:-1]},
    ):
        with pytest.raises(ValueError, match="parts disagree"):
            dataclasses.replace(inputs, **change)
    with pytest.raises(ValueError, match="must rise strictly"):
        dataclasses.replace(inputs, cu_seqlens=inputs.cu_seqlens.flip(0))


def test_lists_that_do_not_go_together_are_refused() -> None:
    layout = tiny_architecture("5b").layout
    latents, prompt = torch.zeros(1, 4, 4, 4), torch.zeros(7, 12)
    with pytest.raises(ValueError, match="as many of each"):
        collate([], [prompt], [0], layout=layout)
    with pytest.raises(ValueError, match="a model that takes none"):
        collate([latents], [prompt], [0], layout=layout, images=[latents])
    with pytest.raises(ConfigError, match=r"positions, for clips of 3 x 16 x 24 latents .* found 1 x 4 x 4"):
        collate([latents], [prompt], [0], layout=tiny_architecture("5b-i2v").layout)


def test_whole_timesteps_stay_whole_and_others_do_not_become_so() -> None:
    layout = tiny_architecture("5b").layout
    one = ([torch.zeros(1, 4, 4, 4)], [torch.zeros(7, 12)])
    assert collate(*one, [7], layout=layout).timesteps.dtype == torch.int64
    assert collate(*one, [7.5], layout=layout).timesteps.tolist() == [7.5]


def test_patches_are_cut_in_the_order_of_the_embedding() -> None:
    latents = torch.randn(4, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    conv = torch.nn.Conv2d(3, 5, kernel_size=2, stride=2)
    expected = conv(latents).flatten(2).transpose(1, 2).flatten(0, 1)
    found = torch.nn.functional.linear(
        patchify(latents, patch=2, patch_t=1), conv.weight.flatten(1), conv.bias
    )
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="multiples of the patch"):
        patchify(latents[:3], patch=2, patch_t=2)
    filled = fill_patches(latents[:3], patch_t=2)
    assert torch.equal(filled, torch.cat([latents[:1], latents[:3]]))


@pytest.mark.parametrize(("patch_t", "frames"), [(None, 3), (2, 3), (2, 4)])
def test_image_latents_lie_where_the_stock_pipeline_puts_them(patch_t: int | None, frames: int) -> None:
    image = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    distribution = SimpleNamespace(latent_dist=SimpleNamespace(sample=lambda generator: image[:, :, None]))
    pipeline = SimpleNamespace(
        vae=SimpleNamespace(
            encode=lambda image: distribution, config=SimpleNamespace(invert_scale_latents=False)
        ),
        vae_scale_factor_temporal=4,
        vae_scale_factor_spatial=8,
        vae_scaling_factor_image=1.0,
        transformer=SimpleNamespace(config=SimpleNamespace(patch_size_t=patch_t)),
        scheduler=SimpleNamespace(init_noise_sigma=1.0),
    )
    clip = fill_patches(torch.randn(frames, 4, 6, 8), patch_t=patch_t or 1)
    _, expected = CogVideoXImageToVideoPipeline.prepare_latents(
        pipeline,  # type: ignore[arg-type]
        torch.zeros(1, 3, 48, 64),
        num_channels_latents=4,
        num_frames=(len(clip) - 1) * 4 + 1,  # the pipeline adds the filled-up frames before this call
        height=48,
        width=64,
        latents=torch.zeros(()),
    )
    assert torch.equal(with_image(clip, image), torch.cat([clip, expected[0]], dim=1))
    assert torch.equal(with_image(clip, None), torch.cat([clip, torch.zeros_like(clip)], dim=1))


def test_text_apart_is_no_part_of_the_stream() -> None:
    layout = dataclasses.replace(tiny_architecture("5b").layout, text="cross", local_frames=2)
    segments = clips()
    inputs = collate(
        [segment.latents for segment in segments],
        [segment.prompt_embeds[: 3 + i] for i, segment in enumerate(segments)],
        [0] * 4,
        layout=layout,
    )
    assert torch.equal(inputs.order, torch.arange(len(inputs.video)))
    assert inputs.modulation_row.max() == 3
    assert inputs.text_seqlens.tolist() == [0, 3, 7, 12, 18]
    assert inputs.clip_seqlens.diff().tolist() == list(inputs.video_lengths)
    assert len(inputs.cu_seqlens) == 6  # the clip of five frames has two spans, the others one
    assert inputs.max_text == 6


def local_layout(*, local: int, leading: int, patch_t: int) -> Layout:
    layout = tiny_architecture("5b").layout
    return dataclasses.replace(layout, local_frames=local * patch_t, leading_frames=leading, patch_t=patch_t)


@given(
    frames=st.integers(1, 300),
    local=st.integers(1, 20),
    leading=st.integers(0, 1),
    patch_t=st.integers(1, 2),
)
def test_spans_cover_a_clip_and_are_counted_alike(
    frames: int, local: int, leading: int, patch_t: int
) -> None:
    layout = local_layout(local=local, leading=leading, patch_t=patch_t)
    patches = -(-frames // patch_t)
    spans = span_patches(patches, layout)
    assert sum(spans) == patches
    assert all(span == local for span in spans[1:-1])
    assert 0 < spans[-1] <= local + (leading if len(spans) == 1 else 0)
    assert len(spans) == 1 or spans[0] == local + leading
    count = {"local_frames": local * patch_t, "leading_frames": leading, "patch_t": patch_t}
    assert num_spans(frames, **count) == len(spans)
    assert num_spans(np.array([frames, 1]), **count).tolist() == [len(spans), 1]


def test_ttt_videos_curriculum_has_one_span_for_each_three_seconds() -> None:
    frames = np.array([13, 37, 73, 121, 253])
    assert num_spans(frames, local_frames=12).tolist() == [1, 3, 6, 10, 21]
    assert num_spans(frames, local_frames=0).tolist() == [1] * 5
    assert num_spans(39, local_frames=13, leading_frames=0) == 3
    with pytest.raises(ValueError, match="expected a multiple of patch_t"):
        num_spans(13, local_frames=3, patch_t=2)


def test_a_pack_that_moves_keeps_its_bounds_at_hand() -> None:
    """Numbers on a GPU would make the host wait; on the meta device there are none to wait for."""
    inputs, _ = pack_inputs(clips(), variant="5b", local_frames=2)
    moved = inputs.to(torch.device("meta"))
    for name in ("cu_seqlens", "clip_seqlens", "text_seqlens"):
        assert host_bounds(getattr(moved, name)) == getattr(inputs, name).tolist()


def test_positions_over_spans_are_made_for_layers_that_take_them() -> None:
    plain = tiny_architecture("5b", local_frames=2)
    for plan, there in ((plain, False), (dataclasses.replace(plain, long_context="linear"), True)):
        inputs = collate(
            [clip.latents for clip in clips()],
            [clip.prompt_embeds for clip in clips()],
            [1, 2, 3, 4],
            layout=plan.layout,
        )
        assert (inputs.clip_cos is not None) == (inputs.clip_sin is not None) == there
