"""Remote videos: looked at, identified and downloaded, by the driver and the workers, never by a decoder.

In: a URL that `[sources]` allows. Out: its `Source`, or a local file that lives as long as it is used. Where
connections may lead is `pipeline.checked_http`'s to say; size and time are bounded here, with one deadline a
file. A file is downloaded once to be identified and once for each unit that needs it, into $TMPDIR, and
removed when it has been decoded: nothing is kept, so nothing can be stale.

A content failure is a ClipError (stage `fetch`); one that may pass is an OSError, after a few tries.
"""

from __future__ import annotations

import hashlib
import socket
import tempfile
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Literal, Self, TypeVar
from urllib.parse import urlsplit

from pipeline.checked_http import (
    CHUNK_BYTES,
    SILENCE_S,
    Answer,
    DeadlinePassed,
    failure,
    open_http,
    said,
)
from pipeline.source import Halt, Source, is_unread
from schemas.config import LimitsConfig, SourcesConfig
from schemas.errors import ClipError, MissingExtraError, RunError
from schemas.sources import url_problem
from schemas.store import is_url

PAUSES_S = (0.5, 1.0, 2.0)
"""Waits before a server that fails for now is asked again, within the time for a file."""

Mode = Literal["content", "sampled"]
Row = TypeVar("Row")
Result = TypeVar("Result")


class Local:
    """A file of this machine; a download is removed once everybody has closed it. A context manager."""

    def __init__(
        self, path: str, download: ExitStack | None = None, *, failure: ClipError | None = None
    ) -> None:
        """`failure`: why there is no file, and the row is not decoded."""
        self.path, self.failure, self._download, self._users = path, failure, download, 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def share(self) -> None:
        """One more will close it."""
        self._users += 1

    def close(self) -> None:
        self._users -= 1
        if not self._users and self._download is not None:
            self._download.close()


