"""Which videos a manifest may name: the rules of `[sources]`, without opening anything.

In: a URL or a path, and the settings. Out: None, or why it is refused and which setting would allow it.
Addresses are looked at where they are connected to (`pipeline.fetch`): a name says nothing about them.
"""

from __future__ import annotations

import os
from urllib.parse import SplitResult, urlsplit

from schemas.config import SourcesConfig

_PORTS = {"http": 80, "https": 443}
_LABEL_CHARS = 63
"""Of a part of a host name, RFC 1035."""


def url_problem(url: str, sources: SourcesConfig) -> str | None:
    """Why `url` may not be fetched, in a sentence; None where it may."""
    try:
        parts = urlsplit(url)
        host = _host(parts)
    except ValueError as error:
        return f"is not a URL: {error}"
    if not sources.schemes:
        return (
            f"is remote, and nothing is fetched unless sources.schemes and sources.hosts allow it; allow "
            f"{parts.scheme}://{host}, or copy the file and give its path"
        )
    if parts.scheme not in sources.schemes:
        return f"its scheme {parts.scheme!r} is not in sources.schemes = {list(sources.schemes)}"
    if parts.username is not None or parts.password is not None:
        return "holds a user name or password; they would be stored with the dataset"
    if not all("!" <= character <= "~" for character in url):
        return "holds a character that no URL has; write it as %20 and so on"
    if any(
        not 0 < len(label) <= _LABEL_CHARS for label in (parts.hostname or "").removesuffix(".").split(".")
    ):
        return f"its host {host!r} is no name: expected parts of 1 to {_LABEL_CHARS} characters between dots"
    if not any(_matches(host, pattern.lower()) for pattern in sources.hosts):
        return f"its host {host!r} is not in sources.hosts = {list(sources.hosts)}"
    return None


def path_problem(path: str, sources: SourcesConfig) -> str | None:
    """Why the file at `path` may not be read, in a sentence; None where it may. Links are followed."""
    if not sources.root:
        return None
    root, real = os.path.realpath(sources.root), os.path.realpath(path)
    if os.path.commonpath([root, real]) == root:
        return None
    return f"lies outside of sources.root = {sources.root!r}: {real}"


def _host(parts: SplitResult) -> str:
    """Name of the host, with its port where that is not the scheme's own."""
    host, port = (parts.hostname or "").rstrip("."), parts.port
    return host if port is None or port == _PORTS.get(parts.scheme) else f"{host}:{port}"


def _matches(host: str, pattern: str) -> bool:
    return host.endswith(pattern[1:]) and host != pattern[1:] if pattern.startswith("*.") else host == pattern
