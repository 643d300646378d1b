"""Whether an error means that memory ran out, and giving back what nobody uses.

Python, the kernel, torch's allocators and the libraries under them each say it in their own way; who halves a
batch and who retries a unit must agree on what it was.
"""

from __future__ import annotations

import errno
import gc
import sys

from schemas.errors import RunError

_SENTENCES = (
    "out of memory",  # CUDA, HIP; asynchronously too, as "CUDA error: out of memory"
    "can't allocate memory",  # torch's allocator on the host
    "not enough memory",
    "_STATUS_ALLOC_FAILED",  # cuBLAS, cuDNN
    "unable to find an engine to execute",  # cuDNN, without room for any workspace
)


class ProcessDied(RunError):
    """A process ended without a word; where the kernel wants memory back, that is how."""


class EncoderStarved(MemoryError):
    """One clip or caption at a time does not fit in memory; its sentence says what to do."""


def is_starved(error: BaseException) -> bool:
    """Whether memory ran out."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, Ray's
        return True
    return isinstance(error, RuntimeError) and any(sentence in str(error) for sentence in _SENTENCES)


def free_memory() -> None:
    """Collect what is only held in circles, and give torch's cached blocks back to the GPU."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
