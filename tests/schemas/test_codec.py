"""The sample codec: round trips, offsets that readers can trust, and what safetensors itself reads."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from schemas.codec import (
    DTYPES,
    Tensor,
    as_float32,
    checksum,
    decode_sample,
    encode_sample,
    from_float32,
    tensor_from,
)
from schemas.errors import DatasetError

tensors = st.dictionaries(
    st.text("abcxyz_", min_size=1, max_size=8),
    st.sampled_from(sorted(DTYPES)).flatmap(
        lambda tag: hnp.arrays(
            DTYPES[tag], hnp.array_shapes(min_dims=0, max_dims=4, max_side=5, min_side=0)
        ).map(lambda data: Tensor(tag, data))
    ),
    max_size=4,
)


@given(tensors)
def test_round_trip_and_every_span_holds_its_payload(sample: dict[str, Tensor]) -> None:
    data, spans = encode_sample(sample, metadata={"k": "v"})
    again = decode_sample(data)
    assert again.keys() == sample.keys() == spans.keys()
    for name, tensor in sample.items():
        assert again[name].dtype == tensor.dtype
        assert again[name].data.tobytes() == tensor.data.tobytes()
        assert again[name].shape == tensor.shape
        payload = data[spans[name].offset : spans[name].offset + spans[name].nbytes]
        placed = tensor_from(payload, dtype=tensor.dtype, shape=list(tensor.shape))
        assert placed.data.tobytes() == tensor.data.tobytes()


def test_the_first_payload_is_aligned() -> None:
    for length in range(1, 80):
        _, spans = encode_sample({"x" * length: from_float32(np.ones(3), dtype="F32")})
        assert next(iter(spans.values())).offset % 64 == 0


def test_safetensors_reads_the_same_values_and_types() -> None:
    values = np.random.default_rng(0).standard_normal((3, 2, 4, 5)).astype(np.float32)
    data, _ = encode_sample({tag: from_float32(values, dtype=tag) for tag in ("F32", "F16", "BF16")})
    read = safetensors.torch.load(data)
    source = torch.from_numpy(values)
    assert torch.equal(read["F32"], source)
    assert torch.equal(read["F16"], source.half())
    assert torch.equal(read["BF16"], source.bfloat16())


@given(hnp.arrays(np.float32, 16, elements=st.floats(width=32)))
def test_bfloat16_rounds_as_torch_does_and_widens_exactly(values: np.ndarray) -> None:
    ours = as_float32(from_float32(values, dtype="BF16"))
    theirs = torch.from_numpy(values).bfloat16().float().numpy()
    assert np.array_equal(ours, theirs, equal_nan=True)


@given(st.binary(min_size=1, max_size=200), st.data())
def test_every_flipped_byte_changes_the_checksum(payload: bytes, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(payload) - 1))
    flipped = bytearray(payload)
    flipped[position] ^= data.draw(st.integers(1, 255))
    assert checksum(flipped) != checksum(payload)


def _with_header(header: object) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(16)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 4,
        (1 << 60).to_bytes(8, "little") + b"{}",
        _with_header([]),
        _with_header({"x": 3}),
        _with_header({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 400]}}),
        _with_header({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 16]}}),
        _with_header({"x": {"dtype": "F9", "shape": [4], "data_offsets": [0, 16]}}),
        _with_header({"x": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 16]}}),
    ],
)
def test_malformed_files_are_refused(data: bytes) -> None:
    with pytest.raises(DatasetError, match="not a safetensors file"):
        decode_sample(data)


def test_tensors_check_what_they_carry() -> None:
    with pytest.raises(ValueError, match="C-contiguous"):
        Tensor("F32", np.zeros((4, 4), np.float32).T)
    with pytest.raises(ValueError, match="BF16 is carried as"):
        Tensor("BF16", np.zeros(2, np.float32))
