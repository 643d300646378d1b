"""`latentpress report DATASET`: true numbers; a page that needs nothing else and runs nothing; its gaps."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs import cli, remedies, report_page
from jobs import report_dataset as module
from jobs.report_dataset import report_dataset
from pipeline.collect import find_orphans
from pipeline.generation import add_generation
from pipeline.source import Source
from schemas.card import Card, card_bytes, read_card
from schemas.check import check_dataset
from schemas.config import FramesConfig, ResizeConfig
from schemas.dataset import Dataset
from schemas.index import read_index, read_quarantine
from schemas.load import open_sealed_json, sealed_json
from schemas.manifest import ManifestRow
from schemas.sample import EMPTY_PROMPT_UNIT, unit_name
from schemas.store import location
from schemas.tables import sealed_parquet
from schemas.verdict import IMPORT_NAME, Mending
from tests.jobs.test_inspect import make_dataset
from tests.object_server import serving
from tests.trainer.datasets import write_dataset

HOSTILE = '<script>alert("1")</script><img src=http://example.com/x>&amp;"\'><b>'
Report = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("report") / "clips")


@pytest.fixture
def dataset(made: Path, tmp_path: Path) -> Path:
    """Two clips, one of them interpolated, and one in quarantine; the sources lie where they were."""
    return Path(shutil.copytree(made, tmp_path / "latents"))


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Report:
    """Make the page; its numbers, and the page as `text`."""

    def call(dataset: Path, *, samples: int = 12, **options: Any) -> dict[str, Any]:
        arguments = {"output": None, "vae": None, "samples": samples, "as_json": True} | options
        assert report_dataset(dataset, **arguments) == 0
        numbers: dict[str, Any] = json.loads(capsys.readouterr().out)
        return numbers | {"text": Path(numbers["page"]).read_text(encoding="utf-8")}

    return call


def rewrite(path: Path, table: pa.Table, **columns: list[Any]) -> None:
    """A table of a dataset, with other values in some columns."""
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(name), pa.array(values, table.schema.types[place]))
    path.write_bytes(sealed_parquet(table))


class Tags(HTMLParser):
    """What a browser takes for markup."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: list[tuple[str, str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]


def stays_inside(page: str) -> bool:
    """Nothing is loaded from elsewhere, and nothing runs."""
    tags = Tags()
    tags.feed(page)
    links = [value or "" for _, name, value in tags.attributes if name in ("src", "href")]
    runs = [name for tag, name, _ in tags.attributes if name.startswith("on")]
    safe = not {"script", "link", "iframe", "object"} & tags.names and not runs
    return safe and all(link.startswith("data:image/") for link in links) and "url(" not in page


def test_the_numbers_of_a_dataset_and_a_page_that_has_them_inside(dataset: Path, report: Report) -> None:
    found = report(dataset)
    assert found["page"] == str(dataset / "report.html")
    assert (found["clips"], found["rows"], found["captions"], found["quarantined"]) == (2, 2, 2, 1)
    index = read_index(dataset).to_pylist()
    assert found["video_s"] == pytest.approx(sum(row["num_frames"] / row["effective_fps"] for row in index))
    assert [each["bucket"] for each in found["buckets"]] == ["9x64x96", "9x96x64"]
    (torn,) = found["quarantine"]["most"]
    assert (torn["reason"], torn["rows"], torn["examples"][0]["source"]) == ("open_failed", 1, "torn.mp4")
    assert torn["remedy"] == remedies.remedy("open_failed")
    assert found["last_run"]["latents"]["clips"] == 3
    (run,) = found["runs"]["newest"]
    assert (run["clips"], run["quarantined"], run["prompts"]) == (2, 1, 4)
    assert found["generations"] == {
        "count": 1,
        "newest": [{"generation": 0, "added_or_changed": 3, "removed": 0}],
    }
    assert found["sources"]["sizes"] == [[96, 64, 1], [64, 96, 1]]
    assert found["sources"]["enlarged"] == 0
    assert {sample["source"] for sample in found["samples"]} == {"wide.mp4", "tall.mp4"}
    assert found["psnr_db"] > 25
    assert [row["source"] for row in found["far_ends"]["made_up"]] == ["tall.mp4"]

    page = found["text"]
    assert stays_inside(page)
    assert page.count("data:image/jpeg;base64,") == 2
    assert page.count("data:image/svg+xml;base64,") >= 3
    for words in ("Waves.", "torn.mp4", torn["remedy"], "9x96x64", found["fingerprint"][:12], "cosine codec"):
        assert words in page