class Fetcher:
    """Fetches what the settings allow; may be used from several threads."""

    def __init__(self, sources: SourcesConfig, limits: LimitsConfig) -> None:
        self._sources, self._limits = sources, limits

    def digest(
        self,
        url: str,
        mode: Mode,
        *,
        known: Mapping[tuple[str, int, int], str],
        halt: Halt | None = None,
    ) -> Source:
        """The identity of a remote file, read only where size and tag are not those of a `known` one.

        `content`: sha256 of all bytes. `sampled`: the store's own tag and the size, or where it has no tag,
        all bytes. The number that takes the place of mtime_ns is made of the tag. `halt` ends it early.
        """
        return self._patiently(lambda deadline: self._digest(url, mode, known, halt, deadline))

    def _digest(
        self,
        url: str,
        mode: Mode,
        known: Mapping[tuple[str, int, int], str],
        halt: Halt | None,
        deadline: float,
    ) -> Source:
        with self._open(url, deadline) as answer:
            if answer.tag and answer.size is not None:
                digest = known.get((url, answer.size, _mark(answer.tag)))
                if digest is not None and digest.startswith(mode):
                    return Source(digest, answer.size, _mark(answer.tag))
            state, size = hashlib.sha256(), answer.size
            if size is None or _reads_all(mode, answer.tag):
                size = 0
                for chunk in answer.chunks:
                    if halt is not None:
                        halt.check()
                    state.update(chunk)
                    size += len(chunk)
            return _source(mode, state.hexdigest(), size, answer.tag)

    def local(self, path: str, *, expect: Source | None = None) -> Local:
        """A local file with the content of `path`: itself, or a download.

        RunError where a download is not what `expect` was taken of, or can no longer be had. A file that was
        not read when it was listed is none now either: its content would get the identity of a failure.
        """
        if expect is not None and is_unread(expect):
            return Local(path, failure=self._refusal(path, expect))
        if not is_url(path):
            return Local(path)
        try:
            return self._patiently(lambda deadline: self._download(path, expect, deadline))
        except ClipError as error:
            if expect is None:
                raise
            raise RunError(f"{path} could be fetched when it was listed, now not: {error}") from error

    def _refusal(self, path: str, listed: Source) -> ClipError:
        """Why a file was not read; a URL is asked once more."""
        if not is_url(path):
            found = f"{listed.size} bytes, over limits.max_bytes = {self._limits.max_bytes}"
            return ClipError("limit_bytes", found)
        try:
            with self._patiently(lambda deadline: self._download(path, None, deadline)):
                message = (
                    "could not be fetched when it was listed, and now it can; run the same command again"
                )
                return failure("fetch_failed", message)
        except ClipError as error:
            return error

    def _download(self, path: str, expect: Source | None, deadline: float) -> Local:
        with ExitStack() as stack:
            file = stack.enter_context(tempfile.NamedTemporaryFile(prefix="latentpress-fetch-"))
            with self._open(path, deadline) as answer:
                state, size = hashlib.sha256(), 0
                for chunk in answer.chunks:
                    file.write(chunk)
                    state.update(chunk)
                    size += len(chunk)
            file.flush()
            if expect is not None:
                found = _source(_mode(expect), state.hexdigest(), size, answer.tag)
                if found.digest != expect.digest:
                    raise RunError(
                        f"{path} was replaced since it was listed; run the same command again: it looks at "
                        "every file anew"
                    )
            return Local(file.name, stack.pop_all())

    def ahead(
        self, wanted: Iterable[tuple[Row, str, Source]], *, files: int
    ) -> Generator[tuple[Row, Local], None, None]:
        """(row, local file) for each (row, path, what it was listed as), in order; the caller closes them.

        Up to `files` (2 or more) rows are fetched ahead; neighbours that name one file share a download.
        """
        rows = iter(wanted)
        coming: deque[tuple[Row, tuple[str, Source], Future[Local]]] = deque()
        with ThreadPoolExecutor(files) as pool:
            try:
                while True:
                    for row, path, listed in islice(rows, files - len(coming)):
                        same = bool(coming) and coming[-1][1] == (path, listed)
                        future = coming[-1][2] if same else pool.submit(self.local, path, expect=listed)
                        coming.append((row, (path, listed), future))
                    if not coming:
                        return
                    row, _, future = coming.popleft()
                    local = future.result()
                    if coming and coming[0][2] is future:
                        local.share()
                    yield row, local
            finally:
                for future in {future for _, _, future in coming}:
                    if not future.cancel() and future.exception() is None:
                        future.result().close()

    def _patiently(self, attempt: Callable[[float], Result]) -> Result:
        """The result of `attempt`, given its deadline; tried again while the other side fails for now."""
        deadline = time.monotonic() + self._limits.clip_timeout_s
        pauses = iter(PAUSES_S)
        while True:
            try:
                return attempt(deadline)
            except DeadlinePassed as error:
                limit = self._limits.clip_timeout_s
                raise failure("timeout", f"took more than limits.clip_timeout_s = {limit} s") from error
            except (ConnectionError, TimeoutError, socket.gaierror):
                pause = next(pauses, None)
                if pause is None or time.monotonic() + pause > deadline:
                    raise
                time.sleep(pause)

    @contextmanager
    def _open(self, url: str, deadline: float) -> Iterator[Answer]:
        if (problem := url_problem(url, self._sources)) is not None:
            raise failure("fetch_refused", f"{url} {problem}")
        s3 = urlsplit(url).scheme == "s3"
        with _open_s3(url) if s3 else open_http(url, self._sources, deadline=deadline) as answer:
            if answer.size is not None:
                self._check_size(answer.size)
            yield Answer(answer.size, answer.tag, self._bounded(answer, deadline))

    def _bounded(self, answer: Answer, deadline: float) -> Iterator[bytes]:
        """The bytes of an object, within the limits on size and time."""
        total = 0
        for chunk in answer.chunks:
            total += len(chunk)
            self._check_size(total)
            if time.monotonic() > deadline:
                raise DeadlinePassed
            yield chunk
        if answer.size is not None and total != answer.size:
            raise ConnectionError(f"the connection ended after {total} of {answer.size} bytes")

    def _check_size(self, size: int) -> None:
        if size > self._limits.max_bytes:
            found = f"{size} bytes or more, over limits.max_bytes = {self._limits.max_bytes}"
            raise failure("limit_bytes", found)


@contextmanager
def _open_s3(url: str) -> Iterator[Answer]:
    """Through fsspec; where the store is and who we are, its own environment variables say."""
    try:
        import s3fs
        from botocore.exceptions import BotoCoreError
    except ImportError:
        raise MissingExtraError("s3fs", "s3") from None
    waits = {"connect_timeout": SILENCE_S, "read_timeout": SILENCE_S}
    store = s3fs.S3FileSystem(config_kwargs=waits, use_listings_cache=False)
    try:
        info = store.info(url)
        with store.open(url, "rb", block_size=8 * CHUNK_BYTES, cache_type="readahead") as file:
            chunks = iter(lambda: file.read(CHUNK_BYTES), b"")
            yield Answer(info["size"], info.get("VersionId") or info.get("ETag") or "", chunks)
    except (FileNotFoundError, PermissionError) as error:
        raise failure("fetch_failed", str(error)) from error
    except BotoCoreError as error:
        raise ConnectionError(said(str(error))) from error


def _mode(source: Source) -> Mode:
    return "content" if source.digest.startswith("content") else "sampled"


def _reads_all(mode: Mode, tag: str) -> bool:
    return mode == "content" or not tag


def _source(mode: Mode, content: str, size: int, tag: str) -> Source:
    """The Source of a remote file, of whose bytes `content` is the sha256 where they are asked for."""
    digest = content if _reads_all(mode, tag) else hashlib.sha256(f"{size} {tag}".encode()).hexdigest()
    return Source(f"{mode}:{digest}", size, _mark(tag) if tag else 0)


def _mark(tag: str) -> int:
    """63 bits of a tag."""
    return int.from_bytes(hashlib.sha256(tag.encode()).digest()[:8], "big") >> 1
