"""Two ranks for tests: a function in, its result from every rank out.

The processes live as long as the test session, since importing torch and diffusers takes longer than
any test; every call gets a process group of its own.
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

SIZE = 2
TIMEOUT_S = 120


def on_two_ranks(function: Callable[..., Any], *args: Any) -> list[Any]:
    """[function(world, *args) on rank 0, on rank 1]; `function` is a plain one of an importable module."""
    pipes = _pool()
    for pipe in pipes:
        pipe.send((function, args))
    results = []
    for rank, pipe in enumerate(pipes):
        if not pipe.poll(TIMEOUT_S):
            _pool.cache_clear()
            raise TimeoutError(f"rank {rank} did not answer {function.__name__} in {TIMEOUT_S} s")
        ok, result = pipe.recv()
        if not ok:
            _pool.cache_clear()  # the other rank may hang in a collective
            raise AssertionError(f"rank {rank} failed:\n{result}")
        results.append(result)
    return results


@functools.cache
def _pool() -> tuple[Connection, ...]:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    pipes = []
    for rank in range(SIZE):
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(rank, store.port, theirs), daemon=True)
        process.start()
        atexit.register(process.kill)
        pipes.append(ours)
    atexit.register(lambda: store)  # lives as long as the ranks
    return tuple(pipes)


def _serve(rank: int, port: int, pipe: Connection) -> None:
    import torch
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    from schemas.train_config import MeshConfig
    from trainer.parallel import Member, join

    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", port, is_master=False)
    number = 0
    while True:
        function, args = pipe.recv()
        number += 1
        member = Member(rank, rank, SIZE, PrefixStore(str(number), store))
        try:
            with join(member, MeshConfig(), deterministic=True) as world:
                answer = True, function(world, *args)
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send(answer)
