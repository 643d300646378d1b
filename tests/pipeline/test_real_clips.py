"""The main job on every shared clip: real, awkward files, each kept or quarantined for its own reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.graph import preprocess
from schemas.check import check_dataset
from schemas.config import PreprocessConfig
from schemas.index import read_index, read_quarantine
from schemas.load import check_config

CANNOT_BE_KEPT = {
    "derived_empty.mp4": "empty_file",
    "derived_not_a_video.mp4": "open_failed",
    "derived_truncated_noMoovOrTail.mp4": "open_failed",
    "invalid-bitstream.webm": "no_pictures",
    "sample_audio_only.mp4": "no_video_stream",
    "video_dovi_3840x2160_30fps_dav1_10.mp4": "no_decoder",
    # Partly readable: most wanted pictures are lost, so docs/decode.md's rule refuses them.
    "corrupted.mp4": "damaged",
    "derived_friday_bitrot.mp4": "damaged",
    # DRM: a decoder without the key gives 850 grey pictures of 864.
    "sample_fragmented_sgpd_v2.mp4": "encrypted",
}


@pytest.mark.slow
def test_every_shared_clip_is_accounted_for(clips_dir: Path, tmp_path: Path) -> None:
    config = check_config(
        {
            "manifest": str(clips_dir / "manifest.jsonl"),
            "output": str(tmp_path / "latents"),
            "buckets": [
                {"num_frames": 17, "height": 64, "width": 96},
                {"num_frames": 17, "height": 96, "width": 64},
            ],
            "executor": {"kind": "local"},
        },
        PreprocessConfig,
        where="test",
    )
    summary, _ = preprocess(config)
    index = read_index(tmp_path / "latents").to_pylist()
    quarantine = read_quarantine(tmp_path / "latents").to_pylist()
    assert {row["source"]: row["reason"] for row in quarantine} == CANNOT_BE_KEPT
    assert all(len(row["message"]) > 10 for row in quarantine)
    assert summary["rows"] == len(index) + len(quarantine) == 79
    assert check_dataset(tmp_path / "latents").clean
    for row in index:
        assert row["shape"] == [5, 16, row["height"] // 8, row["width"] // 8], row["source"]
        assert len(row["pts_s"]) == len(row["frame_weights"]) == 17
        assert row["pts_s"] == sorted(row["pts_s"])
        assert 0 < row["coverage"] <= 1
    by_source = {row["source"]: row for row in index}
    assert by_source["portrait_4k60.mp4"]["bucket"] == "17x96x64"  # turned by its metadata
    assert by_source["video_90.mov"]["num_interpolated"] > 0  # three pictures
    assert by_source["sar_2x1.mp4"]["bucket"] == "17x64x96"
