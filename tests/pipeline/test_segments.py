"""Encoding in pieces: any window of whole pieces has the numbers that encoding it alone gives."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.segments import Segmented
from pipeline.video_encode import DctEncoder, Moments, VideoEncoder, load_video_encoder
from schemas.config import VideoEncoderConfig
from schemas.errors import ConfigError
from tests.pipeline.test_dct import noise

PIECE = 9


def segmented(**config: object) -> VideoEncoder:
    return load_video_encoder(VideoEncoderConfig.model_validate({"segment_frames": PIECE, **config}))


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.data())
def test_windows_of_whole_pieces_are_what_encoding_them_alone_gives(
    num_clips: int, pieces: int, data: st.DataObject
) -> None:
    encoder = segmented()
    clips = noise(num_clips * pieces * PIECE, 16, 16).reshape(num_clips, pieces * PIECE, 16, 16, 3)
    start = data.draw(st.integers(0, pieces - 1))
    end = data.draw(st.integers(start + 1, pieces))
    whole, alone = encoder.encode(clips), encoder.encode(clips[:, start * PIECE : end * PIECE])
    assert whole["mean"].shape == (num_clips, encoder.geometry.latent_frames(pieces * PIECE), 16, 2, 2)
    for name, moments in whole.items():
        assert torch.equal(moments[:, start * 3 : end * 3], alone[name])
    for k in range(pieces):
        piece = clips[:, k * PIECE : (k + 1) * PIECE]
        assert torch.equal(
            whole["mean"][:, k * 3 : k * 3 + 3], DctEncoder(VideoEncoderConfig()).encode(piece)["mean"]
        )
    latents = whole["mean"][0].numpy()
    decoded = encoder.decode(latents)
    assert decoded.shape == clips[0].shape
    np.testing.assert_array_equal(
        encoder.decode(latents[start * 3 : end * 3]), decoded[start * PIECE : end * PIECE]
    )


class Counted(DctEncoder):
    """Keeps how many pieces it was given at once, and gives a first frame's moments apart."""

    def __init__(self) -> None:
        super().__init__(VideoEncoderConfig())
        self.calls: list[tuple[int, ...]] = []

    def batch_size(self, shape: tuple[int, int, int]) -> int:
        return 1000 // shape[0]

    def encode(self, frames: np.ndarray, *, tiled: bool = False) -> Moments:
        self.calls.append(frames.shape)
        moments = super().encode(frames)
        return {**moments, "image_mean": moments["mean"][:, :1] + 1}


def test_a_batch_is_never_more_pieces_than_clips() -> None:
    inner = Counted()
    encoder = Segmented(inner, PIECE)
    shape = (4 * PIECE, 16, 16)
    assert encoder.batch_size(shape) == 1000 // PIECE
    buffer = encoder.buffer(3, shape)
    assert buffer.dtype == np.uint8
    assert buffer.shape == (3, *shape, 3)
    buffer[...] = noise(3 * 4 * PIECE, 16, 16).reshape(buffer.shape)
    moments = encoder.begin(buffer)()
    assert inner.calls == [(3, PIECE, 16, 16, 3)] * 4
    assert moments["mean"].shape == (3, 12, 16, 2, 2)
    # What belongs to a first frame is that of the clip.
    assert torch.equal(moments["image_mean"], moments["mean"][:, :1] + 1)


def test_the_next_pieces_are_begun_before_the_wait_for_the_last() -> None:
    diary: list[str] = []

    class Watched(DctEncoder):
        def begin(self, frames: np.ndarray, *, tiled: bool = False) -> Callable[[], Moments]:
            diary.append("begin")
            moments = self.encode(frames)

            def wait() -> Moments:
                diary.append("wait")
                return moments

            return wait

    encoder = Segmented(Watched(VideoEncoderConfig()), PIECE)
    clips = noise(3 * PIECE, 16, 16)[None]
    assert torch.equal(encoder.encode(clips)["mean"], segmented().encode(clips)["mean"])
    assert diary == ["begin", "begin", "wait", "begin", "wait", "wait"]


def test_the_pieces_are_part_of_what_a_dataset_is() -> None:
    fields = segmented().hard_fields()
    assert fields == {**load_video_encoder(VideoEncoderConfig()).hard_fields(), "segment_frames": PIECE}


@pytest.mark.parametrize(
    ("frames", "near"),
    [(48, "nearest are 45 and 49"), (3, "nearest are 1 and 5"), (50, "nearest are 49 and 53")],
)
def test_a_piece_must_be_a_clip(frames: int, near: str) -> None:
    with pytest.raises(ConfigError, match=rf"segment_frames = {frames}: .* takes 4n \+ 1 frames; {near}$"):
        segmented(segment_frames=frames)


def test_what_is_no_whole_number_of_pieces_is_refused() -> None:
    encoder = segmented()
    with pytest.raises(ValueError, match="not a multiple of 9"):
        encoder.encode(noise(13, 16, 16)[None])
    with pytest.raises(ValueError, match="pieces of 3 latent frames"):
        encoder.decode(np.zeros((4, 16, 2, 2), np.float32))
