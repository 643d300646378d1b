"""Checkpoints: completeness, what a kill leaves behind, keep-k, resharding, saves beside training."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from schemas.errors import ConfigError, RunError
from schemas.train_config import MeshConfig
from tests.trainer.gloo import on_ranks, on_two_ranks
from tests.trainer.test_parallel import Values, alone
from trainer import checkpoint
from trainer.checkpoint import Saved, examine, find_checkpoint, locked, newest
from trainer.parallel import World
from trainer.saver import Saver

REPOSITORY = Path(__file__).resolve().parents[2]
META: dict[str, Any] = {key: "" for key in checkpoint.KEYS if key not in ("step", "files")}
MESHES = (MeshConfig(dp_replicate=2), MeshConfig(tp=2), MeshConfig(sp=2))


class Layers(nn.Module):
    """Unevenly sharded matrices, a frozen one, and a buffer that is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 3, bias=False)
        self.frozen = nn.Linear(3, 5)
        self.register_buffer("table", torch.randn(6))
        self.frozen.requires_grad_(False)


def sharded(world: World, *, seed: int) -> tuple[Layers, torch.optim.AdamW]:
    """The same values on every rank and in every mesh."""
    torch.manual_seed(seed)
    model = Layers()
    if world.tp_mesh is not None:
        for layer in (model.first, model.second):
            parallelize_module(layer, world.tp_mesh, ColwiseParallel())
    fully_shard(model, mesh=world.mesh)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def train_and_save(
    world: World, output: str, steps: list[int], keep: int = 2, background: bool = True
) -> Values:
    """A checkpoint after each number of `steps`; returns the state of the last one."""
    model, optimizer = sharded(world, seed=0)
    with Saver(Path(output), world=world, keep=keep, background=background) as saver:
        for step in range(1, steps[-1] + 1):
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = (parameter.detach() * 0.1 + step).requires_grad_(False)
            optimizer.step()
            if step in steps:
                saver.save(step, model=model, optimizer=optimizer, meta=META)
        state = flat_state(model, optimizer)
        for parameter in model.parameters():  # the next step begins while the last one is being written
            parameter.detach().zero_()
        assert saver.wait().step == steps[-1]
    return state


def load(world: World, path: str) -> Values:
    model, optimizer = sharded(world, seed=1)
    saved = find_checkpoint(Path(path))
    checkpoint.load_model(saved, model)
    checkpoint.load_optimizer(saved, model, optimizer)
    return flat_state(model, optimizer)


def whole(value: torch.Tensor) -> torch.Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def flat_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Values:
    """Whole weights, buffers and moments, by name."""
    state = {name: whole(value) for name, value in model.state_dict().items()}
    for name, moments in checkpoint.optimizer_state(model, optimizer).items():
        state |= {f"{name}/{key}": whole(value) for key, value in moments.items()}
    return state


def assert_equal(found: Values, expected: Values) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Values]:
    """A run folder with checkpoints of two ranks after steps 2 and 3, and the state after 3."""
    output = tmp_path_factory.mktemp("run")
    return output, on_two_ranks(train_and_save, str(output), [1, 2, 3])[0]


@pytest.fixture
def folder(run: tuple[Path, Values], tmp_path: Path) -> Path:
    """A copy of its checkpoints folder."""
    return Path(shutil.copytree(checkpoint.checkpoints_folder(run[0]), tmp_path / "checkpoints"))


def test_two_ranks_reload_on_one_two_and_four_in_any_mesh(run: tuple[Path, Values]) -> None:
    output, expected = run
    assert len(expected) == 6 + 3 * 3
    assert all(value.abs().max() > 0 for value in expected.values())
    found = [alone(load, str(output)), *on_two_ranks(load, str(output))]
    for mesh in MESHES:
        found += on_ranks(4, load, str(output), mesh=mesh)
    for values in found:
        assert_equal(values, expected)


@pytest.mark.parametrize("mesh", MESHES, ids=["hsdp", "tp", "sp"])
def test_four_ranks_in_a_mesh_reload_on_one(tmp_path: Path, mesh: MeshConfig) -> None:
    expected = on_ranks(4, train_and_save, str(tmp_path), [2], mesh=mesh)[0]
    assert_equal(alone(load, str(tmp_path)), expected)


