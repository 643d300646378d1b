"""`tiny-t5`: fixed weights, bytes that depend on the caption alone, padding and cuts as documented."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from pipeline.text_encode import TextEncoder, load_text_encoder
from pipeline.text_encoding import TextEncoding
from schemas.config import TextEncoderConfig

CAPTIONS = ["A cat.", "A dog.", "", "Ein Löwe 🦁 schläft.", "A person shuffles red cups on a table. " * 9]


def encoder(**settings: object) -> TextEncoder:
    return load_text_encoder(TextEncoderConfig.model_validate({"max_length": 64, **settings}))


def embeds(encoding: TextEncoding) -> np.ndarray:
    return encoding.tensors["prompt_embeds"].data


def test_full_padding_keeps_every_row() -> None:
    for caption, encoding in zip(CAPTIONS, encoder().encode(CAPTIONS), strict=True):
        num_bytes = len(caption.encode())
        assert encoding.tensors["prompt_embeds"].dtype == "F32"
        assert embeds(encoding).shape == (64, 64)
        assert encoding.num_tokens == num_bytes + 1
        assert encoding.truncated == (num_bytes + 1 > 64)
        mask = encoding.tensors["prompt_mask"].data
        assert mask.dtype == np.uint8
        assert mask.tolist() == [1] * min(num_bytes + 1, 64) + [0] * max(0, 63 - num_bytes)
    assert any(encoding.truncated for encoding in encoder().encode(CAPTIONS))


def test_trim_keeps_the_caption_s_rows_and_ignores_the_padding() -> None:
    short, long = (encoder(padding="trim", max_length=n).encode(["A cat."])[0] for n in (16, 64))
    assert embeds(short).shape == (7, 64)
    assert short.tensors["prompt_mask"].data.tolist() == [1] * 7
    np.testing.assert_allclose(embeds(short), embeds(long), atol=1e-5)
    full = encoder(max_length=16).encode(["A cat."])[0]
    assert np.abs(embeds(full)[:7] - embeds(short)).max() > 1e-3  # unmasked: the pad rows matter


def test_a_cut_caption_equals_its_beginning() -> None:
    whole, cut = encoder(max_length=8).encode(["A catalogue", "A catal"])
    assert (whole.truncated, whole.num_tokens) == (True, 12)
    assert (cut.truncated, cut.num_tokens) == (False, 8)
    np.testing.assert_array_equal(embeds(whole), embeds(cut))


@pytest.mark.parametrize("padding", ["full", "trim"])
def test_bytes_depend_on_the_caption_alone(padding: str) -> None:
    model = encoder(padding=padding)
    alone = [embeds(model.encode([caption])[0]) for caption in CAPTIONS]
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            torch.manual_seed(count)
            together = encoder(padding=padding).encode(CAPTIONS[::-1])[::-1]
            assert torch.get_num_threads() == count
            for want, got in zip(alone, together, strict=True):
                assert want.tobytes() == embeds(got).tobytes()
    finally:
        torch.set_num_threads(threads)


def test_loading_leaves_the_random_state_alone() -> None:
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    encoder().encode(["A cat."])
    assert torch.equal(torch.rand(3), want)


def test_different_captions_differ() -> None:
    rows = np.stack([embeds(encoding) for encoding in encoder().encode(CAPTIONS)])
    assert np.isfinite(rows).all()
    distance = np.sqrt(((rows[:, None] - rows) ** 2).mean((2, 3)))
    assert distance[~np.eye(len(rows), dtype=bool)].min() > 0.05 * np.sqrt((rows**2).mean())


def test_weights_are_pinned() -> None:
    """They belong to datasets on disk; a change must be meant, and makes those stale."""
    fields = encoder().hard_fields()
    assert fields["kind"] == "tiny-t5"
    assert fields["weights_sha256"] == "02de7370e0aa020f387f5dcd3a18a9b2aa82bbfbd7a8e04b123f18625db58618"


def test_importing_and_describing_loads_no_torch_and_encoding_warns_of_nothing() -> None:
    program = (
        "import sys\n"
        "from pipeline.text_encode import load_text_encoder\n"
        "from schemas.config import TextEncoderConfig\n"
        "encoder = load_text_encoder(TextEncoderConfig())\n"
        "encoder.hard_fields()\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        "encoder.encode(['A cat.' * 100])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
