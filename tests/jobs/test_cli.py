"""The commands as a person or a program meets them: help, exit codes, messages, JSON."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.record import RESULTS
from jobs import cli
from jobs.preprocess import _ended_like_ctrl_c
from tests.videos import make_video

COMMANDS = [
    *("demo", "scan", "validate", "plan", "preprocess", "verify", "inspect"),
    *("import", "train", "export-model", "bench"),
]

CONFIG = """
manifest = "{folder}/manifest.jsonl"
output = "{folder}/latents"
[[buckets]]
num_frames = 9
height = 32
width = 48
[executor]
kind = "local"
[units]
rows = 2
"""


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Call the console script in this process."""

    def call(*args: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["latentpress", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return Result(int(stop.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    for name, frames in (("a.mp4", 12), ("b.mp4", 15), ("c.mp4", 5)):
        make_video(folder / name, num_frames=frames)
        (folder / name).with_suffix(".txt").write_text(f"a clip called {name}\n")
    (folder / "uncaptioned.mp4").write_bytes(b"x")
    (folder / "config.toml").write_text(CONFIG.format(folder=folder))
    return folder


def test_help_names_every_command_and_each_has_its_own(run: Any) -> None:
    top = run("--help")
    assert top.code == 0
    for command in COMMANDS:
        assert re.search(rf"^\s+{command}\s+\S", top.out, re.MULTILINE), command
        assert run(command, "--help").code == 0


WITHOUT_DIFFUSERS = "import sys; sys.modules['diffusers'] = None; from jobs.cli import main; main()"


@pytest.mark.parametrize("command", ["preprocess", "train"])
def test_a_missing_package_is_one_sentence_that_names_its_extra(folder: Path, command: str) -> None:
    vae = folder / "vae"
    vae.mkdir(exist_ok=True)
    (vae / "config.json").write_text('{"_class_name": "AutoencoderKLWan"}')
    (vae / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    (folder / "one.jsonl").write_text('{"video": "a.mp4", "caption": "a"}\n')
    settings = {
        "preprocess": (
            f"manifest={folder}/one.jsonl",
            "video_encoder.kind=diffusers",
            f"video_encoder.model={vae}",
        ),
        "train": (),
    }[command]
    config = {"preprocess": folder / "config.toml", "train": "configs/train/demo.toml"}[command]
    options = [part for setting in settings for part in ("--set", setting)]
    arguments = [sys.executable, "-c", WITHOUT_DIFFUSERS, command, str(config), *options]
    missing = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert missing.returncode == 2
    extra = {"preprocess": "pipeline", "train": "train"}[command]
    assert missing.stderr.splitlines()[-1] == (
        "latentpress: this needs the package 'diffusers', which is not installed: "
        f"pip install 'latentpress[{extra}]'"
    )


def test_the_road_from_a_folder_to_verified_latents(run: Any, folder: Path) -> None:
    manifest, config, latents = folder / "manifest.jsonl", folder / "config.toml", folder / "latents"

    scanned = run("scan", folder, "-o", manifest, "--json")
    assert scanned.code == 0
    assert json.loads(scanned.out)["rows"] == 3
    assert [left["video"] for left in json.loads(scanned.out)["left_out"]] == ["uncaptioned.mp4"]

    report = json.loads(run("validate", manifest, "-c", config, "--json").out)
    assert (report["rows"], report["good"], report["bad"]) == (3, 3, 0)
    assert report["codecs"] == {"h264": 3}

    planned = json.loads(run("plan", config, "--json").out)
    assert planned["buckets"] == {"9x32x48": 3}
    assert planned["shorter_than_bucket"] == 1
    assert planned["latents_bytes"] == 3 * 2 * (3 * 16 * 4 * 6) * 4
    assert not latents.exists()

    done = run("preprocess", config, "--json")
    assert done.code == 0
    assert json.loads(done.out)["kept"] == 3
    assert "latents  3/3" in done.err
    again = run("preprocess", config)
    assert "nothing to do" in again.out
    assert json.loads(run("plan", config, "--json").out)["already_done"] == 3

    assert run("verify", latents, "-c", config).code == 0
    assert json.loads(run("verify", latents, "--json").out)["clean"] is True

    picture = folder / "inspect.png"
    inspected = json.loads(run("inspect", latents, "b", "-o", picture, "--json").out)
    assert inspected["source"] == "b.mp4"
    assert picture.read_bytes().startswith(b"\x89PNG")

    refused = run("preprocess", config, "--set", "resize.mode=pad")
    assert refused.code == 2
    assert re.search(r"resize\.mode +dataset 'cover_crop', config 'pad'", refused.err)

    shard = next((latents / "latents").rglob("*.tar"))
    data = bytearray(shard.read_bytes())
    data[3000] ^= 1
    shard.write_bytes(data)
    damaged = run("verify", latents)
    assert damaged.code == 1
    assert shard.name in damaged.out


def test_too_many_failures_are_exit_code_3(run: Any, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"not a video")
    rows = [{"video": str(folder / "a.mp4"), "caption": "good"}, {"video": "bad.mp4", "caption": "bad"}]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.toml").write_text(CONFIG.format(folder=tmp_path))
    good = tmp_path / "good.jsonl"
    validated = run("validate", tmp_path / "manifest.jsonl", "-o", good)
    assert validated.code == 3
    assert "row 2  bad.mp4  open_failed" in validated.out
    assert [json.loads(line)["caption"] for line in good.read_text().splitlines()] == ["good"]
    assert run("validate", good).code == 0
    failed = run("preprocess", tmp_path / "config.toml")
    assert failed.code == 3
    assert "1 of 2 captioned clips kept, 1 quarantined" in failed.out
    assert run("preprocess", tmp_path / "config.toml", "--set", "quarantine.max_rate=0.5").code == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["preprocess", "nowhere.toml"], "config file nowhere.toml does not exist"),
        (["preprocess", "{config}", "--set", "unitz.rows=3"], "unknown key 'unitz'; did you mean 'units'?"),
        (["preprocess", "{config}", "--set", "buckets.0.num_frames=48"], "nearest are 45 and 49"),
        (["preprocess", "{config}", "--set", "manifest=gone.jsonl"], "manifest gone.jsonl does not exist"),
        (["preprocess"], "Missing argument 'CONFIG'"),
        (["preprocess", "{config}", "--bogus"], "No such option: --bogus"),
    ],
)
def test_usage_and_config_errors_are_exit_code_2(
    run: Any, folder: Path, args: list[str], message: str
) -> None:
    result = run(*(arg.format(config=folder / "config.toml") for arg in args))
    assert result.code == 2
    assert message in result.err
    assert "Traceback" not in result.err


def test_validate_and_plan_know_frame_rules_and_short_clips(run: Any, folder: Path, tmp_path: Path) -> None:
    manifest, config = tmp_path / "manifest.jsonl", folder / "config.toml"
    rows = [{"video": str(folder / name), "caption": name} for name in ("a.mp4", "c.mp4")]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("validate", manifest, "--set", "units.rows=2").code == 2
    wrong = run("validate", manifest, "-c", config, "--set", "buckets.0.num_frames=10")
    assert (wrong.code, "nearest are 9 and 13" in wrong.err) == (2, True)
    for short in ("drop", "error"):
        refused = run("validate", manifest, "-c", config, "--set", f"frames.short={short}", "--json")
        (problem,) = json.loads(refused.out)["problems"]
        assert (problem["row"], problem["reason"]) == (2, "too_short")
        changes = (f"manifest={manifest}", f"output={tmp_path / 'out'}", f"frames.short={short}")
        planned = run("plan", config, *(word for change in changes for word in ("--set", change)), "--json")
        assert [drop["reason"] for drop in json.loads(planned.out)["dropped"]] == ["too_short"]
        assert json.loads(planned.out)["clips"] == 1


def test_what_is_no_dataset_is_said_in_one_line(run: Any, tmp_path: Path) -> None:
    for command in ("verify", "inspect"):
        result = run(command, tmp_path)
        assert result.code == 1
        assert result.err.strip().splitlines() == [
            f"latentpress: {tmp_path} is not a latent dataset: it has no card.json"
        ]


def test_a_bench_of_training_records_its_numbers_unless_told_not_to(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = []

    def packing(clips: int, *, results: Path | None, **_: object) -> int:
        folders.append(results)
        return 0

    monkeypatch.setattr("jobs.bench_packing.packing", packing)
    assert run("bench", "packing").code == 0
    assert run("bench", "packing", "--no-record").code == 0
    assert folders == [RESULTS, None]


class TakenDown:
    """Gets a signal while it is taken down, where Python lets no exception out."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


def test_an_interrupt_that_falls_into_a_destructor_is_not_lost() -> None:
    def run() -> None:
        with _ended_like_ctrl_c():
            TakenDown()
            time.sleep(30)

    before = signal.getsignal(signal.SIGTERM)  # Ray leaves one of its own in a process it ran in
    with pytest.raises(KeyboardInterrupt):
        run()
    assert signal.getsignal(signal.SIGTERM) == before
