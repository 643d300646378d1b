"""How fast latents come off the disk: our reader beside a bare read of the same bytes, and its peers.

In: a latent dataset. Out: the seconds of an epoch for each route, medians of interleaved runs, all from the
page cache. The ceiling is one `preadv` a tensor into one buffer and nothing else. "stored" is what the peers
do too: tensors as they are stored; ours in training order, and held against their checksums in the warm-up,
once a run. "segments" are what training gets: float32, scaled, looked through for NaN, drawn from the
posterior where the dataset holds moments. A peer stores tensors as its documentation does, and is what the
goal is held against; "raw bytes" is the best that its format can do. Trade-off: a page cache that holds every
copy is assumed.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
import venv
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks import loader_peers
from schemas.bucket import PATCH
from schemas.codec import DTYPES
from schemas.errors import RunError
from trainer.catalog import Catalog
from trainer.order import permutation
from trainer.reader import SampleReader
from trainer.visit import Visit

CEILING, STORED, SEGMENTS = "bare preadv", "ours, stored", "ours, segments"
PEERS = tuple(loader_peers.PEERS)
GOAL_CEILING, GOAL_PEER = 0.8, 2.5
"""Of the ceiling, and of the fastest peer with its own codec; ours as stored, 0 workers."""
CODECS = {"own": "", "raw": ", raw bytes"}
"""What `loader_peers` calls a way to store tensors, and what its routes are called after their peer."""


_INSTALLED = "installed"
"""A file in an environment that is whole."""


@dataclass
class Route:
    """One way to read all samples once, and what it took."""

    name: str
    workers: int
    epoch: Callable[[], float]
    """Seconds."""
    samples: int
    nbytes: int
    """As stored."""
    tokens: int
    """Video tokens at a patch_t of 1."""
    seconds: list[float] = field(default_factory=list)

    def numbers(self) -> dict[str, Any]:
        median = statistics.median(self.seconds)
        return {
            "route": self.name,
            "workers": self.workers,
            "gb_per_s": self.nbytes / median / 1e9,
            "samples_per_s": self.samples / median,
            "tokens_per_s": self.tokens / median,
            "seconds": self.seconds,
        }


def measure(
    datasets: Sequence[Path],
    *,
    peers_folder: Path,
    work: Path,
    workers: Sequence[int],
    reps: int,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Epochs of every route over the first dataset, of our segments over the others too, in turns."""
    with ExitStack() as held:
        routes = own_routes(datasets[0], workers, held)
        for other in datasets[1:]:
            routes += [route for route in own_routes(other, workers, held) if SEGMENTS in route.name]
        missing: dict[str, str] = {}
        samples = work / "samples.json"
        samples.write_text(json.dumps(places(datasets[0])), encoding="utf-8")
        versions = {}
        for name in PEERS:
            python = peer_python(peers_folder, name)
            if python is None:
                missing[name] = "not installed"
                continue
            for (codec, suffix), count in product(CODECS.items(), workers):
                called = name + suffix
                tell(f"{called}, {count} workers: writing its shards")
                try:
                    peer = Peer(python, name, codec, samples=samples, work=work, workers=count)
                    held.callback(peer.close)
                    peer.epoch()
                except RunError as error:
                    missing[f"{called}, {count} workers"] = str(error)
                    continue
                versions[name] = peer.version
                first = routes[0]
                routes.append(Route(called, count, peer.epoch, first.samples, first.nbytes, first.tokens))
        for route in routes:
            tell(f"{route.name}, {route.workers} workers: warm-up")
            route.epoch()
        for _ in range(reps):
            for route in routes:
                route.seconds.append(route.epoch())
    rows = [route.numbers() for route in routes]
    return {
        "samples": routes[0].samples,
        "bytes": routes[0].nbytes,
        "reps": reps,
        "routes": rows,
        "versions": versions,
        "missing": missing,
        **goals(rows),
    }


