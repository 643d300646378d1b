"""`latentpress report RUN`: the numbers of a made-up run, and a page that has them and needs nothing else."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from jobs.report_run import report_run
from schemas.errors import ConfigError
from trainer.checkpoint import FORMAT_VERSION, KEYS


def step(number: int, stage: str, **values: Any) -> dict[str, Any]:
    record = {
        "kind": "step",
        "step": number,
        "stage": stage,
        "loss": 1.0 / number,
        "grad_norm": 0.5,
        "lr": 1e-4,
        "tokens": 100,
        "tokens_per_s": 50.0,
        "fill": 0.9,
        "data_wait": 0.1,
        "seconds": 2.0,
        "eta_s": 6.0,
        "mfu": None,
        "memory_gb": 1.5,
        "loss_by_duration": {"0-3s": 1.0 / number},
        "unreadable": 0,
    }
    return record | values


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two stages of ten steps, resumed once, of a run of thirty."""
    folder = tmp_path / "a <b> run"
    records: list[Mapping[str, Any]] = [
        {"kind": "start", "step": 0, "repeated_steps": 0, "date": "2030-01-01T00:00:00+00:00"}
    ]
    records += [step(number, "short") for number in range(1, 11)]
    records.append({"kind": "save", "step": 10, "stage": "short", "blocked_s": 0.5, "background": True})
    resumed = {"kind": "start", "step": 10, "repeated_steps": 4, "date": "2030-01-02T00:00:00+00:00"}
    records.append(resumed | {"changes": ["stages.1.lr.peak: 0.001 -> 0.01"]})
    later = {"loss_by_duration": {"0-3s": 0.2, "3-9s": 0.4}, "mfu": 0.4}
    records += [step(number, "long", **later, unreadable=int(number > 15)) for number in range(11, 21)]
    records.append(
        {
            "kind": "validation",
            "step": 20,
            "stage": "long",
            "loss": 0.25,
            "shuffled_loss": 0.375,
            "loss_by_timestep": {"0.1": 0.125, "0.9": 0.0625},
            "loss_by_duration": {"0-3s": 0.3},
        }
    )
    (folder / "samples" / "step-20").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "config.toml").write_text(
        '[[stages]]\nname = "short"\nsteps = 10\n[[stages]]\nname = "long"\nsteps = 20\n'
    )
    Image.new("RGB", (8, 8), (200, 30, 30)).save(folder / "samples" / "step-20" / "sheet.png")
    return folder


def test_the_numbers_of_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report_run(run, output=None, as_json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["steps"], found["total_steps"], found["tokens"]) == (20, 30, 2000)
    assert found["training_s"] == 40.0
    short, long = found["stages"]
    assert (short["name"], short["first_step"], short["last_step"]) == ("short", 1, 10)
    assert (short["first_loss"], short["last_loss"]) == (1.0, 0.1)
    assert (short["tokens_per_s"], short["mfu"], long["mfu"]) == (50.0, None, 0.4)
    assert long["loss_by_duration"] == {"0-3s": 0.2, "3-9s": 0.4}
    assert found["saves"]["share"] == pytest.approx(0.5 / 40.5)
    assert [event["step"] for event in found["events"]] == [0, 1, 10, 11, 16]
    assert "resumed after step 10" in found["events"][2]["what"]
    assert found["events"][2]["what"].endswith("; 4 steps done again; stages.1.lr.peak: 0.001 -> 0.01")
    assert "1 unreadable" in found["events"][4]["what"]


def test_the_page_has_it_all_inside(run: Path) -> None:
    report_run(run, output=None, as_json=False)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "a &lt;b&gt; run" in page
    assert "a <b> run" not in page
    sources = re.findall(r'src="([^"]+)"', page)
    kinds = [source.partition(",")[0] for source in sources]
    assert kinds.count("data:image/png;base64") == 1
    assert kinds.count("data:image/svg+xml;base64") == len(sources) - 1 >= 8
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    for title in ("Loss by clip duration", "Gradient norm", "Model FLOPs utilization", "Saves"):
        assert f"<figcaption>{title}</figcaption>" in page
    assert "stages.1.lr.peak: 0.001 -&gt; 0.01</td>" in page
    for number in ("0.375", "0.125", "0.0625", "name = &#34;long&#34;"):
        assert number in page


def test_a_page_of_a_run_that_just_began(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps(step(1, "only")) + "\n")
    page = tmp_path / "elsewhere.html"
    assert report_run(tmp_path, output=page, as_json=False) == 0
    text = page.read_text(encoding="utf-8")
    titles = re.findall(r"<figcaption>([^<]+)</figcaption>", text)
    assert "Loss" in titles
    assert not {"Saves", "Model FLOPs utilization", "Loss by clip duration"} & set(titles)
    for content in re.findall(r"svg\+xml;base64,([^\"]+)", text):
        assert b"</svg>" in base64.b64decode(content)


def test_many_steps_make_no_large_page(tmp_path: Path) -> None:
    records = (step(number, "only", loss=100.0 if number == 7777 else 1.0) for number in range(1, 20_001))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    report_run(tmp_path, output=None, as_json=False)
    assert (tmp_path / "report.html").stat().st_size < 2e6


def test_folders_that_a_person_kept_are_no_steps(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meta = {"format_version": FORMAT_VERSION, "step": 20, "files": {"weights": 3}}
    for name in ("step-000020", "step-000020-keep", "step-000010"):
        folder = run / "checkpoints" / name
        folder.mkdir(parents=True)
        (folder / "meta.json").write_text(json.dumps(dict.fromkeys(KEYS, "") | meta))
        (folder / "weights").write_bytes(b"all" if name.startswith("step-000020") else b"")
    shutil.copytree(run / "samples" / "step-20", run / "samples" / "step-20-keep")
    report_run(run, output=None, as_json=True)
    assert json.loads(capsys.readouterr().out)["checkpoints"] == [{"step": 20, "bytes": 3}]


def test_a_page_has_to_be_a_file_that_can_be_written(run: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder: name a file with -o"):
        report_run(run, output=run, as_json=False)
    assert report_run(run, output=run / "new" / "page.html", as_json=False) == 0
    assert [path.name for path in (run / "new").iterdir()] == ["page.html"]


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="output folder of `latentpress train`"):
        report_run(tmp_path, output=None, as_json=False)