def test_samples_are_the_same_ones_every_time(dataset: Path, report: Report) -> None:
    first, second = (report(dataset, samples=1) for _ in range(2))
    (sample,) = first["samples"]
    assert second["samples"] == [sample]
    pictures = [re.findall(r"data:image/jpeg;base64,([^\"]+)", each["text"]) for each in (first, second)]
    assert pictures[0] == pictures[1] != []


def test_captions_names_and_messages_are_text(dataset: Path, report: Report) -> None:
    index, failed = read_index(dataset), read_quarantine(dataset)
    rewrite(
        dataset / "index.parquet", index, caption=[HOSTILE] * 2, source=[HOSTILE] * 2, bucket=[HOSTILE] * 2
    )
    rewrite(dataset / "quarantine.parquet", failed, source=[HOSTILE], reason=[HOSTILE], message=[HOSTILE])
    found = report(dataset, samples=1)
    assert found["quarantine"]["most"][0]["reason"] == HOSTILE
    page = found["text"]
    assert stays_inside(page)
    assert page.count("&lt;script&gt;alert(") >= 5


def test_the_page_is_no_longer_for_what_is_longer(dataset: Path, report: Report) -> None:
    bare = len(report(dataset, samples=0)["text"])
    index, failed = read_index(dataset), read_quarantine(dataset)
    many = pa.concat_tables([index] * 1000)
    long = [f"{number} " + "<long> " * 1000 for number in range(many.num_rows)]
    rewrite(
        dataset / "index.parquet",
        many,
        sample_id=[f"{number:032x}" for number in range(many.num_rows)],
        caption=long,
        source=long,
        bucket=[f"9x64x{number}" for number in range(many.num_rows)],
        coverage=[0.1] * many.num_rows,
    )
    rows = pa.concat_tables([failed] * 1000)
    rewrite(dataset / "quarantine.parquet", rows, reason=long[:1000], message=long[:1000], source=long[:1000])
    found = report(dataset, samples=0)
    assert (found["clips"], found["quarantined"]) == (2000, 1000)
    assert len(found["text"]) < bare + 250_000


def test_a_source_that_is_gone_leaves_the_latents_and_a_sentence(tmp_path: Path, report: Report) -> None:
    dataset = make_dataset(tmp_path / "clips")
    (tmp_path / "clips" / "wide.mp4").unlink()
    shard = next((dataset / "latents").glob("*/*.tar"))
    found = report(dataset)
    told = {sample["source"]: sample for sample in found["samples"]}
    assert told["wide.mp4"]["psnr_db"] is None
    assert "is gone" in told["wide.mp4"]["notes"][0]
    assert told["tall.mp4"]["psnr_db"] == pytest.approx(found["psnr_db"], abs=0.01)
    assert found["text"].count("data:image/jpeg;base64,") == 2

    shard.write_bytes(bytes(shard.stat().st_size))
    found = report(dataset)
    assert all("is damaged" in sample["notes"][0] for sample in found["samples"])
    assert "data:image/jpeg" not in found["text"]
    assert (found["clips"], found["psnr_db"]) == (2, None)


def test_an_encoder_that_is_not_there_leaves_a_page_without_pictures(dataset: Path, report: Report) -> None:
    card = read_card(dataset)
    gone = card.settings.video_encoder.model_copy(update={"kind": "diffusers", "model": "/nowhere"})
    settings = card.settings.model_copy(update={"video_encoder": gone})
    (dataset / "card.json").write_bytes(card_bytes(card.model_copy(update={"settings": settings})))
    found = report(dataset)
    assert (found["samples"], found["clips"]) == ([], 2)
    assert "No pictures:" in found["text"]
    assert "its video encoder cannot be had" in found["text"]


