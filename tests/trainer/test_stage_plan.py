"""A stage's plan: exactly once under every option, windows inside samples, exact sizes, honest digests."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.bucket import Geometry
from schemas.errors import ConfigError, DatasetError
from tests.trainer.catalogs import (
    EMPTY_PROMPT,
    FPS,
    Clip,
    make_catalog,
    plan_config,
    stage_plan,
    video_tokens,
)
from tests.trainer.test_losses import layout
from trainer.batch import prepare
from trainer.catalog import Catalog
from trainer.held_out import held_out_rows
from trainer.mixture import Mixture
from trainer.objective import Schedule, make_objective
from trainer.order import hash_strings
from trainer.packing import Pack, Segment
from trainer.plan import PackPlan, Step
from trainer.stage_plan import StagePlan
from trainer.visit import Visit

CLIPS = [
    Clip(
        5 + 4 * (number % 7),
        prompts=((4,), (5, 7, 4), (6, 3))[number % 3],
        shard=(number * number) % 7,
        width=32 + 16 * (number % 2),
        weights=tuple(0.5 + (number + i) % 4 * 0.5 for i in range(5 + 4 * (number % 7))),
    )
    for number in range(24)
]
PIECES = Geometry(temporal=4, spatial=8, channels=16, segment_frames=5)


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    return make_catalog(tmp_path_factory.mktemp("plan") / "set", CLIPS)


@pytest.fixture(scope="module")
def mixture(catalog: Catalog, tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    root = tmp_path_factory.mktemp("mixture")
    small = make_catalog(root / "small", CLIPS[:7], seed=1)  # which the first one has too
    other = make_catalog(root / "other", [replace(clip, source=f"o{i}") for i, clip in enumerate(CLIPS[:5])])
    return Mixture([catalog, small, other], weights=[0.5, 2, 1.5])


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    clips = [Clip(5 * (1 + number % 6), shard=number // 4) for number in range(20)]
    return make_catalog(tmp_path_factory.mktemp("pieces") / "set", clips, geometry=PIECES)


def visits(plan: StagePlan, steps: int) -> list[tuple[int, Visit]]:
    return [read for step in range(steps) for pack in plan.step(step) for read in plan.reads(pack)]


def of_pack(plan: StagePlan, pack: PackPlan) -> tuple[int, float, int]:
    """(clips, weighted video tokens, tokens) of a pack by the visits that it reads, one by one."""
    video, tokens = 0.0, 0
    for dataset, visit in plan.reads(pack):
        catalog = plan.mixture.catalogs[dataset]
        height, width = catalog.shapes[visit.row, 2:].tolist()
        cells = height // 2 * (width // 2)
        prompt = EMPTY_PROMPT if visit.empty_prompt else int(catalog.prompt_shapes[visit.row, 0])
        weights = visit.frame_weights or (1.0,) * visit.latent_frames
        video += cells * sum(weights)
        tokens += cells * visit.latent_frames + prompt
    return len(pack.rows), video, tokens


@settings(deadline=None, max_examples=25)
@given(
    captions=st.sampled_from(["each", "lot"]),
    dropout=st.sampled_from([0.0, 0.3, 1.0]),
    window=st.sampled_from(["prefix", "slice"]),
    bound=st.sampled_from([{}, {"max_frames": 9}, {"max_s": 1.5}]),
    filter_=st.sampled_from([{}, {"min_s": 1.0}]),
    slots=st.integers(1, 3),
    share=st.sampled_from([0.0, 0.2]),
    seed=st.integers(0, 5),
)
def test_every_sample_comes_exactly_as_often_as_it_should(
    mixture: Mixture,
    captions: str,
    dropout: float,
    window: str,
    bound: dict[str, Any],
    filter_: dict[str, Any],
    slots: int,
    share: float,
    seed: int,
) -> None:
    config = plan_config(
        stage={"window": window, "filter": filter_, **bound},
        data={"captions": captions, "caption_dropout": dropout, "slots": slots},
        validation={"share": share},
        seed=seed,
    )
    plan = stage_plan(mixture, config)
    steps: list[Step] = []
    while not steps or max(pack.epoch for pack in steps[-1]) < 6:
        steps.append(plan.step(len(steps)))
    seen: Counter[int] = Counter()
    keys: list[str] = []
    for step in steps:
        assert len(step) == slots
        for pack in step:
            clips, _, tokens = of_pack(plan, pack)
            assert clips > 0
            assert tokens <= 100
            seen.update(pack.rows if pack.epoch < 4 else ())
            keys += [visit.key for _, visit in plan.reads(pack)]
    assert len(set(keys)) == len(keys), "two visits share their draws"
    assert set(seen) <= set(plan.rows.tolist())
    of_clip: Counter[tuple[int, str]] = Counter()
    wanted = {(mixture.locate(row)[0], mixture.sample_id(row)) for row in plan.rows.tolist()}
    for row, times in seen.items():
        of_clip[mixture.locate(row)[0], mixture.sample_id(row)] += times
        if captions == "each":
            assert times == (2, 8, 6)[mixture.locate(row)[0]], "in four epochs, by weight"
    if captions == "lot":
        assert of_clip == Counter({clip: (2, 8, 6)[clip[0]] for clip in wanted})
    else:
        assert set(seen) == set(plan.rows.tolist())


def test_any_step_in_any_order_reads_the_same(mixture: Mixture) -> None:
    config = plan_config(
        stage={"window": "slice", "max_frames": 9},
        data={"captions": "lot", "caption_dropout": 0.4, "slots": 2},
    )
    forward = stage_plan(mixture, config)
    expected = [[forward.reads(pack) for pack in forward.step(step)] for step in range(60)]
    for step in (59, 3, 31, 0, 58):
        fresh = stage_plan(mixture, config)
        assert [fresh.reads(pack) for pack in fresh.step(step)] == expected[step]
        assert [forward.reads(pack) for pack in forward.step(step)] == expected[step]


def drawn(plan: StagePlan, steps: int) -> dict[str, tuple[int, bool, bool]]:
    return {v.key: (v.first, v.empty_prompt, v.drop_image) for _, v in visits(plan, steps)}


def test_draws_are_those_of_the_visit_however_it_is_packed(catalog: Catalog) -> None:
    card = catalog.card
    catalog.card = card.model_copy(update={"image": "first_latent"})
    try:
        for window, images in (("slice", False), ("prefix", True)):
            plans = [
                stage_plan(
                    catalog,
                    plan_config(
                        stage={"window": window, "max_frames": 9, "budget_tokens": budget},
                        data={"caption_dropout": 0.25, "image_dropout": 0.1, "slots": slots},
                    ),
                    images=images,
                )
                for budget, slots in ((100, 1), (300, 4))
            ]
            one, other = drawn(plans[0], 600), drawn(plans[1], 50)
            shared = one.keys() & other.keys()
            assert len(shared) > 400
            assert all(one[key] == other[key] for key in shared)
            shares = np.mean([value[1:] for value in one.values()], axis=0)
            assert shares == pytest.approx([0.25, 0.1 if images else 0.0], abs=0.03)
            assert len(one) > 2000
    finally:
        catalog.card = card


def test_dropped_captions_are_other_ones_in_each_pass(catalog: Catalog) -> None:
    plan = stage_plan(catalog, plan_config(data={"caption_dropout": 0.5}))
    times = Counter(visit.row for _, visit in visits(plan, 300) if visit.empty_prompt)
    passes = max(turn for step in range(300) for pack in plan.step(step) for turn in pack.passes)
    assert passes > 15
    assert all(0 < times[row] < passes for row in range(len(catalog)))


def test_slices_lie_inside_and_begin_anywhere(catalog: Catalog) -> None:
    plan = stage_plan(catalog, plan_config(stage={"window": "slice", "max_frames": 9}))
    begun: dict[int, set[int]] = {}
    for _, visit in visits(plan, 900):
        whole = int(catalog.shapes[visit.row, 0])
        assert visit.latent_frames == min(3, whole)
        assert 0 <= visit.first <= whole - visit.latent_frames
        assert visit.seconds == pytest.approx(
            4 * (visit.latent_frames - 1) / FPS + (3 / FPS if visit.first else 0)
        )
        begun.setdefault(visit.row, set()).add(visit.first)
    assert all(places == set(range(max(1, int(catalog.shapes[row, 0]) - 2))) for row, places in begun.items())


@pytest.mark.parametrize(("max_s", "length"), [(1.3, 2), (2.0, 3), (0.1, 1)])
def test_segments_are_whole_pieces(pieces: Catalog, max_s: float, length: int) -> None:
    plan = stage_plan(pieces, plan_config(stage={"window": "segments", "max_s": max_s}))
    begun: set[tuple[int, int]] = set()
    for _, visit in visits(plan, 300):
        whole = int(pieces.shapes[visit.row, 0])
        assert visit.first % 2 == 0  # two latent frames a piece of five
        assert visit.latent_frames == min(2 * length, whole)
        assert visit.first + visit.latent_frames <= whole
        assert visit.seconds == pytest.approx((5 * visit.latent_frames // 2 - 1) / FPS)
        begun.add((whole, visit.first))
    assert begun == {
        (whole, first) for whole in range(2, 14, 2) for first in range(0, max(1, whole - 2 * length + 1), 2)
    }


def test_windows_need_what_the_dataset_has(catalog: Catalog) -> None:
    with pytest.raises(ConfigError, match="'all': window = 'segments' needs latents encoded in independent"):
        stage_plan(catalog, plan_config(stage={"window": "segments", "max_s": 1.0}))


@pytest.mark.parametrize(
    ("geometry", "max_frames", "message"),
    [
        (Geometry(temporal=4, spatial=8, channels=16), 16, r"takes 4n \+ 1 frames; nearest are 13 and 17"),
        (Geometry(temporal=8, spatial=8, channels=16, causal=False), 4, "takes 8n frames; nearest is 8"),
        (PIECES, 16, "takes a multiple of 5 frames; nearest are 15 and 20"),
        (Geometry(temporal=4, spatial=8, channels=16), 5, None),
        (Geometry(temporal=1, spatial=8, channels=16), 16, None),
    ],
)
def test_max_frames_is_a_count_the_encoder_takes(
    tmp_path: Path, geometry: Geometry, max_frames: int, message: str | None
) -> None:
    frames = {1: [16, 17, 40], 8: [8, 16]}.get(geometry.temporal, [25, 45] if geometry.causal else [])
    if geometry.segment_frames:
        frames = [5, 25]
    catalog = make_catalog(tmp_path / "set", [Clip(count) for count in frames], geometry=geometry)
    config = plan_config(stage={"max_frames": max_frames})
    if message is None:
        plan = stage_plan(catalog, config)
        assert plan.latent_frames.tolist() == [geometry.latent_frames(max_frames)] * len(frames)
    else:
        with pytest.raises(ConfigError, match=f"max_frames = {max_frames}, .*{message}.*frame by frame"):
            stage_plan(catalog, config)


@pytest.mark.parametrize("patch_t", [1, 2])
@pytest.mark.parametrize("keyframe_lambda", [1.0, 3.0])
def test_sizes_of_a_step_are_those_of_its_visits(
    catalog: Catalog, patch_t: int, keyframe_lambda: float
) -> None:
    config = plan_config(
        stage={"window": "slice", "max_frames": 13, "slots": 3},
        data={"caption_dropout": 0.4},
        loss={"keyframe_lambda": keyframe_lambda},
    )
    plan = stage_plan(catalog, config, patch_t=patch_t)
    weighed = set()
    for step in range(30):
        clips, video, tokens = 0, 0.0, 0
        for pack in plan.step(step):
            for _, visit in plan.reads(pack):
                weights = [*(visit.frame_weights or [1.0] * visit.latent_frames)]
                weighed |= set(weights)
                # The activity of each pixel frame, averaged over the latent frame's own.
                source = _clip_of(catalog, visit.row)
                assert weights == pytest.approx(
                    _weights(source, visit.first, visit.latent_frames, keyframe_lambda)
                )
                weights = weights[:1] * (-len(weights) % patch_t) + weights
                cells = video_tokens(source, 1)
                clips += 1
                video += cells * sum(weights) / patch_t
                tokens += cells * len(weights) // patch_t
                tokens += EMPTY_PROMPT if visit.empty_prompt else int(catalog.prompt_shapes[visit.row, 0])
        sizes = plan.step_weights(plan.step(step))
        assert (sizes.num_clips, sizes.num_tokens) == (clips, tokens)
        assert sizes.num_video_tokens == pytest.approx(video, rel=1e-12)
    assert weighed == {1.0} if keyframe_lambda == 1 else len(weighed) > 3


def _clip_of(catalog: Catalog, row: int) -> Clip:
    return CLIPS[int(str(catalog._column("source_digest")[row]).removeprefix("file "))]


def _weights(clip: Clip, first: int, length: int, keyframe_lambda: float) -> list[float]:
    assert clip.weights is not None
    groups = [clip.weights[:1], *(clip.weights[at : at + 4] for at in range(1, clip.frames, 4))]
    means = [sum(group) / len(group) for group in groups][first : first + length]
    return [1 + (keyframe_lambda - 1) * min(max(mean - 1, 0), 1) for mean in means]


@pytest.mark.parametrize("patch_t", [1, 2])
def test_weighted_tokens_are_those_of_the_batches(catalog: Catalog, patch_t: int) -> None:
    config = plan_config(stage={"max_frames": 9, "window": "slice"}, loss={"keyframe_lambda": 3.0})
    plan = stage_plan(catalog, config, patch_t=patch_t)  # windows of 2 and of 3 latent frames
    objective = make_objective(config.loss, Schedule())
    for step in range(20):
        packs = plan.step(step)
        found = 0.0
        for pack in packs:
            segments = [
                Segment(
                    sample_id=visit.key,
                    key=visit.key,
                    latents=torch.zeros(visit.latent_frames, 3, *catalog.shapes[visit.row, 2:].tolist()),
                    prompt_embeds=torch.zeros(2, 8),
                    frame_weights=torch.tensor(visit.frame_weights),
                )
                for _, visit in plan.reads(pack)
            ]
            batch = prepare(Pack(tuple(segments)), objective=objective, layout=layout(patch_t))
            found += float(batch.weight_sums.sum()) / patch_t
        assert plan.step_weights(packs).num_video_tokens == pytest.approx(found, rel=1e-6)


def test_frame_weights_must_be_there(tmp_path: Path) -> None:
    catalog = make_catalog(tmp_path / "set", [Clip(5)])
    with pytest.raises(DatasetError, match=r"frame_weights for loss\.keyframe_lambda"):
        stage_plan(catalog, plan_config(loss={"keyframe_lambda": 2.0}))


def test_prompts_outside_the_stream_take_no_room(tmp_path: Path) -> None:
    catalog = make_catalog(tmp_path / "set", [Clip(5), Clip(9, prompts=(400,))])
    config = plan_config(stage={"budget_tokens": 12}, data={"caption_dropout": 0.5})
    plan = stage_plan(catalog, config, text="cross", local_frames=1)
    assert sorted(plan.tokens.whole.tolist()) == [8, 12]
    for step in range(6):
        assert plan.step_weights(plan.step(step)).num_tokens in (8, 12)
    with pytest.raises(ConfigError, match=r"\(8 video, 1 x 0 prompt\); no length of prompts suits"):
        stage_plan(catalog, plan_config(stage={"token_multiple": 3}), text="cross")


def test_weights_that_leave_epochs_empty_are_refused(catalog: Catalog) -> None:
    stage_plan(Mixture([catalog, catalog], weights=[0.011] * 2), plan_config()).step(0)
    with pytest.raises(ConfigError, match=r"an epoch of all datasets has 0\.96 .*multiply all weights by 2"):
        stage_plan(Mixture([catalog, catalog], weights=[0.01] * 2), plan_config())


def test_each_span_of_local_attention_has_its_own_prompt(tmp_path: Path) -> None:
    catalog = make_catalog(tmp_path / "set", [Clip(frames) for frames in (1, 5, 9, 13, 17, 33)])
    plan = stage_plan(catalog, plan_config(), local_frames=2)
    spans = [1, 1, 1, 2, 2, 4]  # 1, 2, 3, 4, 5 and 9 latent frames: the first counts to the first span
    found = dict(zip(catalog.shapes[:, 0].tolist(), plan.tokens.whole.tolist(), strict=True))
    assert found == {
        frames: 4 * frames + 4 * count for frames, count in zip((1, 2, 3, 4, 5, 9), spans, strict=True)
    }


def test_a_stage_has_its_own_budget_and_slots(catalog: Catalog) -> None:
    plan = stage_plan(catalog, plan_config(stage={"budget_tokens": 200, "slots": 5}))
    step = plan.step(0)
    assert len(step) == 5
    assert 100 < max(of_pack(plan, pack)[2] for pack in step) <= 200
    with pytest.raises(
        ConfigError, match=r"its budget_tokens = 40: sample \w+ alone needs 55 tokens .*set its"
    ):
        stage_plan(catalog, plan_config(stage={"budget_tokens": 40}))


def test_the_empty_prompt_counts_for_the_budget(tmp_path: Path) -> None:
    catalog = make_catalog(tmp_path / "set", [Clip(5, prompts=(1,))])
    stage_plan(catalog, plan_config(stage={"budget_tokens": 9}))
    with pytest.raises(ConfigError, match=r"alone needs 11 tokens .*8 video, 3 prompt"):
        stage_plan(catalog, plan_config(stage={"budget_tokens": 9}, data={"caption_dropout": 0.1}))


def test_the_token_rule_names_lengths_of_prompts_that_would_do(tmp_path: Path) -> None:
    catalog = make_catalog(
        tmp_path / "set",
        [Clip(49, prompts=(226,), height=480, width=720), Clip(145, prompts=(226,), height=480, width=720)],
    )
    config = {"budget_tokens": 60000, "token_multiple": 64}
    model = {"local_frames": 12}
    with pytest.raises(
        ConfigError, match=r"token_multiple = 64, .* has 17776 tokens \(17550 video, 1 x 226 prompt\); "
    ) as caught:
        stage_plan(catalog, plan_config(stage={**config, "max_s": 6.0}), **model)
    assert "prompts of 178 or 242 tokens" in str(caught.value)
    suits = make_catalog(tmp_path / "suits", [Clip(49, prompts=(242,), height=480, width=720)])
    stage_plan(suits, plan_config(stage=config), **model)
    dropped = plan_config(stage=config, data={"caption_dropout": 0.1})
    with pytest.raises(
        ConfigError, match=r"has 17553 tokens \(17550 video, 1 x 3 empty prompt\); prompts of 50 "
    ):
        stage_plan(suits, dropped, **model)


def test_clips_held_out_are_held_to_the_stages_rules(tmp_path: Path) -> None:
    sources = [f"file {number}" for number in range(20)]
    alike = Mixture([make_catalog(tmp_path / "alike", [Clip(9, source=source) for source in sources])])
    held = set(alike.source_hashes[held_out_rows(alike, share=0.2)].tolist())
    longer = [hash_strings(pa.array([source]))[0] in held for source in sources]
    clips = [Clip(17 if odd else 9, source=source) for source, odd in zip(sources, longer, strict=True)]
    catalog = make_catalog(tmp_path / "set", clips)
    plan = stage_plan(catalog, plan_config(validation={"share": 0.2}))
    assert set(plan.latent_frames[plan.rows].tolist()) == {3}
    assert plan.latent_shapes == {(3, 4, 4), (5, 4, 4)}
    with pytest.raises(ConfigError, match=r"token_multiple = 16, .* has 24 tokens"):
        stage_plan(catalog, plan_config(validation={"share": 0.2}, stage={"token_multiple": 16}))


def test_describe_says_what_the_stage_does(catalog: Catalog, pieces: Catalog) -> None:
    lines = stage_plan(
        catalog,
        plan_config(
            stage={"window": "slice", "max_frames": 9, "filter": {"min_s": 1.0}},
            data={"balance_packs": 10, "slots": 4},
            validation={"share": 0.2},
        ),
    ).describe()
    assert lines[0].startswith("stage all: ")
    assert "of 48 samples, " in lines[0]
    assert lines[0].endswith("packs of like cost share a step, among 8")
    assert lines[1].endswith("samples held out")
    assert "--drift" in lines[2]
    for quiet in ({"max_frames": 9}, {"window": "slice"}):
        assert len(stage_plan(catalog, plan_config(stage=quiet)).describe()) == 1
    assert len(stage_plan(pieces, plan_config(stage={"window": "segments", "max_s": 1.0})).describe()) == 1


def test_the_digest_changes_with_the_steps_and_with_nothing_else(
    catalog: Catalog, mixture: Mixture, tmp_path: Path
) -> None:
    def digest(of: Catalog | Mixture = catalog, model: dict[str, Any] | None = None, **settings: Any) -> str:
        return stage_plan(of, plan_config(**settings), **(model or {})).digest()

    first, *others = mixture.catalogs
    cut = {"max_frames": 9}
    changed = [
        digest(),
        digest(seed=1),
        digest(stage={"name": "other"}),
        digest(stage=cut),
        digest(stage={**cut, "window": "slice"}),
        digest(stage={"filter": {"min_s": 1.0}}),
        digest(stage={"slots": 2}),
        digest(stage={"budget_tokens": 90}),
        digest(data={"captions": "lot"}),
        digest(data={"caption_dropout": 0.1}),
        digest(data={"caption_dropout": 0.2}),
        digest(data={"balance_packs": 16}),
        digest(validation={"share": 0.3}),
        digest(loss={"keyframe_lambda": 2.0}),
        digest(model={"patch_t": 2}),
        digest(model={"local_frames": 2}),
        digest(mixture),
        digest(Mixture(mixture.catalogs, weights=[0.5, 2, 1])),
        digest(Mixture([*others, first], weights=[2, 1.5, 0.5])),
        digest(Mixture([first], weights=[2])),
        digest(make_catalog(tmp_path / "fewer", CLIPS[:-1])),
        digest(make_catalog(tmp_path / "moved", [replace(CLIPS[0], shard=6), *CLIPS[1:]])),
    ]
    assert len(set(changed)) == len(changed)
    same = [
        digest(Mixture([first], weights=[1])),
        digest(stage={"slots": 1, "budget_tokens": 100}),
        digest(stage={"window": "slice"}),  # of whole samples
        digest(stage={"max_frames": 401}),
        digest(stage={"filter": {"min_s": 0.1}}),
        digest(data={"image_dropout": 0.5}),  # of a model without images
        digest(data={"prefetch": 7, "readers": 5}),
        digest(validation={"clips": 3}),
        digest(make_catalog(tmp_path / "again", CLIPS)),
    ]
    assert set(same) == {changed[0]}
    single = [Clip(5), Clip(9)]
    twins = [make_catalog(tmp_path / "single", single)] * 2
    assert digest(twins[0], data={"captions": "lot"}) == digest(twins[1])


def test_samples_that_a_stage_does_not_use_leave_its_steps_alone(catalog: Catalog, tmp_path: Path) -> None:
    grown = make_catalog(tmp_path / "grown", [*CLIPS, Clip(1, shard=3), Clip(1, shard=90), Clip(1, shard=91)])
    config = plan_config(stage={"filter": {"min_s": 0.4}})
    plans = [stage_plan(each, config) for each in (catalog, grown)]
    keys = [[visit.key for _, visit in visits(plan, 20)] for plan in plans]
    same_card = catalog.card.fingerprint == grown.card.fingerprint
    assert (keys[0] == keys[1]) == (plans[0].digest() == plans[1].digest()) == same_card
