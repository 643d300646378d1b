"""Remote videos: looked at, identified and downloaded, by the driver and the workers, never by a decoder.

In: a URL that `[sources]` allows. Out: its `Source`, or a local file that lives as long as it is used. Every
connection is to an address that was looked at: one that is private, local or reserved is refused, so a name
that resolves to one, now or later, leads nowhere, and neither does a redirect. Redirects are held against
`[sources]` again, TLS is verified, proxies are not used, size and time are bounded. A file is downloaded once
to be identified and once for each unit that needs it, into $TMPDIR, and removed when it has been decoded:
nothing is kept, so nothing can be stale.

A content failure is a ClipError (stage `fetch`); one that may pass is an OSError.
"""

from __future__ import annotations

import hashlib
import http.client
import ipaddress
import socket
import ssl
import tempfile
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from typing import Literal, Self, TypeVar
from urllib.parse import urljoin, urlsplit

from pipeline.source import Source
from schemas.config import LimitsConfig, SourcesConfig
from schemas.errors import ClipError, MissingExtraError, RunError
from schemas.sources import url_problem
from schemas.store import is_url

MAX_REDIRECTS = 5
CHUNK_BYTES = 1 << 20
SILENCE_S = 30.0
"""A server that says nothing for so long has failed."""
_MOVED = {301, 302, 303, 307, 308}
_MAY_PASS = {408, 425, 429}
"""With every status from 500 on, those of requests that may be answered later."""
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")

Mode = Literal["content", "sampled"]
Row = TypeVar("Row")


@dataclass(frozen=True)
class _Answer:
    """What a store says of an object, and its bytes."""

    size: int | None
    tag: str
    """Version id, ETag or time of change; empty where it tells none."""
    chunks: Iterator[bytes]


class Local:
    """A file of this machine; a download is removed once everybody has closed it. A context manager."""

    def __init__(self, path: str, download: ExitStack | None = None) -> None:
        self.path, self._download, self._users = path, download, 1

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

    def digest(self, url: str, mode: Mode, *, known: Mapping[tuple[str, int, int], str]) -> Source:
        """The identity of a remote file, read only where size and tag are not those of a `known` one.

        `content`: sha256 of all bytes. `sampled`: the store's own tag and the size, or where it has no tag,
        all bytes. The number that takes the place of mtime_ns is made of the tag.
        """
        with self._open(url) as answer:
            if answer.tag and answer.size is not None:
                digest = known.get((url, answer.size, _mark(answer.tag)))
                if digest is not None and digest.startswith(mode):
                    return Source(digest, answer.size, _mark(answer.tag))
            state, size = hashlib.sha256(), answer.size
            if size is None or _reads_all(mode, answer.tag):
                size = 0
                for chunk in answer.chunks:
                    state.update(chunk)
                    size += len(chunk)
            return _source(mode, state.hexdigest(), size, answer.tag)

    def is_unchanged(self, url: str, source: Source) -> bool:
        """Whether a remote file still is the one that `source` was taken of; False where it is gone."""
        known = {(url, source.size, source.mtime_ns): source.digest}
        try:
            return self.digest(url, _mode(source), known=known).digest == source.digest
        except ClipError:
            return False

    def local(self, path: str, *, expect: Source | None = None) -> Local:
        """A local file with the content of `path`: itself, or a download.

        RunError where a download is not what `expect` was taken of, or can no longer be had.
        """
        if not is_url(path):
            return Local(path)
        try:
            return self._download(path, expect)
        except ClipError as error:
            if expect is None:
                raise
            raise RunError(f"{path} could be fetched when it was listed, now not: {error}") from error

    def _download(self, path: str, expect: Source | None) -> Local:
        with ExitStack() as stack:
            file = stack.enter_context(tempfile.NamedTemporaryFile(prefix="latentpress-fetch-"))
            with self._open(path) as answer:
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

    @contextmanager
    def _open(self, url: str) -> Iterator[_Answer]:
        if (problem := url_problem(url, self._sources)) is not None:
            raise _failure("fetch_refused", f"{url} {problem}")
        opened = _open_s3 if urlsplit(url).scheme == "s3" else self._open_http
        with opened(url) as answer:
            if answer.size is not None:
                self._check_size(answer.size)
            yield _Answer(answer.size, answer.tag, self._bounded(answer))

    def _bounded(self, answer: _Answer) -> Iterator[bytes]:
        """The bytes of an object, within the limits on size and time."""
        total, deadline = 0, time.monotonic() + self._limits.clip_timeout_s
        for chunk in answer.chunks:
            total += len(chunk)
            self._check_size(total)
            if time.monotonic() > deadline:
                raise self._too_slow()
            yield chunk
        if answer.size is not None and total != answer.size:
            raise ConnectionError(f"the connection ended after {total} of {answer.size} bytes")

    def _check_size(self, size: int) -> None:
        if size > self._limits.max_bytes:
            found = f"{size} bytes or more, over limits.max_bytes = {self._limits.max_bytes}"
            raise _failure("limit_bytes", found)

    def _too_slow(self) -> ClipError:
        return _failure("timeout", f"took more than limits.clip_timeout_s = {self._limits.clip_timeout_s} s")

    @contextmanager
    def _open_http(self, url: str) -> Iterator[_Answer]:
        for _ in range(MAX_REDIRECTS + 1):
            connection, stack = _Connection(url), ExitStack()
            stack.callback(connection.close)
            # Cuts a server that keeps every single wait short: headers are read by a library.
            timer = threading.Timer(self._limits.clip_timeout_s, connection.cut)
            stack.callback(timer.cancel)
            timer.start()
            try:
                parts = urlsplit(url)
                target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
                connection.request("GET", target, headers={"Accept-Encoding": "identity"})
                response = stack.enter_context(connection.getresponse())
                if response.status == http.client.OK:
                    length = response.headers.get("Content-Length")
                    tag = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
                    size = int(length) if length is not None and length.isdecimal() else None
                    yield _Answer(size, tag, _body(response, connection))
                    return
                if response.status not in _MOVED:
                    raise _status(response)
                url = urljoin(url, response.headers.get("Location", ""))
            except (http.client.HTTPException, OSError) as error:
                if connection.was_cut:
                    raise self._too_slow() from error
                if isinstance(error, ssl.SSLCertVerificationError):
                    raise _failure("fetch_refused", f"its certificate is not valid: {error}") from error
                if isinstance(error, OSError):
                    raise
                raise ConnectionError(f"{type(error).__name__}: {error}") from error
            finally:
                stack.close()
            if (problem := url_problem(url, self._sources)) is not None:
                raise _failure("fetch_refused", f"is redirected to {url}, which {problem}")
        raise _failure("fetch_failed", f"is redirected more than {MAX_REDIRECTS} times")


