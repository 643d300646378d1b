"""The ranks of a run on one machine: a config and their number in, one outcome of them all out.

Each is a fresh interpreter, as torchrun starts them. Stop signals and the first Ctrl-C are passed on to all
ranks, the second Ctrl-C ends them. A failing one ends the others and becomes one error, and ranks whose
launcher has died end themselves.
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
from types import FrameType
from typing import TYPE_CHECKING

from schemas.errors import EXIT_DONE, EXIT_FAILED, EXIT_USAGE, ConfigError, LatentpressError, RunError
from schemas.train_config import TrainConfig
from trainer.stopping import CTRL_C, STOP_SIGNALS

if TYPE_CHECKING:
    from trainer.parallel import Member

Failure = tuple[int, str]
"""Exit code and message of a rank."""


def train_as(member: Member, config: TrainConfig, *, ended: Callable[[], None]) -> None:
    """Train as one rank; `ended` is called once training is over, well or not, before the ranks part."""
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


def launch(config: TrainConfig, nproc: int) -> None:
    """`nproc` ranks as child processes; RunError or ConfigError with what the first failing one said,
    KeyboardInterrupt where Ctrl-C was pressed."""
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
    elif signal.SIGINT in forwarded:
        raise KeyboardInterrupt


def _outcome(receiver: Connection, process: BaseProcess, forwarded: Sequence[int]) -> Failure | None:
    """What a rank that ended had to say: nothing, or its failure; EXIT_DONE where it was told to stop, and
    KeyboardInterrupt where that was Ctrl-C."""
    try:
        result: Failure | None = receiver.recv()
    except EOFError:
        process.join()
        code = process.exitcode or 0
        if -code in forwarded:  # in training it is noted, and later ignored: none can have made a step
            if -code == signal.SIGINT:
                raise KeyboardInterrupt from None
            return EXIT_DONE, "stopped before the first step; run the same command again (requeue me)"
        end = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return EXIT_FAILED, f"{process.name} ended by {end}; the checkpoints are whole, run again to resume"
    return result


def _rank(rank: int, size: int, port: int, config: TrainConfig, sender: Connection) -> None:
    """A child: one rank of `launch`; sends None when done, else (exit code, message)."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once, until its first step begins
    import torch
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # re-exported without __all__

    from trainer.parallel import Member

    threading.Thread(target=_die_with_launcher, daemon=True).start()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // size))
    try:
        member = Member(rank, rank, size, TCPStore("127.0.0.1", port, is_master=False))
        train_as(member, config, ended=_ignore_stop_signals)
        sender.send(None)
    except KeyboardInterrupt:  # all is saved, and the launcher has heard it too
        _give_up(sender, None)
    except LatentpressError as error:
        _give_up(sender, (error.exit_code, str(error)))
    except BaseException as error:
        traceback.print_exc()
        message = f"rank {rank} failed: {type(error).__name__}: {error}; its traceback is above"
        _give_up(sender, (EXIT_FAILED, message))


def _ignore_stop_signals() -> None:
    """A rank that has trained needs no telling to stop."""
    for number in (*STOP_SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _give_up(sender: Connection, failure: Failure | None) -> None:
    """Tell the launcher and end at once: an interpreter's own end takes down communicators, which waits for
    ranks that wait for this one."""
    sender.send(failure)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(failure[0] if failure else EXIT_DONE)


def _die_with_launcher() -> None:
    """A killed launcher must leave no rank behind."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def _forwarded_signals(pids: Sequence[int]) -> Iterator[list[int]]:
    """Pass stop signals on to the ranks, which then finish their step, save and end; collects them.

    KeyboardInterrupt at the second Ctrl-C.
    """
    forwarded: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if number in forwarded:
                raise KeyboardInterrupt
            os.write(2, CTRL_C.encode())  # print() may itself be what was interrupted
        forwarded.append(number)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    numbers = {*STOP_SIGNALS, signal.SIGINT}
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        numbers.remove(signal.SIGINT)
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield forwarded
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
