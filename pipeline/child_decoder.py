"""One decoder: rows of the manifest in, their clips out, in the order asked.

Here it is a sandboxed child of this process; `pipeline.remote_decoders` has the one on another node. A row's
file must be the one that was listed, before and after it was decoded.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol

from pipeline.fetch import Local
from pipeline.sandbox import Clip, DecodeRequest, DecoderProcess
from pipeline.source import Source, same_content
from schemas.errors import RunError
from schemas.store import is_url

DECODE_AHEAD = 2
"""Clips of a decoder: one waiting for its turn, one being decoded; more where batches are larger."""
SLOTS = 8
"""For clips of a decoder that wait or are being decoded; one that is not used takes no memory."""
Row = dict[str, Any]


class Decoder(Protocol):
    """Clips of the rows submitted, in order."""

    @property
    def protections(self) -> dict[str, str]: ...

    @property
    def held(self) -> int:
        """Clips asked for and not released."""

    def submit(self, row: Row, local: Local) -> None:
        """Ask for a row's clip; `local` is closed once it is there. Does not block."""

    def result(self) -> Clip:
        """The clip submitted longest ago; ClipError if it cannot become a sample."""

    def close(self) -> None: ...


class ChildDecoder:
    """A child of this process."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._process = DecoderProcess(**settings, slots=SLOTS)
        self._coming: deque[tuple[Row, Local]] = deque()

    @property
    def protections(self) -> dict[str, str]:
        return self._process.protections

    @property
    def held(self) -> int:
        return len(self._coming)

    def submit(self, row: Row, local: Local) -> None:
        self._coming.append((row, local))  # to be closed, whatever comes
        if local.failure is None:
            _require_unchanged(row)
            window = {name: row[name] for name in ("start_s", "end_s", "clip")}
            self._process.submit(DecodeRequest(local.path, **window))

    def result(self) -> Clip:
        row, local = self._coming.popleft()
        with local:
            if local.failure is not None:
                raise local.failure
            try:
                return self._process.result()
            finally:
                _require_unchanged(row)

    def close(self) -> None:
        self._process.close()
        while self._coming:
            self._coming.pop()[1].close()


def listed(row: Row) -> Source:
    """What a row's file was when it was listed."""
    return Source(row["source_digest"], row["size"], row["mtime_ns"])


def _require_unchanged(row: Row) -> None:
    """RunError where a row's file is not the one that was hashed: its frames would get a wrong identity.
    A download was held against its digest when it came."""
    if not is_url(row["path"]) and not same_content(row["path"], listed(row)):
        raise RunError(
            f"{row['path']} is gone or was replaced since it was listed; "
            "run the same command again: it looks at every file anew"
        )
