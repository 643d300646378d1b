"""`inspect`: the right sample, numbers that are true, a picture that shows them, errors that help."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from jobs.inspect import inspect_sample, run
from jobs.sheet import Sheet, draw_sheet
from pipeline import dct
from pipeline.graph import preprocess
from schemas.card import card_bytes, read_card
from schemas.config import BucketConfig, ExecutorConfig, PreprocessConfig, VideoEncoderConfig
from schemas.errors import DatasetError, StaleDatasetError
from schemas.load import digest_of
from tests.pipeline.test_dct import waves

BUCKETS = (BucketConfig(num_frames=9, height=64, width=96), BucketConfig(num_frames=9, height=96, width=64))


def write_video(path: Path, frames: np.ndarray) -> None:
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "10"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def make_dataset(folder: Path, *, store: str = "moments", dtype: str = "float32") -> Path:
    """A wide clip, a tall one with fewer pictures than frames, and one that is no video."""
    folder.mkdir()
    write_video(folder / "wide.mp4", waves(20, 64, 96))
    write_video(folder / "tall.mp4", waves(6, 96, 64))
    (folder / "torn.mp4").write_bytes(b"no video")
    captions = {"wide.mp4": "Waves.", "tall.mp4": "Taller waves. " * 40, "torn.mp4": "Nothing."}
    lines = [json.dumps({"video": name, "caption": caption}) for name, caption in captions.items()]
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    preprocess(
        PreprocessConfig(
            manifest=str(folder / "manifest.jsonl"),
            output=str(folder / "latents"),
            buckets=BUCKETS,
            video_encoder=VideoEncoderConfig.model_validate({"store": store, "dtype": dtype}),
            executor=ExecutorConfig(kind="local", workers=1),
        )
    )
    return folder / "latents"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("inspect") / "clips")


def test_first_sample_by_default(dataset: Path, tmp_path: Path) -> None:
    result = inspect_sample(dataset, output=tmp_path / "new" / "sheet.png")
    assert json.loads(json.dumps(result)) == result
    assert result["source"] == "wide.mp4"
    assert result["caption"] == "Waves."
    assert result["shape"] == [3, 16, 8, 12]
    assert result["dtype"] == "F32"
    assert result["bucket"] == "9x64x96"
    assert result["clip"]["codec"] == "h264"
    assert result["notes"] == []
    scores = result["psnr"]["per_frame"]
    assert len(scores) == 9
    assert result["psnr"]["min"] == min(scores) > 25
    assert result["psnr"]["mean"] == pytest.approx(np.mean(scores))
    with Image.open(result["png"]) as picture:
        assert picture.width > 8 * 96
        assert picture.height > 3 * 64


def test_samples_go_by_id_source_or_path(dataset: Path, tmp_path: Path) -> None:
    def find(sample: str) -> dict[str, Any]:
        return inspect_sample(dataset, sample=sample, output=tmp_path / "sheet.png")

    tall = find("tall.mp4")
    assert tall["bucket"] == "9x96x64"
    assert tall["clip"]["interpolated"]
    assert find(tall["sample_id"][:10]) == tall
    assert find(str(dataset.parent / "tall.mp4")) == tall


def test_a_name_that_finds_nothing_says_what_there_is(dataset: Path) -> None:
    with pytest.raises(DatasetError, match=r"no sample 'nope'; it holds 2, such as .*wide\.mp4"):
        inspect_sample(dataset, sample="nope")
    with pytest.raises(DatasetError, match="names 2 samples"):
        inspect_sample(dataset, sample="")
    with pytest.raises(DatasetError, match=r"'torn\.mp4' was quarantined \(open_failed\)"):
        inspect_sample(dataset, sample="torn.mp4")


def test_latents_are_drawn_alone_when_the_source_is_gone(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "clips")
    (tmp_path / "clips" / "wide.mp4").unlink()
    (tmp_path / "clips" / "tall.mp4").write_bytes(b"no video")
    gone = inspect_sample(dataset, sample="wide.mp4", output=tmp_path / "sheet.png")
    assert gone["psnr"] is None
    assert "is gone" in gone["notes"][0]
    changed = inspect_sample(dataset, sample="tall.mp4", output=tmp_path / "sheet.png")
    assert changed["psnr"] is None
    assert changed["notes"] == ["source file has changed since it was encoded"]


def test_one_tensor_in_half_precision_decodes_as_well(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "clips", store="sample", dtype="bfloat16")
    result = inspect_sample(dataset, output=tmp_path / "sheet.png")
    assert result["dtype"] == "BF16"
    assert result["psnr"]["min"] > 25


def test_latents_of_another_table_are_refused(dataset: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in dataset.iterdir():
        (other / path.name).symlink_to(path)
    card = read_card(dataset)
    hard = {**card.hard, "latents": {**card.hard["latents"], "video_encoder.table_sha256": "0"}}
    (other / "card.json").unlink()
    (other / "card.json").write_bytes(
        card_bytes(card.model_copy(update={"hard": hard, "fingerprint": digest_of(hard)}))
    )
    with pytest.raises(StaleDatasetError, match=r"video_encoder\.table_sha256 = '0'"):
        inspect_sample(other, output=tmp_path / "sheet.png")


def test_command_names_the_picture(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png = tmp_path / "sheet.png"
    assert run(dataset, sample=None, output=png, as_json=False) == 0
    assert f"wrote {png}" in capsys.readouterr().out
    assert run(dataset, sample=None, output=png, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["png"] == str(png)


def sheet(
    source: np.ndarray | None, decoded: np.ndarray, *, title: str = "clip.mp4", caption: str = ""
) -> Sheet:
    labels: Sequence[str] = [f"{i} s" for i in range(len(decoded))]
    return Sheet(
        title, "30 dB", "details", caption, labels, labels if source is not None else [], decoded, source
    )


def test_frames_keep_their_shape_and_stay_on_the_page() -> None:
    red = np.zeros((5, 96, 64, 3), np.uint8)
    red[..., 0] = 255
    picture = np.asarray(draw_sheet(sheet(red, red), columns=3))
    is_red = (picture == (255, 0, 0)).all(-1)
    rows, columns = np.flatnonzero(is_red.any(1)), np.flatnonzero(is_red.any(0))
    assert is_red.sum() == 3 * 2 * 180 * 270  # three columns, source and decoded, at 2:3
    border = np.concatenate([picture[:20], picture[-20:]]).reshape(-1, 3)
    assert (border == 255).all()
    assert columns[-1] < picture.shape[1] - 20
    assert rows[-1] < picture.shape[0] - 20
    black = (picture == 0).all(-1)
    assert black[:, columns].sum() >= 3 * 180 * 270  # no difference


def test_long_words_never_leave_the_page() -> None:
    frames = waves(1, 32, 32)
    for words in ("x" * 3000, "word " * 3000, "Ein Löwe 🦁 schläft\n\nauf zwei Zeilen"):
        picture = np.asarray(draw_sheet(sheet(frames, frames, title=words, caption=words), columns=8))
        assert (picture[:, -20:] == 255).all()
        assert picture.shape[0] < 1200


def test_without_a_source_only_what_was_decoded_is_drawn() -> None:
    frames = dct.decode_latents(dct.encode_frames(waves(5, 64, 96)))
    with_source = draw_sheet(sheet(frames, frames), columns=5)
    without = draw_sheet(sheet(None, frames), columns=5)
    assert without.width == with_source.width
    assert without.height < 0.6 * with_source.height
