"""Commits on an object store: first writer wins, lost replies are seen through, blind stores refused."""

from __future__ import annotations

import json
import os
import pickle
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline import commit, object_store
from pipeline.collect import find_orphans, remove
from pipeline.generation import pending_units
from pipeline.graph import preprocess
from schemas import patience
from schemas.card import read_card
from schemas.check import check_dataset
from schemas.config import PreprocessConfig
from schemas.errors import ConfigError, DatasetError, RunError
from schemas.index import read_index, read_tensor
from schemas.load import check_config
from schemas.store import is_remote, location
from tests.object_server import Fault, ObjectServer, serving
from tests.pipeline.fake import ask, finish, make_dataset, make_rows, write_unit
from tests.videos import make_video

SECRET = "not-for-anybodys-eyes"
BUCKET = "bucket"


@pytest.fixture(scope="module")
def running_server() -> Iterator[ObjectServer]:
    with serving(BUCKET, secret=SECRET) as server:
        yield server


@pytest.fixture
def server(running_server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectServer]:
    monkeypatch.setattr(patience, "BACKOFF_S", (0.01, 0.01, 0.01))
    running_server.reset()
    yield running_server
    assert running_server.reset() == 0, "a fault that no request met tests nothing"


@pytest.fixture
def root(server: ObjectServer, request: pytest.FixtureRequest) -> Path:
    return location(f"s3://{BUCKET}/{request.node.name}/latents")


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir()) if root.exists() else []


def test_the_first_writer_of_a_record_wins(root: Path) -> None:
    path = root / "commits" / "00" / "u00000000.json"
    assert commit.commit_once(path, b"first")
    assert not commit.commit_once(path, memoryview(b"second"))
    assert commit.commit_once(path, b"first"), "the same bytes are as good as ours"
    assert path.read_bytes() == b"first"


def test_one_of_many_racing_writers_wins(root: Path) -> None:
    for key in range(8):
        path = root / f"{key}.json"
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda i, path=path: commit.commit_once(path, str(i).encode()), range(16)))
        assert won.count(True) == 1
        assert path.read_bytes() == str(won.index(True)).encode()


@pytest.mark.parametrize("fault", ["lost", "done, then 500"])
def test_a_put_whose_reply_is_lost_is_known_to_have_won(
    root: Path, server: ObjectServer, fault: Fault
) -> None:
    path = root / "u.json"
    server.deal(fault, path="u.json")
    assert commit.commit_once(path, b"ours")
    assert path.read_bytes() == b"ours"
    assert [method for method, where in server.requests if method == "PUT" and "u.json" in where] == [
        "PUT"
    ] * 2


def test_a_put_whose_refusal_is_lost_is_known_to_have_lost(root: Path, server: ObjectServer) -> None:
    path = root / "u.json"
    commit.commit_once(path, b"theirs")
    server.deal("lost", path="u.json", times=3)
    assert not commit.commit_once(path, b"ours")
    assert path.read_bytes() == b"theirs"
    server.reset()


@pytest.mark.parametrize("fault", ["500", "409"])
def test_what_fails_for_now_is_tried_again(root: Path, server: ObjectServer, fault: Fault) -> None:
    server.deal(fault, times=3)
    assert commit.commit_once(root / "u.json", b"record")
    server.deal("500", times=3)
    commit.replace(root / "index", b"index")
    assert ((root / "u.json").read_bytes(), (root / "index").read_bytes()) == (b"record", b"index")


def test_reads_that_fail_for_now_are_made_again(root: Path, server: ObjectServer, tmp_path: Path) -> None:
    dataset, card = make_dataset(root)
    ask(dataset, card, make_rows(tmp_path / "videos", 2))
    (latents,) = [made for made in finish(dataset, card) if made.family == "latents"]
    for name in ("card", "000000.parquet", "u00000000", "index"):
        server.deal("500", method="GET", path=name, times=5)  # botocore makes two tries of each of ours
    assert read_card(root) == card
    assert dataset.history().generations == 1
    assert dataset.commit("latents", 0) == latents
    assert read_index(root).num_rows == 2


def test_reads_that_keep_failing_are_said(root: Path, server: ObjectServer) -> None:
    dataset, _ = make_dataset(root)
    commit.commit_once(dataset.commit_path("latents", 0), b"{}")
    server.deal("500", method="GET", path="u00000000", times=100)
    with pytest.raises(DatasetError, match=r"u00000000\.json cannot be read: .*made up"):
        dataset.commit("latents", 0)
    server.reset()


