"""Ranks for tests: a function in, its result from every rank out.

The processes live as long as the test session, and are forked from one that has imported torch and diffusers,
since that takes longer than any test. Every call gets a process group of its own, of as many as it asks for.
"""

from __future__ import annotations

import atexit
import itertools
import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from schemas.train_config import MeshConfig

TIMEOUT_S = 120

_ranks: list[tuple[BaseProcess, Connection]] = []
_stores: list[Any] = []
_calls = itertools.count()


def on_two_ranks(function: Callable[..., Any], *args: Any) -> list[Any]:
    """[function(world, *args) on rank 0, on rank 1]; `function` is a plain one of an importable module."""
    return on_ranks(2, function, *args)


def on_ranks(
    size: int, function: Callable[..., Any], *args: Any, mesh: MeshConfig | None = None
) -> list[Any]:
    """What `function(world, *args)` gives on each of `size` ranks under `mesh`."""
    if not _stores:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        _stores.append(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
    while len(_ranks) < size:
        _ranks.append(_start(len(_ranks), _stores[0].port))
    call = str(next(_calls))
    for _, pipe in _ranks[:size]:
        pipe.send((call, size, mesh or MeshConfig(), function, args))
    results = []
    for rank, (_, pipe) in enumerate(_ranks[:size]):
        if not pipe.poll(TIMEOUT_S):
            _stop()
            raise TimeoutError(f"rank {rank} did not answer {function.__name__} in {TIMEOUT_S} s")
        try:
            ok, result = pipe.recv()
        except EOFError:
            ok, result = False, "it died; its last words are above"
        if not ok:
            _stop()  # others may hang in a collective
            raise AssertionError(f"rank {rank} failed:\n{result}")
        results.append(result)
    return results


def forget_meshes() -> None:
    """What DTensor remembers of operations has the process groups of meshes in it, also of ended ones."""
    from torch.distributed.tensor import debug

    debug._clear_sharding_prop_cache()


def _start(rank: int, port: int) -> tuple[BaseProcess, Connection]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.trainer.stock", "trainer.sharding"])
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(rank, port, theirs), daemon=True)
    process.start()
    return process, ours


@atexit.register
def _stop() -> None:
    for process, _ in _ranks:
        process.kill()
    _ranks.clear()


def _serve(rank: int, port: int, pipe: Connection) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # there are as many CPUs as ranks, and not as many GPUs
    import torch
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    from trainer.parallel import Member, join

    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", port, is_master=False)
    while True:
        call, size, mesh, function, args = pipe.recv()
        member = Member(rank, rank, size, PrefixStore(call, store))
        forget_meshes()
        try:
            with join(member, mesh, deterministic=True) as world:
                answer = True, function(world, *args)
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send(answer)
