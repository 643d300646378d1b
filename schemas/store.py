"""Where a dataset lies: a folder, or a prefix of an object store, seen through one path type.

In: a folder or a URL such as `s3://bucket/prefix`. Out: a `Path`, or a `UPath` (universal_pathlib, over
fsspec), which has the same methods. So readers use the methods of `Path` only (`read_bytes`, `open`,
`exists`, `iterdir`, `stat().st_size`, `/`), never `os` functions or file descriptors, on anything below
a dataset's root. Endpoints and credentials come from the store's own environment variables
(`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID` ...), never from the URL. Listings are not cached: another
process may have written since, at the price of one request a look.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import cast

from schemas.errors import ConfigError, MissingExtraError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_S3 = re.compile(r"s3://[^/@:?#]+(/.*)?")


def is_url(root: str | Path) -> bool:
    """Whether `root` names a place in an object store."""
    return _URL.match(str(root)) is not None


def location(root: str | Path) -> Path:
    """The root of a dataset; a `UPath` typed as the `Path` it behaves like where `root` is a URL."""
    if not isinstance(root, str | Path):
        return root  # a UPath already
    if not is_url(root):
        return Path(root)
    if not _S3.fullmatch(str(root)):
        # What is wrong with it may be a password in it, so it is not repeated.
        raise ConfigError(
            "a dataset lies in a folder or at s3://BUCKET/PREFIX, found another "
            f"{str(root).partition(':')[0]}:// URL; endpoint and credentials are set by AWS_ENDPOINT_URL, "
            "AWS_ACCESS_KEY_ID and so on"
        )
    try:
        import s3fs  # noqa: F401  (UPath would ask for it later, and say less)
        from upath import UPath
    except ImportError as error:
        raise MissingExtraError(error.name or "s3fs", "s3") from None
    return cast(Path, UPath(str(root).rstrip("/"), use_listings_cache=False))


def is_remote(path: Path) -> bool:
    """Whether a path from `location` lies in an object store."""
    return not isinstance(path, Path)


def absolute(root: str | Path) -> str:
    """`root` as every process and node understands it."""
    return str(root) if is_url(root) else str(Path(root).absolute())
