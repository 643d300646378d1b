"""`latentpress train` and `export-model`: a config in, a trained run out; the launcher of its ranks.

One rank trains in this process; more are started here, torchrun-style, each a fresh interpreter. Under
an outer torchrun (RANK is set) this process is one of its ranks and starts none. A failing rank ends
all and becomes one error; ranks whose launcher has died end themselves.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from schemas.card import read_card
from schemas.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_GATE,
    EXIT_USAGE,
    ConfigError,
    LatentpressError,
    RunError,
)
from schemas.load import load_config
from schemas.store import location
from schemas.train_config import MeshConfig, TrainConfig

if TYPE_CHECKING:
    from trainer.parallel import Member

Failure = tuple[int, str]
"""Exit code and message of a rank."""


def train(
    config_path: str | Path, *, overrides: Sequence[str] = (), nproc: int = 1, stage: str | None = None
) -> int:
    """Train, or resume, the run of a config on `nproc` local ranks; returns the exit code.

    With `stage` that stage alone, from its own `init` or `model.init`, in a subfolder of the run's output.
    """
    config = run_config(config_path, overrides=overrides, stage=stage)
    if "RANK" in os.environ:
        train_here(config)
    elif to_do(config, ranks=nproc):
        if nproc == 1:
            train_here(config)
        else:
            _launch(config, nproc)
    return EXIT_DONE


def run_config(config_path: str | Path, *, overrides: Sequence[str], stage: str | None) -> TrainConfig:
    """The config of a run, or of one stage of it as a run of its own."""
    config = load_config(config_path, TrainConfig, overrides=overrides)
    if stage is None:
        return config
    chosen = [each for each in config.stages if each.name == stage]
    if not chosen:
        names = ", ".join(each.name for each in config.stages)
        raise ConfigError(f"--stage {stage}: expected one of the stages of {config_path}: {names}")
    return config.model_copy(update={"stages": tuple(chosen), "output": str(Path(config.output) / stage)})


def to_do(config: TrainConfig, *, ranks: int) -> bool:
    """Whether steps, or a look after the last, are left, and says so where not.

    ConfigError where `ranks` do not make the mesh of the stage that is next, or the output is another run's:
    before any rank starts, or waits in a queue.
    """
    from trainer.curriculum import stage_at, total_steps
    from trainer.parallel import MeshShape
    from trainer.resume import already_finished, resume_point

    cards = [read_card(location(dataset.path)) for dataset in config.mixture]
    saved = resume_point(config, cards)
    if already_finished(config, saved):
        return False
    step = min(saved.step if saved else 0, total_steps(config.stages) - 1)
    stage, _ = stage_at(step, config.stages)
    MeshShape.of(stage.mesh or config.mesh, size=ranks)
    return True


def check(config_path: str | Path, *, overrides: Sequence[str], stage: str | None) -> int:
    """Print what `trainer.check` finds of a config; returns the exit code."""
    from jobs.console import console, table
    from trainer import parallel
    from trainer.check import check as run

    config = run_config(config_path, overrides=overrides, stage=stage)
    member, deterministic = parallel.Member.alone(), config.precision.deterministic
    with parallel.join(member, MeshConfig(), deterministic=deterministic) as world:
        findings = run(config, world=world)
    rows = table("check", "found", "")
    for finding in findings:
        outcome = {True: "ok", False: "FAILED", None: "cannot be told"}[finding.passed]
        rows.add_row(finding.question, finding.found, outcome)
    console.print(rows)
    return EXIT_GATE if any(finding.passed is False for finding in findings) else EXIT_DONE


def export_model(checkpoint: str | Path, output: str | Path, *, merge: bool = False) -> int:
    """Write a checkpoint's weights (or a run's newest) to a new folder in the diffusers layout."""
    from trainer.checkpoint import find_checkpoint
    from trainer.export import export

    saved = find_checkpoint(Path(checkpoint))
    notes = export(saved, Path(output), merge=merge)
    print("\n  ".join([f"{saved.path} (step {saved.step}) -> {output}", *notes]))
    return EXIT_DONE


def train_here(config: TrainConfig) -> None:
    """This process as one rank: alone, or as the environment says."""
    from trainer.parallel import Member

    member = Member.from_environment() if "RANK" in os.environ else Member.alone()
    _train_as(member, config, ended=lambda: None)


def _train_as(member: Member, config: TrainConfig, *, ended: Callable[[], None]) -> None:
    """`ended` is called as soon as training is over, well or not, before the ranks part."""
    from trainer import parallel
    from trainer.loop import train as run

    pictures = None
    if config.validation.samples:  # decoding needs more than training does
        from jobs.pictures import make_pictures

        pictures = make_pictures(config)
    with parallel.join(member, config.mesh, deterministic=config.precision.deterministic) as world:
        try:
            run(config, world=world, pictures=pictures)
        finally:
            ended()


def _launch(config: TrainConfig, nproc: int) -> None:
    """`nproc` ranks as child processes; RunError or ConfigError with what the first failing one said."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # re-exported without __all__

    # The parent holds the store, so that its port is known before any rank starts.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    ranks: dict[Connection, BaseProcess] = {}
    for rank in range(nproc):
        receiver, sender = context.Pipe(duplex=False)
        process: BaseProcess = context.Process(
            target=_rank, args=(rank, nproc, store.port, config, sender), name=f"rank {rank}", daemon=True
        )
        process.start()
        sender.close()
        ranks[receiver] = process
    failure: Failure | None = None
    running = dict(ranks)
    with _forwarded_signals([process.pid for process in ranks.values() if process.pid]) as forwarded:
        try:
            while running and failure is None:
                receiver = next(pipe for pipe in wait(list(running)) if isinstance(pipe, Connection))
                failure = _outcome(receiver, running.pop(receiver), forwarded)
        finally:
            # The others would wait for a failed one in a collective, and it for them, for ever.
            for process in (ranks if failure else running).values():
                process.kill()
            for process in ranks.values():
                process.join()
    if failure:
        code, message = failure
        if code == EXIT_DONE:
            print(message)
        else:
            raise ConfigError(message) if code == EXIT_USAGE else RunError(message)


