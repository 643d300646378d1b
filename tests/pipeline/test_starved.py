"""What counts as memory that ran out."""

from __future__ import annotations

import errno

import pytest
import torch

from pipeline.starved import EncoderStarved, is_starved


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        EncoderStarved("one clip does not fit"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
    ],
)
def test_want_of_memory_is_known_by_all_its_names(error: Exception) -> None:
    assert is_starved(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("out of memory"),
    ],
)
def test_other_errors_are_not(error: Exception) -> None:
    assert not is_starved(error)


def test_an_allocation_that_torch_refuses_is_want_of_memory() -> None:
    with pytest.raises(RuntimeError) as found:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_starved(found.value)
