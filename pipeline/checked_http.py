"""HTTP to the public internet only: one object, through redirects that are allowed, until a deadline.

In: a URL that `[sources]` allows. Out: what the server says of it, and its bytes. Every connection is to an
address that was looked at: a name that resolves to a private, local or reserved one, now or later, leads
nowhere. TLS is verified, proxies are not used. What a server says is shown without control characters, and
shortened.

Trade-off: one deadline ends everything but the look-up of a name, which the system's resolver bounds itself.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

from schemas.config import SourcesConfig
from schemas.errors import ClipError
from schemas.sources import url_problem

MAX_REDIRECTS = 5
CHUNK_BYTES = 1 << 20
SILENCE_S = 30.0
"""A server that says nothing for so long has failed."""
_SAID_CHARS = 300
_SIZE_DIGITS = 18
_MOVED = {301, 302, 303, 307, 308}
_MAY_PASS = {408, 425, 429}
"""With every status from 500 on, those of requests that may be answered later."""
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_IPV6_IN_USE = ipaddress.IPv6Network("2000::/3")
"""All that is given out; what lies outside is reserved, or local in a way of its own."""
_IPV6_SPECIAL = tuple(map(ipaddress.IPv6Network, ("2001::/23", "2001:db8::/32", "3fff::/20")))
"""Within it: of protocols (Teredo's tunnels among them), and of documentation. RFC 6890, RFC 9637."""
_CLOUD_HOST = ipaddress.IPv4Address("168.63.129.16")
"""The machine below an Azure machine: a public number that leads inwards, to its agent and metadata."""


@dataclass(frozen=True)
class Answer:
    """What a store says of an object, and its bytes."""

    size: int | None
    tag: str
    """Version id, ETag or time of change; empty where it tells none."""
    chunks: Iterator[bytes]


def failure(reason: str, message: str) -> ClipError:
    """A content failure of fetching."""
    return ClipError(reason, said(message), stage="fetch")


def said(text: str) -> str:
    """Text of a stranger, fit for a terminal and a table."""
    shown = "".join(
        character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text
    )
    return shown if len(shown) <= _SAID_CHARS else f"{shown[:_SAID_CHARS]}..."


class DeadlinePassed(Exception):
    """The time for a file is over."""


@contextmanager
def open_http(url: str, sources: SourcesConfig, *, deadline: float) -> Iterator[Answer]:
    """The object at `url`; `deadline` is a time of `time.monotonic()`, which its chunks are held to as well.

    ClipError where it cannot be had, OSError where it may be had later, DeadlinePassed.
    """
    for _ in range(MAX_REDIRECTS + 1):
        connection, stack = _Connection(url, deadline), ExitStack()
        stack.callback(connection.close)
        # Cuts a server that keeps every single wait short: headers are read by a library.
        timer = threading.Timer(max(0.0, deadline - time.monotonic()), connection.cut)
        stack.callback(timer.cancel)
        timer.start()
        try:
            parts = urlsplit(url)
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", target, headers={"Accept-Encoding": "identity"})
            response = stack.enter_context(connection.getresponse())
            if response.status == http.client.OK:
                tag = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
                yield Answer(_size(response), tag, _body(response, connection))
                return
            if response.status not in _MOVED:
                raise _status(response)
            url = redirected(url, response.headers.get("Location", ""), sources)
        except (http.client.HTTPException, OSError) as error:
            if connection.was_cut:
                raise DeadlinePassed from error
            if isinstance(error, ssl.SSLCertVerificationError):
                raise failure("fetch_refused", f"its certificate is not valid: {error}") from error
            if isinstance(error, OSError):
                raise
            raise ConnectionError(said(f"{type(error).__name__}: {error}")) from error
        finally:
            stack.close()
    raise failure("fetch_failed", f"is redirected more than {MAX_REDIRECTS} times")


def redirected(url: str, location: str, sources: SourcesConfig) -> str:
    """Where a redirect leads; ClipError where it may not be followed."""
    try:
        to = urljoin(url, location)
        was, scheme = urlsplit(url).scheme, urlsplit(to).scheme
    except ValueError as error:
        raise failure("fetch_failed", f"is redirected to {location!r}, which is not a URL: {error}") from None
    problem = url_problem(to, sources)
    if scheme not in ("http", "https"):
        problem = "is not a web address"
    elif (was, scheme) == ("https", "http"):
        problem = "gives up the encryption it was asked with"
    if problem is not None:
        raise failure("fetch_refused", f"is redirected to {to}, which {problem}")
    return to


def _size(response: http.client.HTTPResponse) -> int | None:
    length = response.headers.get("Content-Length")
    if length is None or not (length.isascii() and length.isdecimal()):
        return None
    if len(length) > _SIZE_DIGITS:
        raise failure("fetch_failed", f"the server gives a size of {len(length)} digits")
    return int(length)


def _status(response: http.client.HTTPResponse) -> Exception:
    answer = said(f"the server answers {response.status} {response.reason}")
    if response.status >= 500 or response.status in _MAY_PASS:
        return ConnectionError(answer)
    return failure("fetch_failed", answer)


class _Connection(http.client.HTTPConnection):
    """A connection to a public address, over TLS for https; `cut` ends it from another thread."""

    def __init__(self, url: str, deadline: float) -> None:
        parts = urlsplit(url)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self.default_port = 443 if self._tls else 80
        super().__init__(parts.hostname or "", parts.port or self.default_port, timeout=SILENCE_S)
        self.was_cut = False
        self._deadline = deadline
        self._kept: socket.socket | None = None
        """The socket; `sock` is emptied while a response is still read from it."""

    def connect(self) -> None:
        self._keep(_connect(self.host, self.port, deadline=self._deadline))
        if self._tls is not None:
            secure = self._tls.wrap_socket(
                self.sock, server_hostname=self.host, do_handshake_on_connect=False
            )
            self._keep(secure)
            secure.do_handshake()

    def _keep(self, sock: socket.socket) -> None:
        """Ours from now on; where the cut came before there was anything to cut, it is made up for."""
        self._kept = self.sock = sock
        if self.was_cut or time.monotonic() > self._deadline:
            self.was_cut = True
            self.close()
            raise TimeoutError("the connection was cut")

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


def _connect(host: str, port: int, *, deadline: float) -> socket.socket:
    """A socket to the first address of `host` that is public and answers."""
    problem: Exception = OSError(f"{host} has no address")
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        if not is_public(str(address[0])):
            problem = failure("fetch_refused", f"{host} has the address {address[0]}, which is not public")
            continue
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(max(0.001, min(SILENCE_S, deadline - time.monotonic())))
            sock.connect(address)
            sock.settimeout(SILENCE_S)
        except OSError as error:
            sock.close()
            problem = error
            continue
        return sock
    raise problem


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
        if found not in _IPV6_IN_USE or any(found in network for network in _IPV6_SPECIAL):
            return False
    return found.is_global and not (found.is_multicast or found.is_reserved or found == _CLOUD_HOST)
