"""`latentpress export`: a dataset as others read it; the one job is to say how it goes and where it is."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from jobs.console import Pace, count_of, print_json, size
from pipeline.export import Written, new_folder, to_webdataset, to_zarr
from schemas.card import read_card
from schemas.errors import EXIT_DONE


def export(
    dataset: str | Path,
    output: Path,
    *,
    form: Literal["webdataset", "zarr"],
    shard_mb: int,
    as_json: bool,
) -> int:
    """Write `dataset` to the new folder `output`; `shard_mb` is about the size of a WebDataset shard."""
    card = read_card(dataset)
    pace, written = Pace("samples"), Written()
    with new_folder(output) as folder:
        if form == "webdataset":
            steps = to_webdataset(dataset, folder, shard_bytes=shard_mb * 10**6)
        else:
            steps = to_zarr(dataset, folder)
        for written in steps:
            pace.tick(written.samples, size(written.nbytes))
    if as_json:
        print_json(
            {
                "output": str(output),
                "format": form,
                "samples": written.samples,
                "shards": len(written.shards),
                "nbytes": written.nbytes,
                "fingerprint": card.fingerprint,
            }
        )
    else:
        shards = f" in {count_of(len(written.shards), 'shard')}" if form == "webdataset" else ""
        print(f"wrote {count_of(written.samples, 'sample')}{shards}, {size(written.nbytes)}, to {output}")
    return EXIT_DONE
