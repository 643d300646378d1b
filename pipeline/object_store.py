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
from pathlib import Path
from typing import Any, cast

from schemas.patience import fails_for_now, http_status, patiently

PART_BYTES = 64 * 2**20
"""Files of at least twice this size go up in parts of it; the store's checksum depends on it."""


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
            if (
                not isinstance(error, FileExistsError)
                and http_status(error) != 412
                and not fails_for_now(error)
            ):
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