def test_rows_of_a_run_that_was_killed_are_told(dataset: Path, report: Report) -> None:
    assert report(dataset, samples=0)["unfinished"] == 0
    opened = Dataset(dataset)
    more = [ManifestRow(i, source=f"{i}", path=f"/{i}", caption="New.") for i in range(4)]
    sources = {row.path: Source(digest=row.source, size=1, mtime_ns=0) for row in more}
    kept = opened.history().live_table(["source", "path", "caption", "source_digest", "size", "mtime_ns"])
    for number, row in enumerate(kept.to_pylist()):
        sources[row["path"]] = Source(row["source_digest"], size=row["size"], mtime_ns=row["mtime_ns"])
        words = {"source": row["source"], "path": row["path"], "caption": row["caption"]}
        more.append(ManifestRow(4 + number, **words))
    card = read_card(dataset)
    add_generation(opened, card, rows=more, sources=sources, unit_rows=2)  # and no unit is made
    rewrite(dataset / "quarantine.parquet", read_quarantine(dataset).slice(0, 0))
    found = report(dataset, samples=0)
    assert found["unfinished"] == 5  # with the one that is in no table now
    told = found["findings"][0]
    assert told.startswith("5 rows asked for are not in the index: the numbers below are those of an earlier")
    assert "; to go on: latentpress preprocess " in told
    assert "every row that was asked for" not in found["text"]

    add_generation(opened, card, rows=more[1:], sources=sources, unit_rows=2)  # asked for no longer
    assert report(dataset, samples=0)["unfinished"] == 4


def test_what_is_torn_or_repeated_is_told(dataset: Path, report: Report) -> None:
    with next((dataset / "runs").glob("*/log.jsonl")).open("a") as log:
        log.write('{"family": "latents", "kep')
    (dataset / "commits" / "00" / "u00000000.json").write_text("{")
    index = read_index(dataset)
    many = pa.concat_tables([index] * 20)
    rewrite(dataset / "index.parquet", many, caption=["A video."] * 40, caption_digest=["same"] * 40)
    found = report(dataset, samples=0)
    told = "\n".join(found["findings"])
    assert "one caption stands for 40 of 40 rows (100.0 %): 'A video.'" in told
    assert "1 commit record cannot be read" in told
    clips = [0, 1, 2, 3] * 10
    rewrite(
        dataset / "index.parquet", many, caption=["A video."] * 40, caption_digest=["same"] * 40, clip=clips
    )
    assert "one caption stands for 10 of 10 rows" in "\n".join(report(dataset, samples=0)["findings"])


def with_settings(dataset: Path, **changes: Any) -> Card:
    card = read_card(dataset)
    changed = card.model_copy(update={"settings": card.settings.model_copy(update=changes)})
    (dataset / "card.json").write_bytes(card_bytes(changed))
    return changed


@pytest.mark.parametrize(
    ("policy", "clips", "told", "advised"),
    [
        ("fps", "head", True, True),
        ("fps", "whole", True, True),
        ("fps", "chunk", False, False),
        ("contiguous", "slide", False, False),
        ("cogvideox_sat", "head", True, False),
    ],
)
def test_what_is_said_of_short_coverage_suits_the_policy(
    dataset: Path, report: Report, policy: str, clips: str, told: bool, advised: bool
) -> None:
    with_settings(dataset, frames=FramesConfig.model_validate({"policy": policy, "clips": clips}))
    rewrite(dataset / "index.parquet", read_index(dataset), coverage=[0.25, 0.75])
    found = report(dataset, samples=0)
    words = "\n".join(found["findings"])
    assert ("1 of 2 clips (50.0 %) stand for less than half" in words) == told
    assert ("frames.clips = 'chunk'" in words) == advised
    assert [row["share"] for row in found["far_ends"]["coverage"]] == ([0.25, 0.75] if told else [])
    assert ("The whole source is in" in found["text"]) == told