class _Connection(http.client.HTTPConnection):
    """A connection to a public address, over TLS for https; `cut` ends it from another thread."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self.default_port = 443 if self._tls else 80
        super().__init__(parts.hostname or "", parts.port or self.default_port, timeout=SILENCE_S)
        self.was_cut = False
        self._kept: socket.socket | None = None
        """The socket; `sock` is emptied while a response is still read from it."""

    def connect(self) -> None:
        self._kept = self.sock = _connect(self.host, self.port)
        if self._tls is not None:
            secure = self._tls.wrap_socket(
                self.sock, server_hostname=self.host, do_handshake_on_connect=False
            )
            self._kept = self.sock = secure
            secure.do_handshake()

    def cut(self) -> None:
        self.was_cut = True
        if self._kept is not None:
            with suppress(OSError):  # closed meanwhile
                self._kept.shutdown(socket.SHUT_RDWR)


def _body(response: http.client.HTTPResponse, connection: _Connection) -> Iterator[bytes]:
    while chunk := response.read1(CHUNK_BYTES):
        yield chunk
    if connection.was_cut:  # without a Content-Length this looks like the end
        raise ConnectionError("the connection was cut")


def _connect(host: str, port: int) -> socket.socket:
    """A socket to the first address of `host` that is public and answers."""
    failure: Exception = OSError(f"{host} has no address")
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        if not is_public(str(address[0])):
            failure = _failure("fetch_refused", f"{host} has the address {address[0]}, which is not public")
            continue
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(SILENCE_S)
            sock.connect(address)
        except OSError as error:
            sock.close()
            failure = error
            continue
        return sock
    raise failure


def is_public(address: str) -> bool:
    """Whether an address is one of the public internet; IPv4 ones inside IPv6 ones are looked at too."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour
        if found in _NAT64:
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return found.is_global and not found.is_multicast


@contextmanager
def _open_s3(url: str) -> Iterator[_Answer]:
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
            yield _Answer(info["size"], info.get("VersionId") or info.get("ETag") or "", chunks)
    except (FileNotFoundError, PermissionError) as error:
        raise _failure("fetch_failed", str(error)) from error
    except BotoCoreError as error:
        raise ConnectionError(str(error)) from error


def _status(response: http.client.HTTPResponse) -> Exception:
    said = f"the server answers {response.status} {response.reason}"
    if response.status >= 500 or response.status in _MAY_PASS:
        return ConnectionError(said)
    return _failure("fetch_failed", said)


def _failure(reason: str, message: str) -> ClipError:
    return ClipError(reason, message, stage="fetch")


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