def goals(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Ours as stored, relative to the ceiling and to the fastest peer with each codec; all with 0 workers."""
    rates = {row["route"]: row["gb_per_s"] for row in rows if row["workers"] == 0}
    best = {
        codec: max(
            (name + suffix for name in PEERS if name + suffix in rates), key=rates.__getitem__, default=None
        )
        for codec, suffix in CODECS.items()
    }
    return {
        "of_ceiling": rates[STORED] / rates[CEILING],
        "best_peer": best,
        "of_best_peer": {codec: rates[STORED] / rates[name] for codec, name in best.items() if name},
    }


def own_routes(dataset: Path, workers: Sequence[int], held: ExitStack) -> list[Route]:
    """The ceiling, and our reader, with each count of threads."""
    catalog = Catalog(dataset)
    reader = SampleReader(catalog)
    held.callback(reader.close)
    names = (*catalog.card.latent_tensors, "prompt_embeds")
    nbytes = sum(
        catalog.places[name].shape.prod(1).sum() * DTYPES[catalog.places[name].dtype].itemsize
        for name in names
    )
    shapes = catalog.shapes
    tokens = int((shapes[:, 0] * (shapes[:, 2] // PATCH) * (shapes[:, 3] // PATCH)).sum())
    order = permutation(len(catalog), key=0).tolist()
    visits = [Visit(row, first=0, latent_frames=int(shapes[row, 0]), key=f"bench/{row}") for row in order]
    steps = {
        CEILING: bare_reads(catalog, names, held),
        STORED: lambda visit: looked_at(reader.stored(visit)),
        f"{SEGMENTS} {'drawn' if catalog.card.stored == 'moments' else 'not drawn'}": reader.segment,
    }
    return [
        Route(name, count, epochs(step, visits, count, held), len(catalog), int(nbytes), tokens)
        for name, step in steps.items()
        for count in workers
    ]


def epochs(
    step: Callable[[Visit], object], visits: Sequence[Visit], workers: int, held: ExitStack
) -> Callable[[], float]:
    """Goes through all visits, in this thread or in `workers` of a pool; seconds."""
    pool = held.enter_context(ThreadPoolExecutor(workers)) if workers else None

    def epoch() -> float:
        started = time.perf_counter()
        for _ in pool.map(step, visits) if pool else map(step, visits):
            pass
        return time.perf_counter() - started

    return epoch


def looked_at(tensors: dict[str, torch.Tensor]) -> None:
    """As the peers' tensors are."""
    for tensor in tensors.values():
        loader_peers.look_at(tensor)


def bare_reads(catalog: Catalog, names: Sequence[str], held: ExitStack) -> Callable[[Visit], None]:
    """Reads a sample's tensors and does nothing else: files are open, places known, the buffer is there."""
    places = []
    files: dict[str, int] = {}
    for name in names:
        of_name = catalog.places[name]
        for shard in of_name.shard_names:
            if shard not in files:
                files[shard] = os.open(Path(catalog.dataset) / shard, os.O_RDONLY)
                held.callback(os.close, files[shard])
        sizes = of_name.shape.prod(1) * DTYPES[of_name.dtype].itemsize
        fds = [files[of_name.shard_names[i]] for i in of_name.shard.tolist()]
        places.append(list(zip(fds, of_name.offset.tolist(), sizes.tolist(), strict=True)))
    view = memoryview(bytearray(max(size for of_name in places for _, _, size in of_name)))

    def read(visit: Visit) -> None:
        for of_name in places:
            file, offset, size = of_name[visit.row]
            os.preadv(file, [view[:size]], offset)

    return read


def places(dataset: Path) -> list[dict[str, tuple[str, int, int, list[int]]]]:
    """Every sample's tensors as `loader_peers` takes them."""
    catalog = Catalog(dataset)
    names = (*catalog.card.latent_tensors, "prompt_embeds")
    samples = []
    for row in range(len(catalog)):
        sample = {}
        for name in names:
            of_name = catalog.places[name]
            if of_name.dtype != "BF16":
                raise RunError(f"expected a dataset of bfloat16, found {name} of {of_name.dtype}")
            path = str(dataset / of_name.shard_names[of_name.shard[row]])
            shape = of_name.shape[row].tolist()
            size = 2 * int(of_name.shape[row].prod())
            sample[name] = (path, int(of_name.offset[row]), size, shape)
        samples.append(sample)
    return samples


class Peer:
    """A peer at work in a process of its own environment."""

    def __init__(
        self, python: Path, name: str, codec: str, *, samples: Path, work: Path, workers: int
    ) -> None:
        """Has it write its shards, unless they are there; RunError with its last words where it fails."""
        script, folder = Path(loader_peers.__file__), work / f"{name}-{codec}"
        self._errors = work / f"{name}-{codec}-{workers}.log"
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [python, script, name, codec, samples, folder, str(workers)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        try:
            self.version = str(self._answer()["version"])
        except RunError:
            self.close()
            raise

    def epoch(self) -> float:
        """Seconds of one."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # what it died of is in its answer
        return float(self._answer()["seconds"])

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # some greet their users
                return dict(json.loads(line))
        lines = self._errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise RunError(lines[-1] if lines else "it ended without a word")


def peers_home() -> Path:
    """Where peers are installed, below the user's cache folder."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    return root / "latentpress" / "bench-peers"


def peer_python(folder: Path, name: str) -> Path | None:
    """The interpreter of a peer's environment; None where it is not installed."""
    home = folder / name
    return home / "bin" / "python" if (home / _INSTALLED).exists() else None


def install_peers(folder: Path, *, tell: Callable[[str], None]) -> None:
    """Give each peer an environment of its own, with the torch it asks for, unless it has it."""
    for name in PEERS:
        if peer_python(folder, name):
            continue
        tell(f"installing {name} into {folder / name}")
        home = folder / name
        venv.create(home, with_pip=True, clear=True)
        pip = [str(home / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        done = subprocess.run([*pip, name, "torch", "numpy"], capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines()
            raise RunError(f"{name} cannot be installed: {said[-1] if said else 'pip does not say why'}")
        (home / _INSTALLED).touch()
