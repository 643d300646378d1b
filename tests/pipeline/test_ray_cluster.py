"""What of a cluster a worker gets: arithmetic over nodes, and actors of a Ray that is told it has GPUs."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.clip import ClipRecord
from pipeline.decoders import Decoders, DecoderShare
from pipeline.executor import in_worker, uses_ray
from pipeline.generation import Unit
from pipeline.ray_cluster import RayCluster, decoder_shares, gpus_per_worker, store_window
from pipeline.sandbox import Clip
from pipeline.starved import ProcessDied
from schemas.config import PreprocessConfig
from schemas.errors import ClipError, ConfigError
from schemas.load import check_config
from tests.videos import make_video

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
CLIP_BYTES = 9 * 32 * 48 * 3
STORE = "object_store_memory"


def config_with(**sections: Any) -> PreprocessConfig:
    buckets = [{"num_frames": 9, "height": 32, "width": 48}]
    tree = {"manifest": "m", "output": "o", "buckets": buckets, **sections}
    return check_config(tree, PreprocessConfig, where="test")


VAE = {"kind": "diffusers", "model": "folder"}


@pytest.mark.parametrize(
    ("sections", "have", "share"),
    [
        ({}, 8, 0.0),
        ({"video_encoder": VAE}, 8, 1.0),
        ({"video_encoder": VAE}, 0, 0.0),
        ({"video_encoder": VAE | {"device": "cpu"}}, 8, 0.0),
        ({"video_encoder": VAE | {"device": "cuda"}}, 0, 1.0),
        ({"text_encoder": {"kind": "t5", "model": "folder"}}, 1, 1.0),
        ({"decode": {"backend": "torchcodec", "device": "cuda"}}, 1, 1.0),
        ({"video_encoder": VAE, "executor": {"gpus_per_worker": 0.25}}, 1, 0.25),
        ({"video_encoder": VAE, "executor": {"gpus_per_worker": 0}}, 1, 0.0),
    ],
)
def test_a_worker_asks_for_a_gpu_where_something_runs_on_one(
    sections: dict[str, Any], have: float, share: float
) -> None:
    assert gpus_per_worker(config_with(**sections), have=have) == share


@pytest.mark.parametrize(
    ("executor", "nodes", "gpus", "most"),
    [
        ({"workers": 1}, [{"CPU": 16, "GPU": 1}], 1.0, 16),
        ({"workers": 16}, [{"CPU": 96, "GPU": 8}, {"CPU": 96, "GPU": 8}, {"CPU": 4}], 1.0, 12),
        ({"workers": 4}, [{"CPU": 10, "GPU": 1}], 0.5, 5),
        ({"workers": 4}, [{"CPU": 64}], 0.0, 16),
        ({"workers": 4}, [{"CPU": 4}], 0.0, 1),
        ({"workers": 2}, [{"CPU": 4}], 1.0, os.cpu_count()),
    ],
)
def test_decoders_of_a_worker_share_the_cores_of_its_node(
    executor: dict[str, Any], nodes: list[dict[str, float]], gpus: float, most: int
) -> None:
    shares = decoder_shares(config_with(executor=executor), nodes, gpus=gpus)
    assert shares == [DecoderShare(1, most)] * executor["workers"]
    fixed = config_with(executor=executor | {"decoders_per_worker": 3})
    assert set(decoder_shares(fixed, nodes, gpus=gpus)) == {DecoderShare(3, 3)}


def test_decode_actors_are_dealt_out_and_their_frames_fill_a_third_of_the_store_at_most() -> None:
    nodes: list[dict[str, float]] = [
        {"CPU": 8, STORE: 100 * CLIP_BYTES},
        {"CPU": 64, STORE: 1e12},
        {STORE: 1.0},
    ]
    config = config_with(executor={"workers": 3, "decode_actors": 7})
    shares = decoder_shares(config, nodes, gpus=0)
    assert [(share.at_least, share.at_most, share.window) for share in shares] == [
        (3, 3, 10),
        (2, 2, 10),
        (2, 2, 10),
    ]
    assert sum(share.window for share in shares) <= store_window(config, nodes) == 30
    nodes[0][STORE] = 12 * CLIP_BYTES
    assert [share.window for share in decoder_shares(config, nodes, gpus=0)] == [1, 1, 1]
    nodes[0][STORE] = 9 * CLIP_BYTES
    with pytest.raises(ConfigError, match=r"holds 2 clips .* 3 workers; lower executor\.workers.*store-mem"):
        decoder_shares(config, nodes, gpus=0)


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="decode_actors = 2 is fewer than workers = 3"):
        config_with(executor={"workers": 3, "decode_actors": 2})
    with pytest.raises(ConfigError, match="with decode_actors workers have none; set one"):
        config_with(executor={"workers": 1, "decode_actors": 2, "decoders_per_worker": 2})
    with pytest.raises(ConfigError, match="'local' has none"):
        config_with(executor={"kind": "local", "workers": 1, "decode_actors": 2})


def test_who_runs_on_ray() -> None:
    def on_ray(**executor: Any) -> bool:
        return uses_ray(config_with(executor=executor).executor)

    assert on_ray(workers=2)
    assert on_ray(workers=1, decode_actors=1)
    assert on_ray(workers=1, kind="ray")
    assert not on_ray(workers=1)
    assert not on_ray(workers=2, kind="local")


def double(number: int) -> int:
    return 2 * number


def test_without_ray_a_function_runs_here() -> None:
    config = config_with(executor={"kind": "local"})
    assert in_worker(config, os.getpid) == os.getpid()
    assert in_worker(config, double, 4) == 8


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """A Ray that is told it has two GPUs."""
    ray = pytest.importorskip("ray")
    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=2,
        object_store_memory=80 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
    )
    yield ray
    ray.shutdown()


def fail() -> None:
    raise ConfigError("of the function itself")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Sleeper:
    pass


def clips_of(decoders: Decoders, unit: Unit) -> list[tuple[np.ndarray, int, ClipRecord] | ClipError]:
    found: list[tuple[np.ndarray, int, ClipRecord] | ClipError] = []
    for _, clip in decoders.clips(unit, {}):
        if isinstance(clip, Clip):
            found.append((clip.frames.copy(), clip.bucket, clip.record))
            clip.release()
        else:
            found.append(clip)
    return found


@pytest.mark.ray
def test_frames_of_decode_actors_are_those_of_children_and_a_dead_actor_costs_at_most_its_clip(
    ray: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from pipeline import remote_decoders

    class Mortal(remote_decoders.DecodeActor):
        """Dies over one row once, and over another always."""

        def decode(self, row: Any) -> Any:
            died = tmp_path / "died"
            if row["key"] == "always" or (row["key"] == "once" and not died.exists()):
                died.touch()
                os._exit(1)
            return super().decode(row)

    rows = []
    for i, key in enumerate(["a", "once", "b", "broken", "always", "c", "d"]):
        path = tmp_path / f"{i}.mp4"
        make_video(path, num_frames=12 + i)
        if key == "broken":
            path.write_bytes(b"no video")
        stat = path.stat()
        listed = {"source_digest": "content:0", "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        window = {"start_s": None, "end_s": None, "clip": 0}
        rows.append({"key": key, "path": str(path), **listed, **window})
    unit, config = Unit("latents", 0, tuple(rows)), config_with()

    here = Decoders(config)
    local = clips_of(here, unit)
    here.close()
    monkeypatch.setattr(remote_decoders, "DecodeActor", Mortal)
    notes: list[tuple[str, str]] = []
    share = DecoderShare(2, 2, window=3)
    there = Decoders(config, share, note=lambda *note: notes.append(note))
    remote = clips_of(there, unit)
    assert [kind for kind, _ in notes] == ["decode_actor_died"] * 3
    assert all("decode actor died over " in sentence for _, sentence in notes)
    assert there.protections
    there.close()

    for row, mine, other in zip(rows, local, remote, strict=True):
        if row["key"] == "always":
            assert isinstance(other, ClipError)
            assert (other.reason, other.attempts) == ("decoder_crash", 2)
            assert "died 2 times, the second time alone" in other.message
        elif isinstance(mine, ClipError):
            assert row["key"] == "broken"
            assert isinstance(other, ClipError)
            assert (other.reason, other.message, other.stage) == (mine.reason, mine.message, mine.stage)
        else:
            assert not isinstance(other, ClipError)
            assert np.array_equal(mine[0], other[0])
            assert mine[1:] == other[1:]


@pytest.mark.ray
def test_who_waits_for_a_place_says_so_and_the_driver_hears_it(
    ray: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline import ray_join, remote_decoders

    monkeypatch.setattr(remote_decoders, "_SAY_EVERY_S", 0.1)
    hog = ray.remote(num_cpus=4)(Sleeper).remote()
    ray.get(hog.__ray_ready__.remote(), timeout=60)
    said: list[str] = []

    def tell(text: str) -> None:
        said.append(text)
        ray.kill(hog)

    decoder = remote_decoders.RemoteDecoder({}, config_with(), note=lambda *_: None, tell=tell)
    decoder._await(decoder.placed, 60.0)
    decoder.close()
    assert said
    assert "for Ray to find a free core for a decode actor" in said[0]

    ray.get([ray.remote(num_cpus=1)(ray_join.tell).remote(f"sentence {number}") for number in range(2)])
    assert sorted(ray_join.told()) == ["sentence 0", "sentence 1"]
    assert ray_join.told() == []


@pytest.mark.ray
def test_workers_see_exactly_their_gpu(ray: Any) -> None:
    def devices() -> str | None:
        return os.environ.get("CUDA_VISIBLE_DEVICES")

    def fail() -> None:
        raise ConfigError("of the function itself")

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    class Probe:
        def devices(self) -> str | None:
            return os.environ.get("CUDA_VISIBLE_DEVICES")

    def seen(workers: int, **sections: Any) -> list[str]:
        cluster = RayCluster(config_with(executor={"workers": workers}, **sections))
        actors = [cluster.actor(Probe).remote() for _ in range(workers)]
        found: list[str] = ray.get([actor.devices.remote() for actor in actors], timeout=60)
        for actor in actors:
            ray.kill(actor)
        return found

    assert sorted(seen(2, video_encoder=VAE)) == ["0", "1"]
    assert seen(1) == [""]

    gpu = config_with(executor={"workers": 1, "kind": "ray"}, video_encoder=VAE)
    assert in_worker(gpu, devices) in ("0", "1")
    with pytest.raises(ConfigError, match="of the function itself"):
        in_worker(gpu, fail)
    with pytest.raises(ProcessDied, match="a process that Ray ran died"):
        in_worker(gpu, die)

    with pytest.raises(ConfigError, match=r"3 workers of 1 CPU and 1 GPU each do not fit .*gpus_per_worker"):
        RayCluster(config_with(executor={"workers": 3}, video_encoder=VAE))