def test_a_save_at_once_is_the_same(run: tuple[Path, Values], tmp_path: Path) -> None:
    assert_equal(on_two_ranks(train_and_save, str(tmp_path), [1, 2, 3], 2, False)[0], run[1])
    for path in find_checkpoint(tmp_path).path.glob("*.distcp"):
        assert path.read_bytes() == (find_checkpoint(run[0]).path / path.name).read_bytes()


@pytest.mark.gpu
def test_a_save_beside_training_on_a_gpu_is_of_its_step(tmp_path: Path) -> None:
    """Through pinned memory, and with NCCL beside gloo."""
    expected = alone(train_and_save, str(tmp_path), [1, 2, 3], gpu=True)
    assert all(value.is_cuda for name, value in expected.items() if not name.endswith("step"))
    assert_equal(alone(load, str(tmp_path), gpu=True), expected)


def test_the_newest_are_kept_and_named(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-000002", "step-000003"]
    assert (folder / "latest").read_text().strip() == "step-000003"
    for start in (folder, folder.parent, folder / "step-000003"):
        assert find_checkpoint(start).step == 3
    assert find_checkpoint(folder / "step-000002").step == 2


@pytest.mark.parametrize("damage", ["no meta", "torn meta", "no file", "short file", "temporary name"])
def test_an_incomplete_checkpoint_is_passed_over(folder: Path, damage: str) -> None:
    last = folder / "step-000003"
    data = next(last.glob("*.distcp"))
    if damage == "no meta":
        (last / "meta.json").unlink()
    elif damage == "torn meta":
        (last / "meta.json").write_bytes((last / "meta.json").read_bytes()[:-20])
    elif damage == "no file":
        data.unlink()
    elif damage == "short file":
        data.write_bytes(data.read_bytes()[:-1])
    else:
        last.rename(folder / ".tmp-step-000003")
    assert not isinstance(examine(last), Saved)
    saved = newest(folder)
    assert saved is not None
    assert saved.step == 2


def complaint(world: World, path: str) -> str:
    """What is said of a checkpoint's files; nothing where they are as they were saved."""
    try:
        checkpoint.check_files(find_checkpoint(Path(path)))
    except RunError as error:
        return str(error)
    return ""


def test_a_damaged_file_is_named_on_all_ranks_with_what_to_do(folder: Path) -> None:
    last = folder / "step-000003"
    assert sorted(json.loads((last / "meta.json").read_text())["checksums"]) == sorted(
        path.name for path in last.iterdir() if path.name != "meta.json"
    )
    assert on_two_ranks(complaint, str(last)) == ["", ""]
    for name in (
        "__0_0.distcp",
        "__1_0.distcp",
        ".metadata",
    ):  # of each rank, and where all is
        path = last / name
        data = path.read_bytes()
        path.write_bytes(
            data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
        )
        said = on_two_ranks(complaint, str(last))
        assert said[0] == said[1] == alone(complaint, str(last))
        assert (
            f"step-000003 is damaged: {name} is not as it was saved; where it stays so, move it out of "
            in said[0]
        )
        assert said[0].endswith("checkpoints to go on from step-000002")
        path.write_bytes(data)
    (last / ".metadata").write_bytes(bytes((last / ".metadata").stat().st_size))
    shutil.rmtree(folder / "step-000002")
    with pytest.raises(RunError, match=r"step-000003 cannot be read: .*there is no older one to go on from"):
        alone(load, str(last))
    with pytest.raises(RunError, match=r"step-000003 cannot be read: .*UnpicklingError"):
        checkpoint.read_metadata(find_checkpoint(last))


def test_a_file_of_many_pieces_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_PIECE_BYTES", 10)
    path = tmp_path / "file"
    found = set()
    for at in range(35):
        path.write_bytes(bytes(at) + b"1" + bytes(34 - at))
        found.add(checkpoint.file_checksum(path))
    assert len(found) == 35


def test_a_save_that_dies_leaves_the_previous_one_and_is_cleaned_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone(train_and_save, str(tmp_path), [1])
    with monkeypatch.context() as patch:
        patch.setattr(
            "trainer.saver._write_durably", lambda path, text: (_ for _ in ()).throw(OSError("gone"))
        )
        with pytest.raises(RunError, match="gone; what is saved stays"):
            alone(train_and_save, str(tmp_path), [2])
    folder = checkpoint.checkpoints_folder(tmp_path)
    assert (folder / ".tmp-step-000002").is_dir()
    assert find_checkpoint(tmp_path).step == 1
    (folder / "step-000002").mkdir()  # and a bare folder under the final name
    alone(train_and_save, str(tmp_path), [2])
    assert find_checkpoint(tmp_path).step == 2
    assert not list(folder.glob(".tmp-*"))


def on_a_full_disk(world: World, output: str, background: bool) -> str:
    """What rank 0 and rank 1 are told when rank 1 cannot write."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    write_data = FileSystemWriter.write_data

    def full(*args: Any) -> Any:
        if world.rank == world.size - 1:
            raise OSError(28, "No space left on device")
        return write_data(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileSystemWriter, "write_data", full)
        with pytest.raises(RunError) as caught:
            train_and_save(world, output, [2], 2, background)
    return str(caught.value)


@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_of_one_rank_is_one_error_on_all_and_what_is_saved_stays(
    tmp_path: Path, background: bool
) -> None:
    on_two_ranks(train_and_save, str(tmp_path), [1])
    messages = on_two_ranks(on_a_full_disk, str(tmp_path), background)
    assert len(set(messages)) == 1
    assert (
        "step-000002 cannot be saved: [Errno 28] No space left on device; what is saved stays" in messages[0]
    )
    assert find_checkpoint(tmp_path).step == 1


def fail_during_a_save(world: World, output: str) -> bool:
    """Leave a saver by another error while a save is under way; whether that was so."""
    write_data, going_on = FileSystemWriter.write_data, threading.Event()

    def waiting(*args: Any) -> Any:
        going_on.wait(60)
        return write_data(*args)

    model, optimizer = sharded(world, seed=0)
    under_way = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileSystemWriter, "write_data", waiting)
        try:
            with Saver(Path(output), world=world, keep=2, background=True) as saver:
                saver.save(1, model=model, optimizer=optimizer, meta=META)
                under_way = newest(checkpoint.checkpoints_folder(Path(output))) is None
                going_on.set()
                raise KeyError("the step after")
        except KeyError:
            return under_way


def interrupted_in_the_wait(world: World, output: str) -> int:
    """Ctrl-C while the last save is waited for; the step that is then whole."""
    model, optimizer = sharded(world, seed=0)
    write_data = FileSystemWriter.write_data

    def interrupting(*args: Any) -> Any:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        return write_data(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileSystemWriter, "write_data", interrupting)
        saver = Saver(Path(output), world=world, keep=1, background=True)
        saver.save(1, model=model, optimizer=optimizer, meta=META)
        with pytest.raises(KeyboardInterrupt), saver:
            saver.wait()
    return find_checkpoint(Path(output)).step


def test_an_interrupt_ends_the_wait_for_a_save_but_not_the_save(tmp_path: Path) -> None:
    assert alone(interrupted_in_the_wait, str(tmp_path)) == 1


def test_an_interrupt_while_reading_is_no_damage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FileSystemReader, "read_data", interrupted)
    with pytest.raises(KeyboardInterrupt):
        alone(load, str(folder / "step-000003"))


def test_training_goes_on_beside_a_save_which_is_whole_even_where_that_fails(tmp_path: Path) -> None:
    assert on_two_ranks(fail_during_a_save, str(tmp_path)) == [True, True]
    assert find_checkpoint(tmp_path).step == 1


KILLED = """
import sys, time
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from tests.trainer.test_checkpoint import alone, train_and_save
write_data = FileSystemWriter.write_data
def slow(self, *args):
    done = write_data(self, *args)
    if "step-000002" in str(self.path):
        print("writing", flush=True)
        time.sleep(60)
    return done
FileSystemWriter.write_data = slow
alone(train_and_save, sys.argv[1], [1, 2])
"""


def test_kill_9_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    folder = checkpoint.checkpoints_folder(tmp_path)
    assert list((folder / ".tmp-step-000002").glob("*.distcp"))
    assert find_checkpoint(tmp_path).step == 1
    expected = alone(train_and_save, str(tmp_path), [2])
    assert not list(folder.glob(".tmp-*"))
    assert_equal(alone(load, str(tmp_path)), expected)


def test_where_there_is_none_the_message_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found no complete one"):
        find_checkpoint(tmp_path)


def test_another_format_is_refused(folder: Path) -> None:
    path = folder / "step-000003" / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 1}))
    with pytest.raises(RunError, match="expected format_version 2, found 1"):
        newest(folder)


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "run"),
        pytest.raises(RunError, match="another run is training"),
        locked(tmp_path / "run"),
    ):
        pass
    with locked(tmp_path / "run"):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="expected a folder"), locked(tmp_path / "file"):
        pass
