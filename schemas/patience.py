"""Requests to an object store, made again while it fails for now: throttled, failing, unreachable, torn.

In: the path that is asked for and what asks. Out: the answer, or an OSError that says what the store said. A
file on a disk is asked once. Trade-off: a store that is gone is found out after `sum(BACKOFF_S)` seconds.
"""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from schemas.errors import RunError
from schemas.store import is_remote

BACKOFF_S = (0.5, 1.0, 2.0, 4.0)
"""Waits between tries of a request that failed for now."""
_FOR_NOW = frozenset({408, 409, 429})
"""Beside 5xx. 409 is two conditional puts at once: one of them is to try again."""
_FOR_NOW_CODES = frozenset({"BadDigest", "IncompleteBody", "RequestTimeout", "XAmzContentChecksumMismatch"})
"""Of status 400 all the same: bytes that were lost or changed on their way."""
_NOT_IMPLEMENTED = 501
_ERRNO: dict[type[BaseException], int] = {
    FileExistsError: errno.EEXIST,
    FileNotFoundError: errno.ENOENT,
    PermissionError: errno.EACCES,
}
_CREDENTIALS = re.compile(r"//[^/@\s]+@")

Result = TypeVar("Result")


def read_bytes(path: Path) -> bytes:
    """The content of a file or an object; errors as of `patiently`."""
    return patiently(path, path.read_bytes)


def patiently(path: Path, attempt: Callable[[], Result]) -> Result:
    """The result of `attempt`, tried again while the store of `path` fails for now; once for a folder.

    Raises OSError (EIO where the store or the way to it failed), RunError where it cannot be asked at all.
    """
    if not is_remote(path):
        return attempt()
    waits = iter(BACKOFF_S)
    while True:
        try:
            return attempt()
        except Exception as error:
            for_now = fails_for_now(error)
            if for_now and (wait := next(waits, None)) is not None:
                time.sleep(wait)
                continue
            said = _CREDENTIALS.sub("//", getattr(error, "strerror", None) or str(error))
            if not for_now and not isinstance(error, OSError):
                raise RunError(f"{path}: the object store cannot be used: {said}") from error
            number = errno.EIO if for_now else _ERRNO.get(type(error)) or cast(OSError, error).errno
            raise OSError(number or errno.EIO, said, str(path)) from error


def http_status(error: BaseException) -> int | None:
    """The HTTP status behind an error of s3fs; None where there was no reply."""
    return _reply(error).get("ResponseMetadata", {}).get("HTTPStatusCode")


def _reply(error: BaseException) -> dict[str, Any]:
    for each in (error, error.__cause__):
        response = getattr(each, "response", None)
        if isinstance(response, dict):
            return response
    return {}


def fails_for_now(error: BaseException) -> bool:
    """Whether the same request may succeed later: throttled, failing, unreachable, torn."""
    status = http_status(error)
    if status is not None:
        code = _reply(error).get("Error", {}).get("Code")
        return status in _FOR_NOW or code in _FOR_NOW_CODES or (status >= 500 and status != _NOT_IMPLEMENTED)
    if isinstance(error, OSError):
        return isinstance(error, TimeoutError | ConnectionError) or error.errno == errno.EIO
    from aiohttp import ClientError
    from botocore.exceptions import ConnectionError as Unreachable
    from botocore.exceptions import HTTPClientError

    return isinstance(error, ClientError | Unreachable | HTTPClientError)