def test_a_store_that_keeps_failing_stops_the_run_with_its_words(
    root: Path, server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "BACKOFF_S", (0.01,))
    server.deal("500", times=100)
    with pytest.raises(OSError, match="made up") as caught:
        commit.commit_once(root / "u.json", b"record")
    assert str(root) in str(caught.value)
    with pytest.raises(RunError, match="object store fails"), commit.open_store(root):
        pass
    server.reset()
    assert names(root) == []


def test_a_store_with_conditional_puts_is_taken(root: Path) -> None:
    with commit.open_store(root) as committing:
        assert committing == "put"
    assert names(root) == []


def test_a_store_that_ignores_conditions_is_refused(root: Path, server: ObjectServer) -> None:
    server.ignores_conditions = True
    with pytest.raises(RunError, match="overwrites an object"), commit.open_store(root):
        pass
    assert names(root) == []


def test_a_store_that_knows_no_conditions_is_refused(root: Path, server: ObjectServer) -> None:
    server.deal("501")
    with pytest.raises(RunError, match="cannot do what commits need"), commit.open_store(root):
        pass


def test_a_bucket_that_is_not_there_is_named(server: ObjectServer) -> None:
    with (
        pytest.raises(ConfigError, match=r"s3://nowhere/at/all cannot be written: .*bucket"),
        commit.open_store(location("s3://nowhere/at/all")),
    ):
        pass


def test_nobody_at_the_endpoint_is_said_without_secrets(
    monkeypatch: pytest.MonkeyPatch, server: ObjectServer
) -> None:
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setattr(patience, "BACKOFF_S", ())
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://somebody:{SECRET}@127.0.0.1:1")
    with pytest.raises(RunError, match="object store fails") as caught, commit.open_store(location("s3://b")):
        pass
    assert SECRET not in str(caught.value)
    s3fs.S3FileSystem.clear_instance_cache()


