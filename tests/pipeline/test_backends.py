"""torchcodec and decord behind our choice of pictures: the same pictures as ours, or a refusal by name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from pipeline import backends
from pipeline.container import open_video
from pipeline.decode import decode_clip
from pipeline.packets import read_packets
from schemas.config import BucketConfig, DecodeConfig, FramesConfig, LimitsConfig, ResizeConfig
from schemas.errors import ClipError, MissingExtraError
from tests.videos import make_video, read_number

BUCKET = BucketConfig(num_frames=13, height=64, width=96)


@pytest.fixture(params=["torchcodec", "decord"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each library in turn, skipped where it is not installed or does not load."""
    try:
        importlib.import_module("torchcodec.decoders" if request.param == "torchcodec" else request.param)
    except (ModuleNotFoundError, RuntimeError, OSError) as error:
        pytest.skip(f"{request.param} is not usable here: {str(error).splitlines()[0]}")
    return str(request.param)


def decode(path: Path, *, backend: str = "pyav", bucket: BucketConfig = BUCKET) -> np.ndarray:
    frames, _, _ = decode_clip(
        path,
        frames=FramesConfig(),
        buckets=[bucket],
        resize=ResizeConfig(),
        decode=DecodeConfig.model_validate({"backend": backend}),
        limits=LimitsConfig(),
    )
    return frames


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Decibels, of 255; at most 78."""
    error = np.mean((a.astype(float) - b) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-3)))


STREAMS: dict[str, dict[str, object]] = {
    "constant rate": {},
    "b-pictures": {"bframes": 3, "gop": 30},
    "h265": {
        "codec": "libx265",
        "bframes": 2,
        "options": {"x265-params": "log-level=none:pools=1:open-gop=0"},
    },
    "varying rate": {"pts": [100 * i + 30 * (i % 3) for i in range(60)], "bframes": 2},
    "turned": {"rotation": 90, "size": (64, 96)},
    "upside down": {"rotation": 180},
    "wide pixels": {"size": (64, 64), "sar": Fraction(3, 2)},
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_library_gives_the_pictures_that_we_give(tmp_path: Path, backend: str, name: str) -> None:
    path = make_video(tmp_path / "a.mp4", **({"num_frames": 60} | STREAMS[name]))  # type: ignore[arg-type]
    ours, theirs = decode(path), decode(path, backend=backend)
    assert len({frame.tobytes() for frame in ours}) == 13
    assert min(map(psnr, ours, theirs)) > 30
    if "rotation" not in STREAMS[name]:
        assert [read_number(frame) for frame in theirs] == [read_number(frame) for frame in ours]


def test_full_size_pictures_are_held_a_few_at_a_time(
    tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_video(tmp_path / "a.mp4", num_frames=60, bframes=2)
    expected = decode(path, backend=backend)
    asked: list[int] = []
    given = backends.LibraryDecoder._given

    def counted(self: backends.LibraryDecoder, positions: list[int]) -> Iterator[backends.Given]:
        asked.append(len(positions))
        return given(self, positions)

    monkeypatch.setattr(backends.LibraryDecoder, "_given", counted)
    monkeypatch.setattr(backends, "BATCH_BYTES", 3 * 96 * 64 * 5)
    np.testing.assert_array_equal(decode(path, backend=backend), expected)
    assert asked == [5, 5, 3]


def test_a_picture_of_another_time_is_refused(
    tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_video(tmp_path / "a.mp4", num_frames=60)
    made = backends.TorchcodecBackend if backend == "torchcodec" else backends.DecordBackend
    fetch = made.fetch

    def late(self: backends.LibraryDecoder, positions: list[int]) -> Iterator[backends.Given]:
        return fetch(self, [min(59, position + 1) for position in positions])  # type: ignore[arg-type]

    monkeypatch.setattr(made, "fetch", late)
    with pytest.raises(
        ClipError, match=f"{backend} gives the picture of .* use decode.backend = 'pyav'"
    ) as e:
        decode(path, backend=backend)
    assert e.value.reason == "backend"


def test_what_a_library_cannot_read_is_refused_by_name(tmp_path: Path, backend: str) -> None:
    untimed = make_video(tmp_path / "a.h264", num_frames=20)
    transparent = make_video(tmp_path / "a.mov", codec="qtrle", num_frames=20, pix_fmt="argb")
    turned = make_video(tmp_path / "a.mp4", size=(48, 96), num_frames=20, rotation=90, sar=Fraction(2))
    for path, why in ((untimed, "do not say when"), (transparent, "without alpha"), (turned, "not square")):
        assert len(decode(path)) == 13
        with pytest.raises(ClipError, match=f"{backend} cannot serve this file: .*{why}") as caught:
            decode(path, backend=backend)
        assert caught.value.reason == "backend"


def test_an_edit_list_they_mistake_is_refused(tmp_path: Path, backend: str) -> None:
    path = make_video(
        tmp_path / "a.mp4",
        num_frames=60,
        bframes=2,
        pts=[100 * (i - 7) for i in range(60)],
        container_options={"avoid_negative_ts": "disabled"},
    )
    assert read_number(decode(path)[0]) == 7
    with pytest.raises(ClipError) as caught:
        decode(path, backend=backend)
    assert caught.value.reason == "backend"


def test_decord_is_not_trusted_where_it_gives_other_pictures(tmp_path: Path) -> None:
    stream = make_video(tmp_path / "a.ts", codec="mpeg2video", num_frames=20)
    with pytest.raises(ClipError, match="other pictures than asked for from mpegts files"):
        decode(stream, backend="decord")
    opened = make_video(tmp_path / "a.mp4", codec="libx265", num_frames=60, bframes=2)
    with pytest.raises(ClipError, match="from open groups of pictures"):
        decode(opened, backend="decord")


def test_an_error_of_the_library_is_one_line_about_the_file(
    tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_video(tmp_path / "a.mp4", num_frames=20)

    def fail(*_: object) -> Iterator[backends.Given]:
        raise RuntimeError("no such frame\nat 0x1234")

    made = backends.TorchcodecBackend if backend == "torchcodec" else backends.DecordBackend
    monkeypatch.setattr(made, "fetch", fail)
    with pytest.raises(ClipError) as caught:
        decode(path, backend=backend)
    assert "RuntimeError: no such frame; use decode.backend" in caught.value.message


@pytest.mark.parametrize("name", ["torchcodec", "decord"])
def test_a_missing_library_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = make_video(tmp_path / "a.mp4", num_frames=4)
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, f"{name}.decoders", None)
    limits = LimitsConfig()
    with open_video(path, limits=limits) as video:
        packets = read_packets(video, limits=limits)
        decode = DecodeConfig.model_validate({"backend": name})
        with pytest.raises(MissingExtraError, match=rf"'{name}\S*'.*latentpress\[bench\]"):
            backends.open_backend(video, packets, decode=decode, limits=limits)


@pytest.mark.gpu
def test_nvdec_gives_the_pictures_that_we_give(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", size=(320, 240), num_frames=60, bframes=2)
    bucket = BucketConfig(num_frames=13, height=64, width=96)
    frames, _, _ = decode_clip(
        path,
        frames=FramesConfig(),
        buckets=[bucket],
        resize=ResizeConfig(),
        decode=DecodeConfig(backend="torchcodec", device="cuda"),
        limits=LimitsConfig(),
    )
    assert [read_number(frame) for frame in frames] == [i * 60 // 13 for i in range(13)]
    assert psnr(frames, decode(path, bucket=bucket)) > 32
