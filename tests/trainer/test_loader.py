"""The loader: what was written comes back, once an epoch, for every world size, from any step."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from schemas.bucket import video_tokens
from schemas.codec import Tensor, as_float32, checksum
from schemas.errors import ConfigError, DatasetError
from schemas.scaling import Scaling, scale
from schemas.tables import sealed_parquet
from schemas.train_config import DataConfig, LrConfig, StageConfig, TrainConfig, ValidationConfig
from tests.trainer.datasets import PROMPT_WIDTH, SHAPES, Shape, clip_tensors, prompt_tensors, write_dataset
from trainer.catalog import Catalog
from trainer.loader import Loader
from trainer.mixture import Mixture
from trainer.order import keyed_order
from trainer.packing import Pack, Segment
from trainer.reader import SampleReader
from trainer.visit import Visit

BUDGET = 60


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("loader") / "latents")


def train_config(*stages: StageConfig, seed: int = 0, **data: float) -> TrainConfig:
    return TrainConfig(
        dataset="set",
        output="run",
        seed=seed,
        data=DataConfig.model_validate({"budget_tokens": BUDGET, **data}),
        stages=stages or (stage(),),
    )


def stage(name: str = "all", steps: int = 40, max_s: float | None = None) -> StageConfig:
    return StageConfig(name=name, steps=steps, max_s=max_s, lr=LrConfig(peak=1.0))


def numbers(dataset: Path) -> dict[str, int]:
    """sample_id -> clip number."""
    table = pq.read_table(dataset / "index.parquet", columns=["sample_id", "source"])
    return dict(zip(table["sample_id"].to_pylist(), map(int, table["source"].to_pylist()), strict=True))


def num_tokens(pack: Pack) -> int:
    """Video and prompt tokens of a patch_t of 1."""
    return sum(video_tokens(s.latents.shape) + len(s.prompt_embeds) for s in pack.segments)


def all_segments(loader: Loader, steps: int) -> list[Segment]:
    return [segment for step in range(steps) for pack in loader.packs(step) for segment in pack.segments]


def same(left: list[Pack], right: list[Pack]) -> bool:
    """Equal to the last bit, in the same order."""
    return [[segment.key for segment in pack.segments] for pack in left] == [
        [segment.key for segment in pack.segments] for pack in right
    ] and all(
        torch.equal(a.latents, b.latents) and torch.equal(a.prompt_embeds, b.prompt_embeds)
        for first, second in zip(left, right, strict=True)
        for a, b in zip(first.segments, second.segments, strict=True)
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "scaling", [Scaling(rule="none"), Scaling(rule="per_channel", mean=(0.5,) * 16, std=(2.0,) * 16)]
)
def test_what_was_written_comes_back_scaled(tmp_path: Path, dtype: Any, scaling: Scaling) -> None:
    dataset = write_dataset(tmp_path / "latents", store="mean", dtype=dtype, scaling=scaling)
    clips = numbers(dataset)
    seen = set()
    with Loader(Catalog(dataset), config=train_config()) as loader:
        for segment in all_segments(loader, steps=8):
            number = clips[segment.sample_id]
            stored = as_float32(clip_tensors(number, SHAPES[number], store="mean", dtype=dtype)["latents"])
            assert torch.equal(segment.latents, torch.from_numpy(scale(stored, scaling)))
            assert np.array_equal(segment.prompt_embeds, prompt_tensors(number)["prompt_embeds"].data)
            seen.add(number)
    assert seen == set(range(len(SHAPES)))


def test_moments_are_sampled_anew_on_every_visit(dataset: Path) -> None:
    clips = numbers(dataset)
    with Loader(Catalog(dataset), config=train_config()) as loader:
        visits = all_segments(loader, steps=40)
    residues = []
    for segment in visits:
        number = clips[segment.sample_id]
        stored = clip_tensors(number, SHAPES[number], store="moments", dtype="float32")
        mean, logvar = (torch.from_numpy(stored[name].data) for name in ("mean", "logvar"))
        residues.append((segment.latents / 0.7 - mean) / torch.exp(0.5 * logvar))
    noise = torch.cat([residue.flatten() for residue in residues])
    assert len(noise) > 100_000
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    keys = [segment.key for segment in visits]
    assert len(set(keys)) == len(keys) > len(set(clips)) * 3
    firsts = {float(residue.flatten()[0]) for residue in residues}
    assert len(firsts) == len(keys), "two visits shared their draw"


@pytest.mark.parametrize("prefetch", [0, 3])
def test_ranks_together_see_what_one_rank_sees(dataset: Path, prefetch: int) -> None:
    config = train_config(slots=4, prefetch=prefetch)
    with Loader(Catalog(dataset), config=config) as alone:
        expected = [alone.packs(step) for step in range(12)]
    for world_size in (2, 4):
        for rank in range(world_size):
            with Loader(Catalog(dataset), config=config, rank=rank, world_size=world_size) as loader:
                for step in range(12):
                    assert same(loader.packs(step), expected[step][rank::world_size])
    epochs = Counter(segment.key for packs in expected for pack in packs for segment in pack.segments)
    assert set(epochs.values()) == {1}
    assert {int(key.split("/")[2]) for key in epochs} >= {0, 1, 2}


def test_options_do_not_depend_on_ranks(dataset: Path, tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "other", shapes=SHAPES[:3], scaling=Scaling(rule="factor", factor=0.7))
    mixture = Mixture([Catalog(dataset), Catalog(other)], weights=[1.5, 0.5])
    config = train_config(
        StageConfig(name="cut", steps=9, window="slice", max_frames=9, lr=LrConfig(peak=1.0)),
        StageConfig(name="whole", steps=9, slots=2, budget_tokens=90, lr=LrConfig(peak=1.0)),
        slots=4,
        readers=3,
        caption_dropout=0.3,
    )
    with Loader(mixture, config=config) as alone:
        expected = [alone.packs(step) for step in range(18)]
        sizes = [alone.step_weights(step) for step in range(18)]
    assert [len(packs) for packs in expected] == [4] * 9 + [2] * 9
    for packs, size in zip(expected, sizes, strict=True):
        assert size.num_tokens == sum(map(num_tokens, packs))
        assert size.num_clips == sum(len(pack.segments) for pack in packs)
    segments = [segment for packs in expected for pack in packs for segment in pack.segments]
    assert len({segment.key for segment in segments}) == len(segments)
    empty = torch.from_numpy(prompt_tensors(-1)["prompt_embeds"].data)
    dropped = [len(each.prompt_embeds) == 8 and torch.equal(each.prompt_embeds, empty) for each in segments]
    assert 0.15 < np.mean(dropped) < 0.45
    # The second stage has a mesh of its own, with fewer data-parallel ranks.
    for rank in range(4):
        shares = {"whole": (rank // 2, 2)}
        with Loader(mixture, config=config, rank=rank, world_size=4, shares=shares) as loader:
            for step in range(18):
                own = expected[step][rank::4] if step < 9 else expected[step][rank // 2 :: 2]
                assert same(loader.packs(step), own)
                assert loader.step_weights(step) == sizes[step]
    with pytest.raises(ConfigError, match=r"slots of stage 'whole' = 2: .* 4 data-parallel ranks"):
        Loader(mixture, config=config, world_size=4)


def test_held_out_clips_are_the_same_on_every_rank(dataset: Path) -> None:
    config = train_config(slots=2).model_copy(update={"validation": ValidationConfig(share=0.4)})
    looked = []
    for rank in range(2):
        with Loader(Catalog(dataset), config=config, rank=rank, world_size=2) as loader:
            trained = {segment.sample_id for segment in all_segments(loader, steps=6 + rank)}
            looked.append(loader.held_out("all", limit=2))
            assert loader.held_out("all", limit=2) == looked[-1]
            clips = [clip for pack in looked[-1] for clip in pack]
            held = loader.read(clips).segments
            for clip, segment in zip(clips, held, strict=True):
                prompt = loader.prompt(clip)
                assert prompt is not None
                assert torch.equal(prompt, segment.prompt_embeds)
    assert looked[0] == looked[1]
    assert len(held) == 2
    assert not {segment.sample_id for segment in held} & trained
    assert all(segment.key.startswith(f"validation/{segment.sample_id}/") for segment in held)


def test_any_step_equals_never_stopping(dataset: Path) -> None:
    config = train_config(stage("short", 7, max_s=1.0), stage("long", 9), slots=2)
    with Loader(Catalog(dataset), config=config) as loader:
        expected = [loader.packs(step) for step in range(16)]
    with Loader(Catalog(dataset), config=config) as loader:
        for step in (15, 5, 6, 7, 8, 0, 14):
            assert same(loader.packs(step), expected[step])
    assert not same(expected[0], expected[7])


def test_the_last_step_is_the_last(dataset: Path) -> None:
    with Loader(Catalog(dataset), config=train_config(stage(steps=3))) as loader:
        loader.packs(2)
        with pytest.raises(ConfigError, match="steps 0 to 2"):
            loader.packs(3)


def test_step_weights_count_all_ranks(dataset: Path) -> None:
    config = train_config(stage("short", 5, max_s=1.0), stage("long", 5), slots=4)
    with (
        Loader(Catalog(dataset), config=config) as alone,
        Loader(Catalog(dataset), config=config, world_size=4) as one,
    ):
        for step in range(10):
            packs = alone.packs(step)
            assert one.step_weights(step) == alone.step_weights(step)
            assert one.step_weights(step).num_clips == sum(len(pack.segments) for pack in packs)
            assert one.step_weights(step).num_video_tokens == sum(
                video_tokens(segment.latents.shape) for pack in packs for segment in pack.segments
            )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_prefix_is_the_beginning_of_the_whole(tmp_path: Path, dtype: Any) -> None:
    dataset = write_dataset(tmp_path / "latents", store="mean", dtype=dtype)
    config = train_config(stage("whole", 20), stage("prefix", 20, max_s=1.0))
    with Loader(Catalog(dataset), config=config) as loader:
        whole = {segment.sample_id: segment.latents for segment in all_segments(loader, steps=20)}
        cut = 0
        for step in range(20, 40):
            for pack in loader.packs(step):
                assert num_tokens(pack) <= BUDGET
                for segment in pack.segments:
                    full = whole[segment.sample_id]
                    # 8 fps and 4 frames a latent: the third one ends after exactly one second.
                    assert len(segment.latents) == min(3, len(full))
                    assert torch.equal(segment.latents, full[:3])
                    cut += len(segment.latents) < len(full)
    assert cut > 5


@pytest.mark.parametrize(
    ("max_s", "length", "first"), [(1.0, 3, 3), (2.0, 5, 5), (2.5, 6, 11), (9.0, 11, 11)]
)
def test_a_window_of_half_a_payload_reads_all_once_and_others_no_more_than_they_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_s: float, length: int, first: int
) -> None:
    dataset = write_dataset(tmp_path / "latents", store="mean", shapes=[(41, 64, 64)])
    sizes: list[int] = []
    preadv = os.preadv

    def counting(fd: int, buffers: Any, offset: int) -> int:
        sizes.append(preadv(fd, buffers, offset))
        return sizes[-1]

    monkeypatch.setattr(os, "preadv", counting)
    with Loader(
        Catalog(dataset), config=train_config(stage(max_s=max_s), budget_tokens=400, prefetch=0)
    ) as loader:
        loader.packs(0)
        loader.packs(1)
    frame, prompt = 16 * 8 * 8 * 4, 4 * PROMPT_WIDTH * 4
    assert sizes == [first * frame, prompt, length * frame, prompt]


def test_damage_beyond_the_window_is_found(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "latents", store="mean", shapes=[(41, 64, 64)])
    flip(dataset, "latents", at=10 * 16 * 8 * 8 * 4)
    config = train_config(stage(max_s=2.5), budget_tokens=400)
    with (
        Loader(Catalog(dataset), config=config) as loader,
        pytest.raises(DatasetError, match=r"latents has crc32:.* verify"),
    ):
        loader.packs(0)


def flip(dataset: Path, column: str, *, at: int = 5) -> tuple[str, str]:
    """Change one byte of one sample's tensor; its shard and id."""
    table = pq.read_table(dataset / "index.parquet")
    row = table.slice(len(table) // 2, 1).to_pylist()[0]
    shard = row["prompt_shard" if column.startswith("prompt") else "shard"]
    with (dataset / shard).open("r+b") as file:
        file.seek(row[f"{column}_offset"] + at)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x10]))
    return shard, row["sample_id"]


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("column", ["mean", "logvar", "prompt_embeds"])
def test_a_flipped_bit_is_found_and_named(tmp_path: Path, column: str, prefetch: int) -> None:
    dataset = write_dataset(tmp_path / "latents")
    with Loader(Catalog(dataset), config=train_config(prefetch=prefetch)) as loader:
        samples = [[s.sample_id for pack in loader.packs(step) for s in pack.segments] for step in range(8)]
    shard, sample = flip(dataset, column)
    needed = next(step for step in range(8) if sample in samples[step])
    with Loader(Catalog(dataset), config=train_config(prefetch=prefetch)) as loader:
        for step in range(needed):
            loader.packs(step)
        for _ in range(2):  # asked again it fails again, and skips nothing
            with pytest.raises(
                DatasetError, match=rf"{shard}, sample {sample}: {column} has crc32:.* verify"
            ):
                loader.packs(needed)