def shard(tmp_path: Path, nbytes: int) -> Path:
    temp = tmp_path / "temp"
    temp.write_bytes(bytes(range(256)) * (nbytes // 256) + b"end")
    return temp


@pytest.mark.parametrize("fault", ["500", "torn", "lost"])
def test_an_upload_ends_whole(root: Path, server: ObjectServer, tmp_path: Path, fault: Fault) -> None:
    temp = shard(tmp_path, 100_000)
    data = temp.read_bytes()
    server.deal(fault, path="shard")
    commit.publish(temp, root / "shard.tar")
    assert (root / "shard.tar").read_bytes() == data
    assert not temp.exists()


def test_an_upload_in_parts_is_held_against_the_parts_checksum(
    root: Path, server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "PART_BYTES", 5 * 2**20)
    temp = shard(tmp_path, 11 * 2**20)
    data = temp.read_bytes()
    commit.publish(temp, root / "shard.tar")
    assert (root / "shard.tar").read_bytes() == data
    assert sum(method == "PUT" for method, _ in server.requests) == 3
    assert [m for m, path in server.requests if "shard" in path].count("GET") == 1, "its ETag was enough"


def test_a_checksum_of_another_kind_makes_the_bytes_be_read_back(
    root: Path, server: ObjectServer, tmp_path: Path
) -> None:
    temp = shard(tmp_path, 100_000)
    server.deal("other etag", method="HEAD", path="shard")
    commit.publish(temp, root / "shard.tar")
    assert [method for method, path in server.requests if "shard" in path][:2] == ["PUT", "HEAD"]
    assert "GET" in {method for method, path in server.requests if "shard" in path}


def test_a_location_crosses_processes_and_sees_what_others_write(root: Path) -> None:
    assert is_remote(root)
    assert names(root) == []
    other = pickle.loads(pickle.dumps(root))
    commit.commit_once(other / "u.json", b"x")
    assert names(root) == ["u.json"]
    assert (other, str(other)) == (root, str(root))


@pytest.mark.parametrize(
    "url", [f"s3://me:{SECRET}@bucket/x", f"https://h/x?key={SECRET}", "s3://", "file:///x"]
)
def test_other_urls_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError, match="s3://BUCKET/PREFIX") as caught:
        location(url)
    assert SECRET not in str(caught.value)


def test_gc_finds_what_runs_leave_in_a_store_and_in_the_temp_folder(
    root: Path, server: ObjectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dataset, card = make_dataset(root)
    ask(dataset, card, make_rows(tmp_path / "videos", 3))
    finish(dataset, card)
    fs, key = object_store.handle(root)
    before = fs.find(key)
    left = {".tmp-probe-0123456789ab", "latents/00/u00000000-0123456789ab.tar"}
    for name in left:
        fs.pipe_file(f"{key}/{name}", b"left behind")
    bucket, _, prefix = key.partition("/")
    upload = {"Bucket": bucket, "Key": f"{prefix}/latents/00/u00000001-0123456789ab.tar"}
    upload["UploadId"] = fs.call_s3("create_multipart_upload", **upload)["UploadId"]
    fs.call_s3("upload_part", **upload, PartNumber=1, Body=b"part")
    fs.call_s3("create_multipart_upload", Bucket=bucket, Key="somebody/elses.tar")
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 2**22 + 1)  # above the highest process number
        (local := commit.temp_path(dataset.shard_folder("latents", 0))).write_bytes(b"half")
    commit.temp_path(dataset.shard_folder("latents", 0)).write_bytes(b"of a process that lives")

    young = find_orphans(dataset, older_than_s=3600)
    assert [orphan for orphan in young if orphan.upload is None] == []
    assert find_orphans(dataset, older_than_s=1e10) == []  # the server dates every upload to 2010
    orphans = find_orphans(dataset, older_than_s=0)
    assert {orphan.name for orphan in orphans} == {
        *left,
        "latents/00/u00000001-0123456789ab.tar",
        str(local),
    }
    assert sum(orphan.nbytes for orphan in orphans) == 2 * len(b"left behind") + len(b"part") + len(b"half")
    assert all(remove(dataset, orphan) for orphan in orphans)
    assert not any(remove(dataset, orphan) for orphan in orphans)
    assert fs.find(key) == before
    assert not local.exists()
    assert find_orphans(dataset, older_than_s=0) == []


@pytest.mark.slow
def test_preprocess_makes_the_same_shards_in_a_store_as_in_a_folder(
    root: Path, server: ObjectServer, tmp_path: Path
) -> None:
    """With replies lost, failures and conflicts on the way."""
    for name, num_frames in (("a.mp4", 30), ("b.mp4", 20)):
        make_video(tmp_path / name, num_frames=num_frames)
    (tmp_path / "broken.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:700])
    rows = [{"video": name, "caption": f"a clip {name}"} for name in ("a.mp4", "b.mp4", "broken.mp4")]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(output: str) -> bool:
        tree = {
            "manifest": str(tmp_path / "manifest.jsonl"),
            "output": output,
            "buckets": [{"num_frames": 9, "height": 32, "width": 48}],
            "units": {"rows": 2},
            "executor": {"kind": "local"},
        }
        return preprocess(check_config(tree, PreprocessConfig, where="test"))[1]

    for path in ("card", "probe", "t00000000", "u00000000", "000000.parquet", "index"):
        server.deal("lost", path=path)
    server.deal("done, then 500", path="commits/00/u00000001")
    server.deal("409", path="commits/00/t00000001")
    server.deal("torn", path=r"t00000001-.*\.tar")
    server.deal("500", path="summary", times=2)
    assert run(str(root))
    assert run(str(tmp_path / "local"))

    fs, key = object_store.handle(root)
    stored = {name.removeprefix(f"{key}/"): fs.cat_file(name) for name in fs.find(key)}
    local = {
        path.relative_to(tmp_path / "local").as_posix(): path.read_bytes()
        for path in (tmp_path / "local").rglob("*")
        if path.is_file()
    }
    exact = [name for name in local if name.endswith((".tar", "index.parquet", "quarantine.parquet"))]
    assert len(exact) == 6
    assert {name: stored[name] for name in exact} == {name: local[name] for name in exact}
    records = {name for name in local if not name.startswith("runs/")}
    assert {name for name in stored if not name.startswith("runs/")} == records

    assert not run(str(root)), "nothing to do"
    assert check_dataset(root).clean
    for row in read_index(root).to_pylist():
        assert read_tensor(root, row, "mean").shape == (3, 16, 4, 6)


def test_two_runs_on_one_store_do_no_harm(root: Path, server: ObjectServer, tmp_path: Path) -> None:
    """Both make every unit; of each one record counts, and the other's shard is the same or an orphan."""
    dataset, card = make_dataset(root)
    ask(dataset, card, make_rows(tmp_path / "videos", 6))
    units = [*pending_units(dataset, "prompts"), *pending_units(dataset, "latents")]
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda unit: write_unit(dataset, card, unit), [*units, *reversed(units)]))
    for unit in units:
        recorded = dataset.commit(unit.family, unit.number)
        assert [each for each in made if (each.family, each.unit) == (unit.family, unit.number)] == [
            recorded
        ] * 2
    finish(dataset, card)
    assert check_dataset(root).clean
    assert find_orphans(dataset, older_than_s=0) == []
