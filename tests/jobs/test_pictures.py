"""Samples become pictures that show the right clips, with their own captions."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from jobs.pictures import DatasetPictures, Shown, captions, draw_samples, make_pictures, write_video
from pipeline import dct
from schemas.card import card_bytes, read_card
from schemas.codec import as_float32
from schemas.errors import LatentpressError
from schemas.index import read_index, read_tensor
from schemas.load import check_config
from schemas.scaling import scale, unscale
from schemas.train_config import TrainConfig
from tests.jobs.test_inspect import make_dataset
from trainer.packing import Segment
from trainer.sample import Sample


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("pictures") / "clips")


def segments(dataset: Path) -> dict[str, Segment]:
    """By source, as a loader would make them."""
    card = read_card(dataset)
    made = {}
    for row in read_index(dataset).to_pylist():
        latents = scale(as_float32(read_tensor(dataset, row, "mean")), card.scaling)
        made[row["source"]] = Segment(
            sample_id=row["sample_id"],
            key=f"validation/{row['sample_id']}/{row['caption_digest']}",
            latents=torch.from_numpy(latents),
            prompt_embeds=torch.zeros(2, 8),
            seconds=row["pts_s"][-1] - row["pts_s"][0],
        )
    return made


def shown(frames: np.ndarray, *, fps: float = 10.0) -> Shown:
    return Shown("Waves.", "wide.mp4", frames, 255 - frames, fps)


def test_pictures_show_the_clips_and_the_samples(dataset: Path, tmp_path: Path) -> None:
    clips = segments(dataset)
    card, wide = read_card(dataset), clips["wide.mp4"]
    grey = torch.from_numpy(scale(np.zeros(wide.latents.shape, np.float32), card.scaling))
    DatasetPictures([dataset]).write(tmp_path / "step-000007", [Sample(wide, grey)])
    with Image.open(tmp_path / "step-000007" / "samples.png") as picture:
        sheet = np.asarray(picture.convert("RGB"))
    # The first frame, and the sample's under it, at two and a half times their size.
    decoded = dct.decode_latents(unscale(wide.latents.numpy(), card.scaling))[0]
    cell = np.asarray(Image.fromarray(decoded).resize((240, 160), Image.Resampling.NEAREST))
    left = 28 + 104
    tops = [y for y in range(len(sheet) - 160) if np.array_equal(sheet[y : y + 160, left : left + 240], cell)]
    assert len(tops) == 1
    under = sheet[tops[0] + 166 : tops[0] + 326, left : left + 240]
    assert np.ptp(under) == 0
    assert abs(int(under[0, 0, 0]) - 128) <= 1
    with av.open(tmp_path / "step-000007" / "samples.mp4") as container:
        video = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(video) == 9
    first = video[0][8 + 24 : 8 + 24 + 160, 8 : 8 + 240].astype(int)
    assert np.abs(first - cell).mean() < 12
    assert np.abs(video[0][32:192, 8 + 248 : 8 + 488].astype(int) - 128).mean() < 3
    assert np.abs(video[-1].astype(int) - video[0]).mean() > 2


def test_captions_are_those_of_the_visit(dataset: Path) -> None:
    clips = segments(dataset)
    chosen = [clips["tall.mp4"], clips["wide.mp4"]]
    assert captions([dataset], chosen) == [("Taller waves. " * 40, "tall.mp4"), ("Waves.", "wide.mp4")]
    unnamed = replace(clips["wide.mp4"], key="of another time")
    assert captions([dataset, dataset], [unnamed]) == [("Waves.", "wide.mp4")]


def test_a_sheet_of_many_clips_of_all_shapes_keeps_every_row() -> None:
    one = draw_samples([shown(np.zeros((9, 64, 96, 3), np.uint8))], title="step-000001")
    many = draw_samples(
        [shown(np.zeros((n, *size, 3), np.uint8)) for n in (1, 5, 9) for size in ((64, 96), (96, 64))] * 4,
        title="step-000001",
    )
    assert many.width == one.width
    assert many.height > 24 * 2 * 160
    assert np.asarray(many.convert("L"))[-60:].min() < 128


def test_clips_of_different_length_and_speed_share_a_video(tmp_path: Path) -> None:
    ramp = np.arange(0, 250, 50, dtype=np.uint8)[:, None, None, None]
    slow = shown(np.broadcast_to(ramp, (5, 32, 48, 3)).copy(), fps=5.0)
    fast = shown(np.broadcast_to(ramp, (5, 48, 32, 3)).copy(), fps=20.0)
    write_video([slow, fast], tmp_path / "v.mp4")
    with av.open(tmp_path / "v.mp4") as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 20
        video = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(video) == 20
    top_left = [int(frame[100, 100, 0]) for frame in video]
    np.testing.assert_allclose([top_left[i] for i in (1, 5, 9, 13, 19)], [0, 50, 100, 150, 200], atol=4)


def test_a_video_of_many_clips_shows_the_first_ones_and_stays_playable(tmp_path: Path) -> None:
    """H.264 ends at some thousand pixels."""
    write_video([shown(np.zeros((1, 270, 240, 3), np.uint8))] * 100, tmp_path / "v.mp4")
    with av.open(tmp_path / "v.mp4") as container:
        stream = container.streams.video[0]
        assert max(stream.width, stream.height) < 2048


def test_an_encoder_that_is_not_there_is_told_before_training(dataset: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(dataset, tmp_path / "copy"))
    card = read_card(copy)
    gone = card.settings.video_encoder.model_copy(update={"kind": "diffusers", "model": "/nowhere"})
    settings = card.settings.model_copy(update={"video_encoder": gone})
    (copy / "card.json").write_bytes(card_bytes(card.model_copy(update={"settings": settings})))
    with pytest.raises(LatentpressError, match="encoder"):
        DatasetPictures([copy])


def test_pictures_are_made_where_samples_are_asked_for(dataset: Path) -> None:
    def config(samples: int) -> TrainConfig:
        tree = {
            "dataset": str(dataset),
            "output": "run",
            "validation": {"samples": samples},
            "stages": [{"name": "s", "steps": 1, "lr": {"peak": 1.0}}],
        }
        return check_config(tree, TrainConfig, where="test")

    assert make_pictures(config(0)) is None
    assert isinstance(make_pictures(config(1)), DatasetPictures)
