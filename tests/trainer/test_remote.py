"""Datasets in an object store: the same segments as from a folder, and a cache that keeps its bound."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from schemas import patience
from schemas.codec import checksum
from schemas.errors import ConfigError, DatasetError
from tests.object_server import ObjectServer, serving
from tests.trainer.datasets import write_dataset
from trainer.cache import Cache
from trainer.catalog import Catalog
from trainer.reader import SampleReader, Unreadable
from trainer.shards import Part, Payload
from trainer.visit import Visit

BUCKET = "bucket"


@pytest.fixture(scope="module")
def running_server() -> Iterator[ObjectServer]:
    with serving(BUCKET) as server:
        yield server


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("remote") / "latents")


@pytest.fixture(scope="module")
def stored(running_server: ObjectServer, local: Path) -> str:
    """The same dataset, in the store."""
    import s3fs

    s3fs.S3FileSystem().put(str(local), f"{BUCKET}/latents", recursive=True)
    return f"s3://{BUCKET}/latents"


@pytest.fixture
def server(running_server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectServer]:
    monkeypatch.setattr(patience, "BACKOFF_S", (0.01, 0.01, 0.01))
    running_server.reset()
    yield running_server
    running_server.reset()


def visits(catalog: Catalog, **changed: int) -> list[Visit]:
    return [
        Visit(
            row, changed.get("first", 0), changed.get("latent_frames", int(catalog.shapes[row, 0])), f"{row}"
        )
        for row in range(len(catalog))
    ]


def gets(server: ObjectServer) -> int:
    """Requests for bytes of shards."""
    return sum(method == "GET" and path.endswith(".tar") for method, path in server.requests)


def same(one: SampleReader, other: SampleReader, asked: list[Visit]) -> bool:
    pairs = [(one.segment(visit), other.segment(visit)) for visit in asked]
    return all(
        torch.equal(a.latents, b.latents) and torch.equal(a.prompt_embeds, b.prompt_embeds) for a, b in pairs
    )


def test_a_store_gives_what_a_folder_gives(
    stored: str, local: Path, server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.remote.PIECE_BYTES", 1000)
    catalog = Catalog(stored)
    remote, here = SampleReader(catalog), SampleReader(Catalog(local))
    assert same(remote, here, visits(catalog))
    assert gets(server) > 6 * len(catalog), "in pieces"
    assert same(remote, here, [Visit(0, 0, 1, "x", empty_prompt=True)])
    inner = [visit for visit in visits(catalog, first=1, latent_frames=1) if catalog.shapes[visit.row, 0] > 1]
    assert same(remote, here, inner)
    assert len(inner) > 3


def test_threads_share_a_store_and_a_cache(
    stored: str, local: Path, server: ObjectServer, tmp_path: Path
) -> None:
    catalog = Catalog(stored)
    reader, here = SampleReader(catalog, cache=str(tmp_path / "cache")), SampleReader(Catalog(local))
    asked = visits(catalog) * 4
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(reader.segment, asked))
    for visit, segment in zip(asked, found, strict=True):
        assert torch.equal(segment.latents, here.segment(visit).latents)


def test_what_is_kept_is_not_fetched_again(
    stored: str, local: Path, server: ObjectServer, tmp_path: Path
) -> None:
    catalog, here = Catalog(stored), SampleReader(Catalog(local))
    assert same(SampleReader(catalog, cache=str(tmp_path)), here, visits(catalog, latent_frames=1))
    assert gets(server) == 3 * len(catalog)
    again = SampleReader(catalog, cache=str(tmp_path))
    for asked in (visits(catalog), visits(catalog, latent_frames=1)):
        assert same(again, here, asked)
    assert gets(server) == 3 * len(catalog)


@pytest.mark.parametrize("wanted", [{}, {"latent_frames": 1}], ids=["whole", "windows"])
def test_a_damaged_file_of_the_cache_is_fetched_again(
    stored: str, local: Path, server: ObjectServer, tmp_path: Path, wanted: dict[str, int]
) -> None:
    catalog, here = Catalog(stored), SampleReader(Catalog(local))
    assert same(SampleReader(catalog, cache=str(tmp_path)), here, visits(catalog))
    torn, changed = sorted(kept(tmp_path))[:2]
    torn.write_bytes(torn.read_bytes()[:-1])
    data = changed.read_bytes()
    changed.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert same(SampleReader(catalog, cache=str(tmp_path)), here, visits(catalog, **wanted))
    assert gets(server) == 3 * len(catalog) + 2
    assert changed.read_bytes() == data


def kept(folder: Path) -> list[Path]:
    return [path for path in folder.glob("??/*") if not path.name.startswith(".")]


def test_what_fails_for_now_is_asked_for_again(stored: str, local: Path, server: ObjectServer) -> None:
    catalog = Catalog(stored)
    reader = SampleReader(catalog)
    server.deal("500", method="GET", path="tar", times=2)
    server.deal("lost", method="GET", path="tar", times=2)
    assert same(reader, SampleReader(Catalog(local)), visits(catalog))
    assert server.reset() == 0


def test_what_is_damaged_in_the_store_is_named_and_not_kept(
    stored: str, local: Path, server: ObjectServer, tmp_path: Path
) -> None:
    import s3fs

    catalog = Catalog(stored)
    places = catalog.places["mean"]
    shard = places.shard_names[places.shard[0]]
    whole = (local / shard).read_bytes()
    at = int(places.offset[0])
    fs, key = s3fs.S3FileSystem(), f"{BUCKET}/latents/{shard}"
    try:
        fs.pipe_file(key, whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        for looked in visits(catalog)[0], replace(visits(catalog)[0], latent_frames=1):  # also of a window
            with pytest.raises(DatasetError, match=rf"{shard}, sample {catalog.sample_id(0)}: .* crc32"):
                SampleReader(catalog, cache=str(tmp_path)).segment(looked)
        assert len(kept(tmp_path)) == 2
        fs.pipe_file(key, whole[: at + 10])
        with pytest.raises(DatasetError, match=rf"{shard}, .*: (mean|logvar) (ends after|cannot be read)"):
            SampleReader(catalog).segment(visits(catalog)[0])
        fs.rm_file(key)
        unreadable = Unreadable(1)
        assert SampleReader(catalog, unreadable=unreadable).segment(visits(catalog)[0]).weight == 0
        assert re.search(r"mean cannot be read", unreadable.samples[catalog.sample_id(0)])
    finally:
        fs.pipe_file(key, whole)


SIZE = 1000


def payload(number: int) -> bytes:
    return number.to_bytes(4, "little") * (SIZE // 4)


def part(number: int) -> Part:
    data = payload(number)
    return Part(Payload("shard", number, SIZE, checksum(data)), 0, memoryview(bytearray(SIZE)))


def held(folder: Path) -> int:
    return sum(path.stat().st_size for path in kept(folder))


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=10 * SIZE)
    for number in range(10):
        cache.add(str(number), payload(number))
        path = cache._path(str(number))
        os.utime(path, (number, number))
    assert cache.read("0", part(0)), "used just now"
    cache.add("10", payload(10))
    there = [number for number in range(11) if cache.read(str(number), part(number))]
    assert there == [0, 3, 4, 5, 6, 7, 8, 9, 10]
    assert held(tmp_path) == 9 * SIZE


def test_a_payload_larger_than_the_bound_is_not_kept(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=SIZE)
    cache.add("0", payload(0))
    assert kept(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"data\.cache = .*file.* cannot be written"):
        Cache(tmp_path / "file", max_bytes=SIZE)


def test_a_full_disk_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = Cache(tmp_path, max_bytes=10 * SIZE)

    def full(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    for number in range(3):
        cache.add(str(number), payload(number))
    assert capsys.readouterr().err.count("nothing more is kept in data.cache") == 1
    assert list(tmp_path.glob("??/*")) == []


def use(folder: Path, seed: int) -> None:
    """What a process does with the cache; ends when it is killed."""
    cache = Cache(folder, max_bytes=20 * SIZE)
    number = seed
    while True:
        number = (number * 31 + 7) % 50
        wanted = part(number)
        if cache.read(str(number), wanted):
            assert bytes(wanted.into) == payload(number)
        else:
            cache.add(str(number), payload(number))


def test_processes_share_a_cache_and_may_be_killed(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    cache = Cache(tmp_path, max_bytes=20 * SIZE)
    for turn in range(4):
        processes = [context.Process(target=use, args=(tmp_path, 3 * turn + i)) for i in range(3)]
        for process in processes:
            process.start()
        for _ in range(20):
            time.sleep(0.01)
            with cache._locked():  # nobody makes room while we count
                assert held(tmp_path) <= 20 * SIZE
        for process in processes:
            assert process.is_alive()
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
    there = [number for number in range(50) if cache.read(str(number), part(number))]
    assert len(there) > 5
    assert len(kept(tmp_path)) == len(there), "a torn file would have been deleted"
    assert held(tmp_path) <= 20 * SIZE


def test_files_that_a_killed_process_left_are_deleted(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=10 * SIZE)
    cache.add("0", payload(0))
    folder = cache._path("0").parent
    old, young = folder / ".tmp-1-1-x", folder / ".tmp-2-2-x"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    Cache(tmp_path, max_bytes=10 * SIZE)
    assert (old.exists(), young.exists()) == (False, True)