@pytest.mark.parametrize(("mode", "enlarged"), [("cover_crop", 1), ("stretch", 1), ("pad", 0)])
def test_a_source_that_is_enlarged_one_way_is_seen(
    dataset: Path, report: Report, mode: str, enlarged: int
) -> None:
    """In a bucket of 96 x 64, one of 192 x 32 is cut to 48 x 32, stretched in height, or made smaller."""
    with_settings(dataset, resize=ResizeConfig.model_validate({"mode": mode}))
    path = dataset / "commits" / "00" / "u00000000.json"
    record = open_sealed_json(path.read_bytes())
    (wide,) = [each for each in record["samples"] if each["meta"]["width"] == 96]
    wide["meta"]["clip"] |= {"source_width": 192, "source_height": 32}
    path.write_bytes(sealed_json(record))
    found = report(dataset, samples=0)
    assert found["sources"]["enlarged"] == enlarged
    assert found["sources"]["sizes"][0] in ([192, 32, 1], [64, 96, 1])


def test_quarantine_is_told_first(dataset: Path, report: Report) -> None:
    found = report(dataset, samples=0)
    told = found["findings"][0]
    assert told.startswith("1 of 3 rows (33.3 %) is quarantined, for open_failed: ")
    assert told.endswith(remedies.remedy("open_failed"))
    rewrite(dataset / "index.parquet", read_index(dataset).slice(0, 0))
    failed = pa.concat_tables([read_quarantine(dataset)] * 3)
    rewrite(dataset / "quarantine.parquet", failed, reason=["too_short", "open_failed", "too_short"])
    told = report(dataset, samples=0)["findings"]
    assert any("3 of 3 rows (100.0 %) are quarantined, most for too_short: " in each for each in told[:2])


def test_what_an_import_notes_lacks_or_does_not_know(dataset: Path, report: Report) -> None:
    summary = {"rows": 2, "notes": ["left.mp4 has no <caption>"], "empty_prompt": False}
    (dataset / "summary.json").write_text(json.dumps(summary))
    with_settings(dataset, frames=None, resize=None, picture=None)
    path = dataset / "commits" / "00" / f"{unit_name('prompts', EMPTY_PROMPT_UNIT)}.json"
    path.write_bytes(sealed_json(open_sealed_json(path.read_bytes()) | {"samples": []}))
    rewrite(dataset / "index.parquet", read_index(dataset), coverage=[None, None])
    (dataset / "metrics.jsonl").touch()
    found = report(dataset, samples=0)
    words = "\n".join(found["findings"])
    assert "left.mp4 has no <caption>" in words
    assert "there is no empty prompt" in words
    assert "a training run lies in the same folder" in words
    assert "The whole source is in" not in found["text"]
    assert "All frames are pictures of the source" not in found["text"]


@pytest.mark.parametrize(
    "summary",
    ["{", "[]", '{"clips": null}', '{"last_run": {"latents": {}}}', '{"last_run": 3}', '{"notes": [1]}', ""],
)
def test_a_summary_that_is_not_whole_costs_what_it_tells(dataset: Path, report: Report, summary: str) -> None:
    (dataset / "summary.json").write_text(summary)
    found = report(dataset, samples=0)
    assert (found["last_run"], found["clips"], found["unfinished"]) == (None, 2, 0)
    assert "summary.json, which a run writes at its end" in found["text"]