def test_reads_that_stop_early_are_continued(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv

    def short(fd: int, buffers: list[memoryview], offset: int) -> int:
        return preadv(fd, [buffers[0][:1000]], offset)

    monkeypatch.setattr(os, "preadv", short)
    with Loader(Catalog(dataset), config=train_config()) as loader:  # checksums tell whether the parts fit
        assert {segment.sample_id for segment in all_segments(loader, steps=8)} == set(numbers(dataset))


def test_what_was_read_ahead_is_used(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    segment = SampleReader.segment

    def recording(self: SampleReader, visit: Visit) -> Segment:
        read.append(visit.key)
        return segment(self, visit)

    monkeypatch.setattr(SampleReader, "segment", recording)
    with Loader(Catalog(dataset), config=train_config(prefetch=3, readers=1)) as loader:
        used = [segment.key for segment in all_segments(loader, steps=20)]
    assert read[: len(used)] == used
    assert len(set(read)) == len(read)


def test_epochs_are_planned_once_while_steps_come_in_sequence(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[int] = []

    def recording(sizes: Sequence[int], *, key: int) -> np.ndarray:
        planned.append(key)
        return keyed_order(sizes, key=key)

    monkeypatch.setattr("trainer.mixture.keyed_order", recording)
    with Loader(Catalog(dataset), config=train_config(prefetch=3)) as loader:
        for step in range(20):
            loader.packs(step)
            loader.step_weights(step)
    assert len(planned) == len(set(planned)) > 5


def test_the_log_variance_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loud(number: int, shape: Shape, *, store: str, dtype: Any) -> dict[str, Tensor]:
        tensors = clip_tensors(number, shape, store=store, dtype=dtype)
        return {**tensors, "logvar": Tensor("F32", np.full_like(tensors["mean"].data, 1000.0))}

    monkeypatch.setattr("tests.trainer.datasets.clip_tensors", loud)
    dataset = write_dataset(tmp_path / "latents", scaling=Scaling(rule="none"))
    with Loader(Catalog(dataset), config=train_config()) as loader:
        latents = torch.cat([segment.latents.flatten() for segment in all_segments(loader, steps=8)])
    assert latents.std() == pytest.approx(np.exp(20 / 2), rel=0.05)


def test_a_checksum_is_taken_once_per_tensor(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def counting(data: memoryview) -> str:
        taken.append(len(data))
        return checksum(data)

    monkeypatch.setattr("trainer.reader.checksum", counting)
    with Loader(Catalog(dataset), config=train_config()) as loader:
        visits = all_segments(loader, steps=30)
    assert len(taken) == 3 * len(SHAPES)
    assert len(visits) > 2 * len(SHAPES)


def test_a_missing_or_cut_shard_is_named(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "latents")
    shard = sorted(dataset.glob("latents/*/*.tar"))[0]
    name = shard.relative_to(dataset).as_posix()
    whole = shard.read_bytes()
    shard.write_bytes(whole[:1000])
    with (
        Loader(Catalog(dataset), config=train_config()) as loader,
        pytest.raises(DatasetError, match=rf"shard {name}, sample \w+: mean ends after \d+ of \d+ bytes"),
    ):
        all_segments(loader, steps=8)
    shard.unlink()
    with (
        Loader(Catalog(dataset), config=train_config()) as loader,
        pytest.raises(DatasetError, match=rf"shard {name}, sample \w+: mean cannot be read: No such file"),
    ):
        all_segments(loader, steps=8)


def test_nan_is_refused_even_in_a_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def holed(number: int, shape: Shape, *, store: str, dtype: Any) -> dict[str, Tensor]:
        tensors = clip_tensors(number, shape, store=store, dtype=dtype)
        tensors["latents"].data[0, 0, 0, 0] = np.nan
        return tensors

    monkeypatch.setattr("tests.trainer.datasets.clip_tensors", holed)
    dataset = write_dataset(tmp_path / "latents", store="mean", shapes=[(41, 32, 32)])
    with (
        Loader(Catalog(dataset), config=train_config(stage(max_s=0.5))) as loader,
        pytest.raises(DatasetError, match="latents holds NaN or Inf"),
    ):
        loader.packs(0)


def change(table: pa.Table, column: str, value: Any) -> pa.Table:
    """`table` with one value of its last sample changed: the first is what the others are held against."""
    rows = table.to_pylist()
    row = max(rows, key=lambda row: row["sample_id"])
    row[column] = value(row[column]) if callable(value) else value
    return pa.Table.from_pylist(rows, schema=table.schema)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("prompt_embeds_shape", lambda old: [old[1], old[0]], "prompt_embeds of width 24"),
        ("shape", lambda old: [old[0], old[1] // 2, old[2] * 2, old[3]], "16 latent channels"),
        ("shape", lambda old: old[:3], "a shape of 4 numbers"),
        ("shape", lambda old: [-old[0], -old[1], old[2], old[3]], "a positive shape"),
        ("num_frames", 401, r"the latent frames of its num_frames, which are 4n \+ 1"),
        ("mean_nbytes", lambda old: old - 4, "mean_nbytes to agree with shape"),
        ("dtype", "BF16", "dtype F32 as in the first sample"),
        ("pts_s", lambda old: old[:-1], "one entry of pts_s per frame"),
        ("pts_s", lambda old: [*old[:-1], float("nan")], "finite pts_s"),
        ("effective_fps", 0.0, "a positive effective_fps"),
        ("prompt_shard", None, "a value of prompt_shard"),
    ],
)
def test_an_index_that_disagrees_names_the_sample(
    tmp_path: Path, column: str, value: Any, message: str
) -> None:
    dataset = write_dataset(tmp_path / "latents")
    table = pq.read_table(dataset / "index.parquet")
    (dataset / "index.parquet").write_bytes(sealed_parquet(change(table, column, value)))
    sample = max(table["sample_id"].to_pylist())
    with pytest.raises(DatasetError, match=f"sample {sample} in .*: expected {message}.*verify"):
        Loader(Catalog(dataset), config=train_config())


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda table: table.slice(0, 0), "holds no samples to train on"),
        (lambda table: table.drop_columns(["pts_s"]), "has no column pts_s; run `latentpress preprocess`"),
    ],
)
def test_an_index_without_rows_or_columns_says_what_to_do(
    tmp_path: Path, edit: Callable[[pa.Table], pa.Table], message: str
) -> None:
    dataset = write_dataset(tmp_path / "latents")
    (dataset / "index.parquet").write_bytes(sealed_parquet(edit(pq.read_table(dataset / "index.parquet"))))
    with pytest.raises(DatasetError, match=message):
        Loader(Catalog(dataset), config=train_config())


def test_the_order_of_index_rows_does_not_matter(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "latents")
    with Loader(Catalog(dataset), config=train_config()) as loader:
        expected, digest = [loader.packs(step) for step in range(6)], loader.plan_digest("all")
    table = pq.read_table(dataset / "index.parquet")
    (dataset / "index.parquet").write_bytes(sealed_parquet(table.take(list(reversed(range(len(table)))))))
    with Loader(Catalog(dataset), config=train_config()) as loader:
        assert loader.plan_digest("all") == digest
        assert all(same(loader.packs(step), expected[step]) for step in range(6))


def plan_digest(dataset: Path, config: TrainConfig) -> str:
    with Loader(Catalog(dataset), config=config) as loader:
        return loader.plan_digest(config.stages[0].name)


def test_the_plan_digest_follows_whatever_changes_the_steps(dataset: Path, tmp_path: Path) -> None:
    configs = [
        train_config(),
        train_config(seed=1),
        train_config(slots=2),
        train_config(budget_tokens=90),
        train_config(stage("other")),
        train_config(stage(max_s=1.0)),
    ]
    digests = [plan_digest(dataset, config) for config in configs]
    fewer = write_dataset(tmp_path / "latents", shapes=SHAPES[:-1])
    digests.append(plan_digest(fewer, train_config()))
    assert len(set(digests)) == len(digests)
    assert plan_digest(dataset, train_config(prefetch=0)) == digests[0]
    table = change(pq.read_table(fewer / "index.parquet"), "caption_digest", "0" * 32)
    (fewer / "index.parquet").write_bytes(sealed_parquet(table))
    assert plan_digest(fewer, train_config()) not in digests


def test_a_sample_longer_than_the_budget_is_a_config_error(dataset: Path) -> None:
    longest = next(sample for sample, number in numbers(dataset).items() if number == 4)
    with pytest.raises(
        ConfigError, match=rf"budget_tokens = 30: sample {longest} alone needs 38 tokens .*30 video, 8 prompt"
    ):
        Loader(Catalog(dataset), config=train_config(budget_tokens=30))
    Loader(Catalog(dataset), config=train_config(stage(max_s=0.5), budget_tokens=30)).close()


def test_slots_must_be_shared_evenly(dataset: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"slots = 6: .* 4 data-parallel ranks; run on 1 or 2 or 3 .* data.slots to 8 in a run",
    ):
        Loader(Catalog(dataset), config=train_config(slots=6), world_size=4)


def test_describe_names_samples_packs_and_fill(dataset: Path) -> None:
    with Loader(Catalog(dataset), config=train_config(slots=2)) as loader:
        first, second = loader.describe().splitlines()
    assert first == "7 samples, 8.5 s of video, 3 shards"
    assert second.startswith("stage all: 11 to 38 tokens a sample, 3 packs (1.5 steps) an epoch, ")


def open_shards() -> int:
    return sum(os.path.realpath(f"/proc/self/fd/{fd}").endswith(".tar") for fd in os.listdir("/proc/self/fd"))


def test_open_shards_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.shards.MAX_OPEN_SHARDS", 3)
    dataset = write_dataset(tmp_path / "latents", rows_per_unit=1)
    with Loader(Catalog(dataset), config=train_config(prefetch=0)) as loader:
        assert len(all_segments(loader, steps=12)) > len(SHAPES)
        assert open_shards() == 3
    assert open_shards() == 0