def _outcome(receiver: Connection, process: BaseProcess, forwarded: Sequence[int]) -> Failure | None:
    """What a rank that ended had to say: nothing, or its failure; EXIT_DONE where it was told to stop."""
    try:
        result: Failure | None = receiver.recv()
    except EOFError:
        process.join()
        code = process.exitcode or 0
        if -code in forwarded:  # in training it is noted, and later ignored: none can have made a step
            return EXIT_DONE, "stopped before the first step; requeue me, the same command starts again"
        end = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return 1, f"{process.name} ended by {end}; the checkpoints are whole, run again to resume"
    return result


def _rank(rank: int, size: int, port: int, config: TrainConfig, sender: Connection) -> None:
    """A child: one rank of `_launch`; sends None when done, else (exit code, message)."""
    import torch
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # re-exported without __all__

    from trainer.parallel import Member

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the launcher, which ends all ranks
    threading.Thread(target=_die_with_launcher, daemon=True).start()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // size))
    try:
        member = Member(rank, rank, size, TCPStore("127.0.0.1", port, is_master=False))
        _train_as(member, config, ended=_ignore_stop_signals)
        sender.send(None)
    except LatentpressError as error:
        _give_up(sender, (error.exit_code, str(error)))
    except BaseException as error:
        traceback.print_exc()
        message = f"rank {rank} failed: {type(error).__name__}: {error}; its traceback is above"
        _give_up(sender, (EXIT_FAILED, message))


def _ignore_stop_signals() -> None:
    """A rank that has trained needs no telling to stop."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _give_up(sender: Connection, failure: Failure) -> None:
    """Tell the launcher and end at once: an interpreter's own end takes down communicators, which waits for
    ranks that wait for this one."""
    sender.send(failure)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(failure[0])


def _die_with_launcher() -> None:
    """A killed launcher must leave no rank behind."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def _forwarded_signals(pids: Sequence[int]) -> Iterator[list[int]]:
    """Pass stop signals on to the ranks, which then finish their step, save and end; collects them."""
    forwarded: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        forwarded.append(number)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield forwarded
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
