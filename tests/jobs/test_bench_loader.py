"""`bench loader`: what it makes up, measures, and says of peers that are not there."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import loader, loader_peers, made_up
from jobs import bench_loader
from schemas.errors import ConfigError, RunError
from trainer.catalog import Catalog


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(made_up, "LENGTHS", (2, 3))
    monkeypatch.setattr(made_up, "HEIGHT", 4)
    monkeypatch.setattr(made_up, "WIDTH", 6)
    monkeypatch.setattr(made_up, "PROMPT", (4, 8))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "latentpress" / "bench-peers"


@pytest.mark.usefixtures("small")
def test_every_route_is_measured_and_absent_peers_are_named(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = bench_loader.loader(
        None, clips=5, workers=2, reps=2, peers=False,
        json_path=tmp_path / "out.json", plot_path=tmp_path / "out.png", results=tmp_path,
    )  # fmt: skip
    out = capsys.readouterr().out
    assert code == 0
    report = json.loads((tmp_path / "out.json").read_text())
    names = {(row["route"], row["workers"]) for row in report["routes"]}
    ours = ("bare preadv", "ours, stored", "ours, segments drawn", "ours, segments not drawn")
    assert names == {(name, workers) for name in ours for workers in (0, 2)}
    assert all(len(row["seconds"]) == 2 for row in report["routes"])
    frames = 2 + 3 + 2 + 3 + 2
    assert report["bytes"] == 2 * (2 * frames * 16 * 4 * 6 + 5 * 4 * 8)
    assert set(report["missing"]) == set(loader.PEERS)
    for name in loader.PEERS:
        assert f"{name} is not in the comparison: not installed" in out
    assert bench_loader.INSTALL in out.replace("\n", " ")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert "machine" in json.loads((tmp_path / "loader.jsonl").read_text())


# webdataset leaves its shards to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("codec", loader.CODECS)
def test_a_peer_reads_the_very_tensors(tmp_path: Path, codec: str) -> None:
    """webdataset, which the tests have anyway, in a process of this environment."""
    pytest.importorskip("webdataset")
    dataset = made_up.write_dataset(tmp_path / "latents", clips=3)
    samples = loader.places(dataset)
    (tmp_path / "samples.json").write_text(json.dumps(samples))
    python = Path(sys.executable)
    peer = loader.Peer(
        python, "webdataset", codec, samples=tmp_path / "samples.json", work=tmp_path, workers=0
    )
    assert peer.epoch() > 0
    assert peer.version
    peer.close()
    folder = tmp_path / f"webdataset-{codec}"
    opened = loader_peers.of_webdataset(
        json.loads((tmp_path / "samples.json").read_text()), folder, 0, codec == "raw"
    )
    found = list(opened())
    catalog = Catalog(dataset)
    assert len(found) == len(catalog) == 3
    for sample, read in zip(samples, found, strict=True):
        assert all(torch.equal(read[name], stored(place)) for name, place in sample.items())


def stored(place: tuple[str, int, int, list[int]]) -> torch.Tensor:
    data = bytearray(loader_peers.payload(place))
    return torch.frombuffer(data, dtype=torch.bfloat16).view(place[3])


def test_a_peer_that_fails_says_why(tmp_path: Path) -> None:
    (tmp_path / "samples.json").write_text("[]")
    with pytest.raises(RunError, match="KeyError: 'nobody'"):
        loader.Peer(
            Path(sys.executable),
            "nobody",
            "raw",
            samples=tmp_path / "samples.json",
            work=tmp_path,
            workers=0,
        )


def test_goals_hold_the_stored_route_against_ceiling_and_best_peer() -> None:
    rates = {loader.CEILING: 4.0, loader.STORED: 3.6, "webdataset": 0.5, "litdata": 1.2}
    rates |= {"webdataset, raw bytes": 1.8}
    rows = [{"route": name, "workers": 0, "gb_per_s": rate} for name, rate in rates.items()]
    rows += [{"route": "litdata", "workers": 2, "gb_per_s": 100.0}]
    found = loader.goals(rows)
    assert found["best_peer"] == {"own": "litdata", "raw": "webdataset, raw bytes"}
    assert found["of_best_peer"] == pytest.approx({"own": 3.0, "raw": 2.0})
    assert found["of_ceiling"] == pytest.approx(0.9)
    assert loader.goals(rows[:2])["of_best_peer"] == {}


def test_a_place_for_results_that_is_not_there_is_said_first(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no folder"):
        bench_loader.loader(
            None, clips=1, workers=0, reps=1, peers=False, json_path=tmp_path / "no" / "x", plot_path=None
        )
