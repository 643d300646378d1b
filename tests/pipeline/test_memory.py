"""How much memory there is, and how many decoders are started for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.child_decoder import DECODE_AHEAD
from pipeline.decoders import DecoderShare
from pipeline.executor import CHILD_BYTES, local_share
from pipeline.memory import available_bytes
from schemas.config import PreprocessConfig
from schemas.load import check_config

GIB = 2**30
LONG = 1009 * 480 * 720 * 3


@pytest.mark.parametrize(
    ("group", "available"),
    [
        ({}, 8 * GIB),
        ({"max": "max", "current": GIB}, 8 * GIB),
        ({"max": 4 * GIB, "current": 2 * GIB}, 3 * GIB),
        ({"max": 64 * GIB, "current": 2 * GIB}, 8 * GIB),
        ({"max": GIB, "current": 3 * GIB}, 0),
    ],
)
def test_a_container_may_have_less_than_its_machine(
    tmp_path: Path, group: dict[str, int | str], available: int
) -> None:
    """Of what its cgroup has in use, 1 GiB is cache of files."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:  {8 * GIB // 1024} kB\n")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    for name, value in group.items():
        (tmp_path / f"sys/fs/cgroup/memory.{name}").write_text(f"{value}\n")
        (tmp_path / "sys/fs/cgroup/memory.stat").write_text(f"anon 5\ninactive_file {GIB}\nactive_file 7\n")
    assert available_bytes(tmp_path) == available


def test_there_is_some_here() -> None:
    assert available_bytes() > 0


def config_with(num_frames: int, **executor: Any) -> PreprocessConfig:
    bucket = {"num_frames": num_frames, "height": 480, "width": 720}
    tree = {"manifest": "m", "output": "o", "buckets": [bucket], "executor": {"kind": "local", **executor}}
    return check_config(tree, PreprocessConfig, where="test")


def test_decoders_of_one_process_fit_its_cores_and_half_the_memory() -> None:
    for_four = 2 * 4 * (DECODE_AHEAD * LONG + CHILD_BYTES)
    long = config_with(1009, workers=6)
    assert local_share(long, cores=16, memory=for_four) == DecoderShare(4, 4)
    assert local_share(long, cores=16, memory=for_four - 1) == DecoderShare(3, 3)
    assert local_share(long, cores=16, memory=0) == DecoderShare(1, 1)
    assert local_share(config_with(49), cores=16, memory=for_four) == DecoderShare(2, 16)
    assert local_share(config_with(49, workers=3), cores=2, memory=for_four) == DecoderShare(3, 3)
    fixed = config_with(1009, decoders_per_worker=7)
    assert local_share(fixed, cores=2, memory=0) == DecoderShare(7, 7)
