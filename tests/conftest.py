"""What all tests share: one thread per library, no network, the real clips, and the rule for GPU tests."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# Before torch or transformers are imported, and inherited by every child process a test starts.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="latentpress-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

# Shared machines are slow at times: how long an example takes says nothing about the code.
hypothesis.settings.register_profile("latentpress", deadline=None)
hypothesis.settings.load_profile("latentpress")

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def clips_dir() -> Path:
    """The folder of real, awkward clips: $LATENTPRESS_CLIPS, else ../shared/clips beside the repository."""
    folder = Path(os.environ.get("LATENTPRESS_CLIPS") or REPOSITORY.parent / "shared" / "clips")
    if not (folder / "manifest.jsonl").is_file():
        pytest.skip(f"no manifest.jsonl in {folder}; set LATENTPRESS_CLIPS to the folder of shared clips")
    return folder


@pytest.fixture(autouse=True)
def _ctrl_c_does_what_it_did() -> Iterator[None]:
    """A library's handler that a test left behind is that test's failure, not one of a later test."""
    before = signal.getsignal(signal.SIGINT)
    yield
    after = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)
    assert after == before


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A `gpu` test without a CUDA device is skipped, or fails when REQUIRE_GPU=1."""
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    if torch.cuda.is_available():
        return
    if os.environ.get("REQUIRE_GPU") == "1":
        pytest.fail("REQUIRE_GPU=1 is set, but torch finds no CUDA device")
    pytest.skip("needs a CUDA device")
