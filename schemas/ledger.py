"""What has been seen of a manifest, on disk: a table in a temporary file that nobody has to clean up.

In: rows, file sizes, digests, findings, one at a time. Out: what was there before. The trade-off: a few
microseconds an entry, for memory that does not grow with a million of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Literal, NamedTuple, Self

from schemas.errors import RunError

_CACHE_KIB = 4096
_TABLES = """
CREATE TABLE asked (key BLOB PRIMARY KEY, number INTEGER) WITHOUT ROWID;
CREATE TABLE stored (key BLOB PRIMARY KEY, number INTEGER) WITHOUT ROWID;
CREATE TABLE windows (key BLOB PRIMARY KEY, number INTEGER) WITHOUT ROWID;
CREATE TABLE files (path BLOB PRIMARY KEY, first BLOB) WITHOUT ROWID;
CREATE TABLE sizes (size INTEGER PRIMARY KEY, unread BLOB);
CREATE TABLE contents (digest TEXT PRIMARY KEY, path BLOB) WITHOUT ROWID;
CREATE TABLE findings (kind TEXT, number INTEGER, rest TEXT);
"""


class Finding(NamedTuple):
    """One sentence about one row."""

    number: int
    source: str | None
    reason: str
    message: str


class Ledger:
    """A context manager, for one thread; RunError where the temporary folder cannot hold it."""

    def __init__(self) -> None:
        # The empty name is a private file in $TMPDIR that goes with the connection, also when killed.
        self._db = sqlite3.connect("", isolation_level=None)
        for setting in (f"cache_size = -{_CACHE_KIB}", "journal_mode = OFF", "synchronous = OFF"):
            self._db.execute(f"PRAGMA {setting}")
        self._db.executescript(_TABLES)
        self._db.execute("BEGIN")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._db.close()
        if isinstance(error, sqlite3.OperationalError):
            raise RunError(
                f"the index of rows in the temporary folder failed: {error}; name a folder with more space "
                "in TMPDIR (a million rows take 60 to 300 MB)"
            ) from error

    def first_row(
        self, table: Literal["asked", "stored", "windows"], key: Sequence[object], number: int
    ) -> int | None:
        """The row that brought `key` to `table` before; None for the first, which is noted as `number`."""
        digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
        if self._db.execute(f"INSERT OR IGNORE INTO {table} VALUES (?, ?)", (digest, number)).rowcount:
            return None
        found: tuple[int] = self._db.execute(
            f"SELECT number FROM {table} WHERE key = ?", (digest,)
        ).fetchone()
        return found[0]

    def add_file(self, path: str) -> bool:
        """Whether `path` is new here."""
        row = (os.fsencode(path),)
        return bool(self._db.execute("INSERT OR IGNORE INTO files VALUES (?, NULL)", row).rowcount)

    def to_compare(self, path: str, size: int) -> list[str]:
        """Files whose content must be read now that a new file has this size: none for the first of it."""
        if self._db.execute("INSERT OR IGNORE INTO sizes VALUES (?, ?)", (size, os.fsencode(path))).rowcount:
            return []
        (unread,) = self._db.execute("SELECT unread FROM sizes WHERE size = ?", (size,)).fetchone()
        self._db.execute("UPDATE sizes SET unread = NULL WHERE size = ?", (size,))
        return [path] if unread is None else [os.fsdecode(unread), path]

    def note_content(self, path: str, digest: str) -> None:
        """The first file noted with a digest stands for the others."""
        here = os.fsencode(path)
        if not self._db.execute("INSERT OR IGNORE INTO contents VALUES (?, ?)", (digest, here)).rowcount:
            (first,) = self._db.execute("SELECT path FROM contents WHERE digest = ?", (digest,)).fetchone()
            self._db.execute("UPDATE files SET first = ? WHERE path = ?", (first, here))

    def first_copy(self, path: str) -> str:
        """The file that stands for the content of `path`: itself, or one noted before with the same."""
        row = (os.fsencode(path),)
        (first,) = self._db.execute("SELECT first FROM files WHERE path = ?", row).fetchone()
        return path if first is None else os.fsdecode(first)

    def add_finding(self, kind: str, finding: Finding) -> None:
        # JSON: paths may hold bytes that are no text, which a TEXT column refuses.
        number, *rest = finding
        self._db.execute("INSERT INTO findings VALUES (?, ?, ?)", (kind, number, json.dumps(rest)))

    def findings(self, kind: str) -> Iterator[Finding]:
        """Every finding of a kind, by row number."""
        query = "SELECT number, rest FROM findings WHERE kind = ? ORDER BY number, rowid"
        for number, rest in self._db.execute(query, (kind,)):
            yield Finding(number, *json.loads(rest))
