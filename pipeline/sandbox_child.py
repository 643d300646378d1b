"""The decoder's own process: `python -m pipeline.sandbox_child` reads requests, decodes, answers.

In: one JSON object a line on stdin. Out: one JSON object a line on what was stdout; frames go into shared
memory that the parent made. The process gives up what it does not need before it touches a file
(`pipeline.confine`), and says what holds it. It keeps the file it opened last, for the next row of it. It
imports PyAV and numpy, never torch, so that a new one starts in a moment.
"""

from __future__ import annotations

import errno
import gc
import json
import mmap
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, TextIO

import av
import numpy as np

from pipeline.confine import confine
from pipeline.decode import decode_clip
from pipeline.media import LastMedia
from pipeline.placement import place_clip
from schemas.config import BucketConfig, DecodeConfig, FramesConfig, LimitsConfig, PictureConfig, ResizeConfig
from schemas.errors import ClipError, ConfigError, RunError


def serve(decode: Callable[..., Any] = decode_clip) -> None:
    """Answer requests until stdin ends."""
    setup = json.loads(sys.stdin.readline())
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else prints must not end up between the answers
    settings: dict[str, Any] = {
        "frames": FramesConfig.model_validate_json(setup["frames"]),
        "buckets": [BucketConfig.model_validate_json(bucket) for bucket in setup["buckets"]],
        "lengths": setup["lengths"],
        "resize": ResizeConfig.model_validate_json(setup["resize"]),
        "picture": PictureConfig.model_validate_json(setup["picture"]),
        "decode": DecodeConfig.model_validate_json(setup["decode"]),
        "limits": LimitsConfig.model_validate_json(setup["limits"]),
        "last": LastMedia(),
    }
    broken = _load_backend(settings["decode"])
    slots = [np.frombuffer(mmap.mmap(fd, setup["slot_bytes"]), np.uint8) for fd in setup["slots"]]
    protections = confine(
        parent=setup["parent"],
        limits=settings["limits"],
        decode=settings["decode"],
        keep_root=setup["keep_root"],
        shared_bytes=sum(slot.nbytes for slot in slots),
    )
    # PyAV's log handler takes Python's lock. A decoder thread would wait for it while the thread that holds
    # it waits for the decoder to end, so with several there is no handler, and messages are shorter.
    av.logging.set_level(av.logging.PANIC if settings["decode"].threads == 1 else None)
    gc.collect()
    gc.freeze()  # so that the collections below have next to nothing to look at
    ready = {"protections": protections, "fatal": broken, "denied": _is_denied(setup["ask"])}
    _send(answers, {"at": time.monotonic(), **ready})
    for line in sys.stdin:
        request = json.loads(line)
        _send(answers, {"at": time.monotonic()})
        _send(answers, {"id": request["id"], **_answer(request, settings, slots, decode)})
        gc.collect()  # pictures whose side data was looked at are in reference cycles


def _load_backend(decode: DecodeConfig) -> str | None:
    """Import the library that decodes, while files can still be written; why, where it does not load."""
    if decode.backend == "pyav":
        return None
    from pipeline.backends import load_library

    try:
        load_library(decode.backend, device=decode.device)
    except (RunError, ConfigError) as error:
        return str(error)
    return None


def _answer(
    request: dict[str, Any], settings: dict[str, Any], slots: list[np.ndarray], decode: Callable[..., Any]
) -> dict[str, Any]:
    started = time.perf_counter()
    try:
        window = {"start_s": request["start_s"], "end_s": request["end_s"]}
        if request["slot"] is None:
            known = {name: value for name, value in settings.items() if name not in ("resize", "decode")}
            placed = place_clip(request["path"], full=request["full"], **window, **known)
            return {"placed": asdict(placed)}
        frames, bucket, record = decode(
            request["path"],
            clip=request["clip"],
            buffer=slots[request["slot"]],
            **window,
            **settings,
        )
    except (RunError, ConfigError) as error:
        return {"fatal": str(error)}
    except Exception as error:
        return _failure(error, request["path"])
    return {
        "shape": frames.shape,
        "bucket": bucket,
        "record": asdict(record),
        "decode_s": time.perf_counter() - started,
    }


def _failure(error: Exception, path: str) -> dict[str, Any]:
    """The answer to a clip that failed."""
    causes = list(_causes(error))
    if any(isinstance(cause, MemoryError) or _errno(cause) == errno.ENOMEM for cause in causes):
        return {"error": "limit_memory", "message": f"no memory within limits.memory_bytes: {error}"}
    if isinstance(error, ClipError):
        denied = any(isinstance(cause, PermissionError) for cause in causes) and _is_denied(path)
        return {"error": error.reason, "message": error.message, "denied": denied}
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{os.path.basename(last.filename)}:{last.lineno} in {last.name}"
    message = f"an error of ours, please report it: {type(error).__name__}: {error} ({where})"
    return {"error": "internal", "message": message}


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__


def _errno(error: BaseException) -> int | None:
    return error.errno if isinstance(error, OSError) else None


def _is_denied(path: str | None) -> bool:
    """Whether this process may not open the file."""
    if path is None:
        return False
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as error:
        return isinstance(error, PermissionError)
    return False


def _send(answers: TextIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    serve()
