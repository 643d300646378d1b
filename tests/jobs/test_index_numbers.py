"""The pass over an index: the numbers of whole columns are those of a plain loop over its rows."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from jobs.index_numbers import FAR_ENDS, IndexNumbers
from schemas.card import read_card
from schemas.index import open_index, read_index
from schemas.tables import SealedWriter
from tests.trainer.datasets import write_dataset

ROWS, GROUP = 300, 64


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "latents")


def write_index(dataset: Path, table: pa.Table) -> None:
    """In row groups of GROUP rows."""
    schema = read_index(dataset).schema
    (dataset / "index.parquet").unlink()
    with (dataset / "index.parquet").open("x+b") as file, SealedWriter(file, schema) as writer:
        for start in range(0, table.num_rows, GROUP):
            writer.write(table.slice(start, GROUP).cast(schema))


def made_up_rows(dataset: Path) -> list[dict[str, Any]]:
    """Runs of up to three rows with one clip; captions that repeat; holes where a value may be missing."""
    draw = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    base = read_index(dataset).to_pylist()
    while len(rows) < ROWS:
        clip = base[draw.integers(len(base))] | {
            "sample_id": f"{len(rows):032x}",
            "num_frames": int(draw.integers(1, 50)),
            "source_fps": None if draw.random() < 0.1 else float(draw.choice([24.0, 25.0, 30.0])),
            "effective_fps": float(draw.uniform(4, 30)),
            "coverage": None if draw.random() < 0.1 else float(min(1, draw.uniform(0.2, 1.2))),
            "num_interpolated": 0,
            "num_repaired": int(draw.integers(0, 2)),
            "frame_weights": [] if draw.random() < 0.1 else draw.uniform(0, 2, 3).astype("f4").tolist(),
        }
        clip["num_interpolated"] = int(draw.integers(0, clip["num_frames"] + 1)) * int(draw.integers(0, 2))
        for _ in range(draw.integers(1, 4)):
            number = int(draw.integers(40))
            prompt = {"prompt_embeds_nbytes": 10 * number, "prompt_mask_nbytes": number}
            clip["clip"] = int(draw.integers(0, 2))
            caption = {"caption": "é" * (number + 1), "caption_digest": f"{number}"}
            rows.append(clip | caption | prompt)
    return rows


def test_numbers_are_those_of_a_plain_loop(dataset: Path) -> None:
    rows = made_up_rows(dataset)
    write_index(dataset, pa.Table.from_pylist(rows, schema=read_index(dataset).schema))
    file = open_index(dataset)
    assert file.num_row_groups > 3
    found = IndexNumbers(file, read_card(dataset)).as_dict()

    clips = list({row["sample_id"]: row for row in rows}.values())
    captions = {row["caption_digest"]: row for row in rows}
    seconds = [row["num_frames"] / row["effective_fps"] for row in clips]
    assert (found["rows"], found["clips"], found["captions"]) == (len(rows), len(clips), len(captions))
    assert len(clips) < len(rows)
    assert found["video_s"] == pytest.approx(sum(seconds))
    assert found["tokens"] == sum(row["num_tokens"] for row in clips)
    assert found["latent_bytes"] == sum(row["mean_nbytes"] + row["logvar_nbytes"] for row in clips)
    assert found["prompt_bytes"] == sum(
        row["prompt_embeds_nbytes"] + row["prompt_mask_nbytes"] for row in captions.values()
    )
    expected = {
        "seconds": seconds,
        "source_fps": [row["source_fps"] for row in clips if row["source_fps"]],
        "stride": [row["source_fps"] / row["effective_fps"] for row in clips if row["source_fps"]],
        "caption_chars": [len(row["caption"]) for row in rows],
        "busiest": [max(row["frame_weights"]) for row in clips if row["frame_weights"]],
    }
    for name, values in expected.items():
        spread = found["spreads"][name]
        assert spread["min"] == pytest.approx(min(values), abs=1e-3)
        assert spread["max"] == pytest.approx(max(values), abs=1e-3)
        assert spread["sum"] == pytest.approx(sum(values), rel=1e-6, abs=1e-3)
        assert spread["median"] == pytest.approx(np.median(values), rel=0.02)
    made_up = [(row["num_interpolated"] + row["num_duplicated"]) / row["num_frames"] for row in clips]
    assert found["shares"]["made_up"]["as_usual"] == made_up.count(0)
    assert found["shares"]["made_up"]["far"] == sum(share > 0.5 for share in made_up)
    covered = [row["coverage"] for row in clips if row["coverage"] is not None]
    assert found["shares"]["coverage"]["far"] == sum(share < 0.5 for share in covered) > 0
    assert sum(found["shares"]["coverage"]["bars"]) == len(covered) < len(clips)
    assert found["repaired"] == sum(row["num_repaired"] > 0 for row in clips)

    sums: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for row, length in zip(clips, seconds, strict=True):
        sums[row["bucket"]][0] += 1
        sums[row["bucket"]][1] += length
    assert len(sums) > 2
    assert {each["bucket"]: each["clips"] for each in found["buckets"]} == {k: v[0] for k, v in sums.items()}
    assert {each["bucket"]: each["seconds"] for each in found["buckets"]} == {
        k: pytest.approx(v[1]) for k, v in sums.items()
    }

    worst = sorted((row["coverage"], i) for i, row in enumerate(clips) if (row["coverage"] or 1) < 1)
    listed = found["far_ends"]["coverage"]
    assert [row["sample_id"] for row in listed] == [clips[i]["sample_id"] for _, i in worst[:FAR_ENDS]]
    assert [row["share"] for row in listed] == pytest.approx([share for share, _ in worst[:FAR_ENDS]])
    most = found["repeated_captions"][0]
    assert found["asked"] == sum(row["clip"] == 0 for row in rows) < len(rows)
    told = Counter(row["caption"] for row in rows if row["clip"] == 0)
    assert most["rows"] == told[most["caption"]] == max(told.values())


@pytest.mark.parametrize("rows", [0, 1])
def test_an_index_of_next_to_nothing_has_numbers_too(dataset: Path, rows: int) -> None:
    table = pa.Table.from_pylist(made_up_rows(dataset)[:rows], schema=read_index(dataset).schema)
    write_index(dataset, table)
    found = IndexNumbers(open_index(dataset), read_card(dataset)).as_dict()
    assert (found["rows"], found["clips"], len(found["buckets"])) == (rows, rows, rows)
    assert found["repeated_captions"] == []
