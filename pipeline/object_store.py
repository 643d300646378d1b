"""Whole files in an S3-compatible store: put once, put again, deleted; every reply is doubted.

In: a path below a remote dataset root and its bytes. Out: the object, whole, or an OSError that says
what the store said. Hidden retries below (botocore, s3fs) may repeat a request whose reply was lost, so
a refused put is decided by what is stored, not by the reply. Trade-off: one read more after a doubt.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from schemas.errors import LatentpressError, RunError
from schemas.store import is_remote

PART_BYTES = 64 * 2**20
"""Files of at least twice this size go up in parts of it; the store's checksum depends on it."""
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


def handle(path: Path) -> tuple[Any, str]:
    """The fsspec file system of a remote path, and the path in its words (`bucket/key`)."""
    remote = cast(Any, path)
    return remote.fs, remote.path


def put_once(path: Path, data: bytes) -> bool:
    """Create the object where there is none (`If-None-Match: *`); whether what is stored is `data`.

    True also where another writer stored the very same bytes, which is then as good as ours.
    """
    fs, key = handle(path)

    def attempt() -> bool:
        try:
            fs.pipe_file(key, data, mode="create")
        except Exception as error:
            # Refused, or no reply that can be trusted: the first try of this put may have succeeded.
            if not isinstance(error, FileExistsError) and _status(error) != 412 and not _is_for_now(error):
                raise
            with contextlib.suppress(FileNotFoundError):
                return bool(fs.cat_file(key) == data)
            raise
        return True

    return patiently(path, attempt)


def put(path: Path, data: bytes) -> None:
    """Store `data` whole, over whatever is there: readers see the old object or the new one."""
    fs, key = handle(path)
    patiently(path, lambda: fs.pipe_file(key, data))


def upload(temp: Path, path: Path) -> None:
    """Store a local file; returns once the store holds its size and its content."""
    fs, key = handle(path)
    nbytes, expected = temp.stat().st_size, _etag(temp)

    def attempt() -> None:
        fs.put_file(str(temp), key, chunksize=PART_BYTES)
        stored = fs.info(key)
        if stored["size"] != nbytes:
            raise OSError(errno.EIO, f"the store holds {stored['size']} bytes of it, {nbytes} were sent")
        # Encrypted objects, and some stores, have other ETags: then the bytes themselves are compared.
        if stored.get("ETag", "").strip('"') != expected and _sha256(fs, key) != _local_sha256(temp):
            raise OSError(errno.EIO, "the store holds other bytes than were sent")

    patiently(path, attempt)


def delete(path: Path) -> None:
    """Delete one object."""
    fs, key = handle(path)
    patiently(path, lambda: fs.rm_file(key))


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
        except LatentpressError:
            raise
        except Exception as error:
            for_now = _is_for_now(error)
            if for_now and (wait := next(waits, None)) is not None:
                time.sleep(wait)
                continue
            said = _CREDENTIALS.sub("//", getattr(error, "strerror", None) or str(error))
            if not for_now and not isinstance(error, OSError):
                raise RunError(f"{path}: the object store cannot be used: {said}") from error
            number = errno.EIO if for_now else _ERRNO.get(type(error)) or cast(OSError, error).errno
            raise OSError(number or errno.EIO, said, str(path)) from error


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error of s3fs; None where there was no reply."""
    return _reply(error).get("ResponseMetadata", {}).get("HTTPStatusCode")


def _reply(error: BaseException) -> dict[str, Any]:
    for each in (error, error.__cause__):
        response = getattr(each, "response", None)
        if isinstance(response, dict):
            return response
    return {}


def _is_for_now(error: BaseException) -> bool:
    """Whether the same request may succeed later: throttled, failing, unreachable, torn."""
    status = _status(error)
    if status is not None:
        code = _reply(error).get("Error", {}).get("Code")
        return status in _FOR_NOW or code in _FOR_NOW_CODES or (status >= 500 and status != _NOT_IMPLEMENTED)
    if isinstance(error, OSError):
        return isinstance(error, TimeoutError | ConnectionError) or error.errno == errno.EIO
    from aiohttp import ClientError
    from botocore.exceptions import ConnectionError as Unreachable
    from botocore.exceptions import HTTPClientError

    return isinstance(error, ClientError | Unreachable | HTTPClientError)


def _etag(file: Path) -> str:
    """What S3 says of unencrypted bytes: their MD5, or that of the parts' MD5s and how many there are."""
    with file.open("rb") as data:
        if os.fstat(data.fileno()).st_size < 2 * PART_BYTES:
            return hashlib.file_digest(data, _md5).hexdigest()
        parts = [_md5(part).digest() for part in iter(lambda: data.read(PART_BYTES), b"")]
    return f"{_md5(b''.join(parts)).hexdigest()}-{len(parts)}"


def _md5(data: bytes = b"") -> Any:
    return hashlib.md5(data, usedforsecurity=False)


def _local_sha256(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def _sha256(fs: Any, key: str) -> str:
    with fs.open(key, "rb") as data:
        state = hashlib.sha256()
        while block := data.read(PART_BYTES):
            state.update(block)
    return state.hexdigest()