def test_stray_files_among_the_runs_and_names_that_are_no_text(
    dataset: Path, run: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    (dataset / "runs" / ".DS_Store").write_text("")
    (dataset / "runs" / "20300101T000000-1").write_text("")
    odd = Path(shutil.copytree(dataset, tmp_path / os.fsdecode(b"odd \xff")))
    code, said = run(odd, "--samples", 0)
    assert code == 0, said
    assert b"odd \\udcff" in (odd / "report.html").read_bytes()
    code, said = run(odd, "--samples", 0, "--json")
    assert (code, json.loads(said)["runs"]["count"]) == (0, 2)


@pytest.mark.parametrize("torn", ["{", "[]", '{"arguments": null}'])
def test_a_torn_note_of_an_import_is_passed_over(dataset: Path, torn: str) -> None:
    for number, text in enumerate(['{"arguments": ["musubi", "a b"]}', torn]):
        folder = dataset / "runs" / f"2030010{number + 1}T000000-import"
        folder.mkdir()
        (folder / IMPORT_NAME).write_text(text)
    assert Mending(Dataset(dataset)).rerun == f"latentpress import musubi 'a b' -o {dataset}"
    assert check_dataset(dataset).clean
    (dataset / "runs" / "20300101T000000-import" / IMPORT_NAME).write_text(torn)
    assert Mending(Dataset(dataset)).rerun == f"latentpress import ARGUMENTS -o {dataset}"


def test_a_page_that_cannot_be_written_is_told_before_the_work(
    dataset: Path, run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise AssertionError("worked before it was known where to write")

    with monkeypatch.context() as patched:
        patched.setattr(module, "IndexNumbers", fail)
        code, said = run(dataset, "-o", tmp_path)
        assert (code, "is a folder: name a file with -o" in said) == (2, True)
        code, said = run(dataset, "-o", dataset / "card.json" / "page.html")
        assert (code, "is no folder; name another file with -o" in said) == (2, True)
        patched.setattr(os, "access", lambda path, mode: False)  # as on a file system that is read-only
        code, said = run(dataset, "-o", tmp_path / "new" / "page.html")
        assert (code, "is read-only here; name another file with -o" in said) == (2, True)

    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(report_page, "replace", full)
    code, said = run(dataset, "--samples", 0)
    assert (code, "cannot be written: No space left on device; name another" in said) == (2, True)


def test_an_encoder_that_is_named_has_to_be_the_one(
    dataset: Path, run: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    code, said = run(dataset, "--vae", tmp_path)
    assert (code, "was encoded with dct, which has no files" in said) == (2, True)
    assert not (dataset / "report.html").exists()


def test_a_dataset_without_clips_has_a_page(dataset: Path, report: Report) -> None:
    rewrite(dataset / "index.parquet", read_index(dataset).slice(0, 0))
    found = report(dataset)
    assert (found["clips"], found["samples"], found["quarantined"]) == (0, [], 1)
    assert "open_failed: 1 row" in found["text"]


def test_the_page_is_no_trouble_to_its_dataset(dataset: Path, report: Report) -> None:
    report(dataset, samples=0)
    assert check_dataset(dataset).clean
    assert find_orphans(Dataset(dataset), older_than_s=0) == []


def test_a_dataset_in_an_object_store(
    tmp_path: Path, report: Report, run: Callable[..., tuple[int, str]]
) -> None:
    s3fs = pytest.importorskip("s3fs")
    local = write_dataset(tmp_path / "latents")
    with serving("bucket"):
        s3fs.S3FileSystem().put(str(local), "bucket/latents", recursive=True)
        stored = location("s3://bucket/latents")
        found = report(stored, output=tmp_path / "page.html", samples=0)
        assert found["clips"] == read_index(local).num_rows
        assert report_dataset(stored, output=None, samples=0, vae=None, as_json=False) == 0
        assert s3fs.S3FileSystem().cat("bucket/latents/report.html").startswith(b"<!DOCTYPE html>")
        assert run(local, "--samples", 0, "-o", "s3://bucket/page.html")[0] == 0
        assert s3fs.S3FileSystem().cat("bucket/page.html").startswith(b"<!DOCTYPE html>")


def test_every_reason_that_a_clip_fails_with_has_a_remedy() -> None:
    raised = r"(?:ClipError|failure|\.fail)\(\s*\"(\w+)\""
    code = "".join(path.read_text(encoding="utf-8") for path in Path("pipeline").rglob("*.py"))
    reasons = set(re.findall(raised, code)) - {"no_empty_prompt"}
    assert len(reasons) > 20
    assert {reason for reason in reasons if remedies.remedy(reason) == remedies.remedy("unheard of")} == set()


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["latentpress", "report", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0), "".join(capsys.readouterr())

    return call


def test_the_command_tells_a_dataset_from_a_run(
    dataset: Path, tmp_path: Path, run: Callable[..., tuple[int, str]]
) -> None:
    code, said = run(dataset, "--samples", 0)
    assert (code, f"wrote {dataset / 'report.html'}" in said) == (0, True)
    code, said = run(tmp_path)
    assert code == 2
    assert "found neither" in said
    assert "card.json" in said
    assert "metrics.jsonl" in said
    (tmp_path / "metrics.jsonl").write_text("")
    code, said = run(tmp_path)
    assert (code, "steps in its metrics.jsonl" in said) == (2, True)
    code, said = run(tmp_path, "--samples", 3)
    assert (code, "--samples and --vae are for datasets" in said) == (2, True)
