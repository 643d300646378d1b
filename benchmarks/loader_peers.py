"""One peer of `bench loader`, run by the Python of its own environment: samples in, seconds of an epoch out.

    python loader_peers.py PEER CODEC SAMPLES.json FOLDER WORKERS

Writes the samples of SAMPLES.json (a list of {name: [file, offset, bytes, shape]}) to FOLDER in the peer's
own format, unless they are there. Then a line of JSON answers every line on stdin: it has gone through all
samples once. Every peer gives bfloat16 tensors, in the order in which it reads fastest. CODEC "own" stores
them as its documentation stores tensors; "raw" stores bare bytes, made into tensors of known shapes here: the
least that it can do. The trade-off: NumPy knows no bfloat16, so some get 16-bit integers, viewed as what they
are when read. Imports nothing of this project.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.utils.data

Samples = list[dict[str, tuple[str, int, int, list[int]]]]
SHARD_BYTES = 64 * 2**20


def main() -> None:
    peer, codec, samples_path, folder, workers = sys.argv[1:]
    samples: Samples = json.loads(Path(samples_path).read_text(encoding="utf-8"))
    opened = PEERS[peer](samples, Path(folder), int(workers), codec == "raw")
    print(json.dumps({"version": version(peer), "torch": torch.__version__}), flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        count, nbytes = 0, 0
        for sample in opened():
            count += 1
            tensors = [each for each in sample.values() if isinstance(each, torch.Tensor)]
            nbytes += sum(tensor.nbytes for tensor in tensors)
            for tensor in tensors:
                look_at(tensor)
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "samples": count, "bytes": nbytes}), flush=True)


def look_at(tensor: torch.Tensor) -> None:
    """Look at one number of each page: a mapped file is not read before."""
    tensor.view(-1)[:: 4096 // tensor.itemsize].sum()


Epoch = Callable[[], Iterable[dict[str, torch.Tensor]]]


def of_webdataset(samples: Samples, folder: Path, workers: int, raw: bool) -> Epoch:
    """Own: .pth, which is torch.save's."""
    import webdataset

    stored, suffix = (payload, "bin") if raw else (tensor_of, "pth")
    if not folder.exists():
        folder.mkdir(parents=True)
        with webdataset.ShardWriter(str(folder / "%06d.tar"), maxsize=SHARD_BYTES, verbose=0) as writer:
            for i, sample in enumerate(samples):
                data = {f"{name}.{suffix}": stored(place) for name, place in sample.items()}
                writer.write({"__key__": f"{i:08d}", **data})
    shards = sorted(map(str, folder.glob("*.tar")))
    shapes = {f"{i:08d}": shapes_of(sample) for i, sample in enumerate(samples)}

    def tensors(sample: dict[str, Any]) -> dict[str, torch.Tensor]:
        known = shapes[sample["__key__"]]
        data = {name: sample[f"{name}.{suffix}"] for name in known}
        return {name: as_tensor(data[name], shape) for name, shape in known.items()} if raw else data

    dataset = webdataset.WebDataset(shards, shardshuffle=False)
    return again((dataset if raw else dataset.decode()).map(tensors), workers)


def of_litdata(samples: Samples, folder: Path, workers: int, raw: bool) -> Epoch:
    """Own: tensors. They come, as bytes do, as views of a mapped file: unread but for what is looked at."""
    import litdata

    if not folder.exists():
        writing = {"chunk_bytes": SHARD_BYTES, "num_workers": 1, "keep_data_ordered": True}
        indices = list(range(len(samples)))
        with quiet():
            litdata.optimize(Stored(samples, raw), indices, output_dir=str(folder), verbose=False, **writing)

    def tensors(sample: dict[str, Any]) -> dict[str, torch.Tensor]:
        shapes = shapes_of(samples[sample["number"]])
        if raw:
            return {name: as_tensor(sample[name], shape) for name, shape in shapes.items()}
        return {name: sample[name].view(torch.bfloat16) for name in shapes}

    # In the worker: a view of a mapped file cannot be sent to another process.
    dataset = litdata.StreamingDataset(str(folder), shuffle=False, transform=tensors)
    return again(dataset, workers, litdata.StreamingDataLoader)


def of_streaming(samples: Samples, folder: Path, workers: int, raw: bool) -> Epoch:
    """Own: ndarray; it refuses pickles unless told that they are safe."""
    import streaming

    if not folder.exists():
        columns = dict.fromkeys(samples[0], "bytes" if raw else "ndarray:uint16") | {"shapes": "json"}
        with streaming.MDSWriter(out=str(folder), columns=columns, size_limit=SHARD_BYTES) as writer:
            for sample in samples:
                data = {
                    name: payload(place) if raw else tensor_of(place).view(torch.uint16).numpy()
                    for name, place in sample.items()
                }
                writer.write({**data, "shapes": shapes_of(sample)})

    class Tensors(streaming.StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, at: int) -> dict[str, torch.Tensor]:
            sample = super().__getitem__(at)
            # An ndarray as it came: its bytes cannot be written to either, see `as_tensor`.
            return {name: as_tensor(sample[name], shape) for name, shape in sample["shapes"].items()}

    return again(Tensors(local=str(folder), batch_size=1, shuffle=False), workers)


PEERS: dict[str, Callable[[Samples, Path, int, bool], Epoch]] = {
    "webdataset": of_webdataset,
    "litdata": of_litdata,
    "mosaicml-streaming": of_streaming,
}


def again(dataset: Any, workers: int, loader: Any = torch.utils.data.DataLoader) -> Epoch:
    """Epochs of a dataset as it is, or sample by sample through workers that stay from epoch to epoch."""
    if workers == 0:
        return lambda: iter(dataset)
    through = loader(
        dataset,
        batch_size=1,  # litdata's takes no None
        collate_fn=only,
        num_workers=workers,
        persistent_workers=True,
        multiprocessing_context="fork",
    )
    return lambda: iter(through)


def only(samples: list[Any]) -> Any:
    (sample,) = samples
    return sample


class Stored:
    """Samples as litdata stores them, by number; a class, since it goes to other processes."""

    def __init__(self, samples: Samples, raw: bool) -> None:
        self._samples, self._raw = samples, raw

    def __call__(self, number: int) -> dict[str, Any]:
        sample = self._samples[number]
        data = {
            name: payload(place) if self._raw else tensor_of(place).view(torch.int16)
            for name, place in sample.items()
        }
        return {**data, "number": number}


def payload(place: tuple[str, int, int, list[int]]) -> bytes:
    path, offset, nbytes, _ = place
    with open(path, "rb") as file:
        return os.pread(file.fileno(), nbytes, offset)


def tensor_of(place: tuple[str, int, int, list[int]]) -> torch.Tensor:
    return as_tensor(payload(place), place[3])


def as_tensor(data: Any, shape: list[int]) -> torch.Tensor:
    """`data`: bytes, or anything that shows them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that bytes cannot be written to
        return torch.frombuffer(data, dtype=torch.bfloat16).view(shape)


def shapes_of(sample: dict[str, tuple[str, int, int, list[int]]]) -> dict[str, list[int]]:
    return {name: place[3] for name, place in sample.items()}


class quiet:
    """Progress bars and greetings go to stderr: stdout is for answers."""

    def __enter__(self) -> None:
        self._stdout = os.dup(1)
        os.dup2(2, 1)

    def __exit__(self, *_: object) -> None:
        sys.stdout.flush()
        os.dup2(self._stdout, 1)
        os.close(self._stdout)


if __name__ == "__main__":
    main()
