"""Every VAE family through the main job: what is stored is what the library gives on the same frames."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jobs.inspect import inspect_sample
from pipeline.decode import decode_clip
from pipeline.graph import preprocess
from pipeline.sandbox import decode_settings
from schemas.card import read_card
from schemas.check import check_dataset
from schemas.codec import as_float32
from schemas.config import PreprocessConfig
from schemas.index import read_index, read_tensor
from schemas.load import check_config
from tests.pipeline.test_vae import (
    BY_FRAME,
    GEOMETRY,
    clip_shape,
    every_family,
    library_moments,
    saved,
)
from tests.pipeline.tiny_vaes import FAMILIES, library_vae
from tests.videos import make_video

__all__ = ["saved"]


@every_family
def test_what_preprocess_stores_is_what_the_library_gives(
    family: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    frames, height, width = clip_shape(family)
    video = make_video(tmp_path / "a.mp4", num_frames=frames + 3)
    (tmp_path / "manifest.jsonl").write_text(json.dumps({"video": "a.mp4", "caption": "a clip"}))
    tree = {
        "manifest": str(tmp_path / "manifest.jsonl"),
        "output": str(tmp_path / "latents"),
        "buckets": [{"num_frames": frames, "height": height, "width": width}],
        "target": {"patch_size": 1},
        "video_encoder": {
            "kind": "diffusers",
            "model": str(saved(family)),
            "device": "cpu",
            "tiling": "off",
        },
        "executor": {"kind": "local", "workers": 1},
    }
    config = check_config(tree, PreprocessConfig, where="test")
    summary, _ = preprocess(config)
    assert summary["kept"] == 1

    clip, _, _ = decode_clip(video, **decode_settings(config))
    [wanted] = library_moments(library_vae(family, saved(family)), clip[None], by_frame=family in BY_FRAME)
    [row] = read_index(config.output).to_pylist()
    for name in ("mean", "logvar"):
        np.testing.assert_array_equal(as_float32(read_tensor(config.output, row, name)), wanted[name].numpy())

    card = read_card(config.output)
    assert card.geometry == GEOMETRY[family]
    assert card.hard["latents"]["video_encoder.class"] == FAMILIES[family][0]
    assert card.hard["latents"]["scaling"] == card.scaling.model_dump(mode="json")
    assert check_dataset(config.output).clean
    seen = inspect_sample(config.output, output=tmp_path / "inspect.png")
    assert len(seen["psnr"]["per_frame"]) == frames
