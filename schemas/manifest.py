"""Manifest files -> rows, streamed; a bad row is reported, never skipped in silence.

A manifest may be hostile: memory is bounded whatever it holds (`schemas.manifest_cells`). Relative paths
resolve against its folder. A clip may have a list of captions, and is a row with each of them. Columns that
are not ours are carried through. Whether a video can be read is not asked here: only that the row is
well-formed, and that its file exists and may be read.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from schemas.config import SourcesConfig
from schemas.errors import ManifestError
from schemas.ledger import Ledger
from schemas.manifest_cells import CAPTION_KEYS, MAX_CAPTIONS, read_cells
from schemas.sources import path_problem, url_problem
from schemas.store import is_url

VIDEO_KEYS = ("video", "video_path", "path", "media_path", "file_name")
MAX_CAPTION_CHARS = 65_536
_SHOWN_CHARS = 80
_TURNING = re.compile("[\u202a-\u202e\u2066-\u2069]")
_LIST_AS_TEXT = re.compile(r"""\s*\[\s*(["']).*["']\s*\]\s*""", re.DOTALL)
_ANYWHERE = SourcesConfig()


@dataclass(frozen=True)
class ManifestRow:
    """One clip asked for, with one caption."""

    number: int
    """Line of the file (JSONL, CSV) or row from 1 (Parquet, folder); the rows of a list of captions share
    it."""
    source: str
    """The video as the manifest gave it."""
    path: str
    """Where that is, absolute; of a URL, the URL."""
    caption: str
    start_s: float | None = None
    end_s: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    """Columns carried through."""
    clip: int = 0
    """Which of the clips that `frames.clips` makes of the row, from 0; a manifest does not say."""
    clips: int = 1
    """How many it makes; 0 where the file could not be looked at."""

    @property
    def key(self) -> tuple[str, float | None, float | None, str, int]:
        """What makes two rows the same row."""
        return (self.path, self.start_s, self.end_s, self.caption, self.clip)


@dataclass(frozen=True)
class RowProblem:
    """One row that cannot be used, in a sentence."""

    number: int
    source: str | None
    reason: str
    message: str

    def __str__(self) -> str:
        what = f" ({self.source})" if self.source else ""
        return f"row {self.number}{what}: {self.message}"


def read_manifest(path: Path) -> Iterator[ManifestRow | RowProblem]:
    """Every row of a manifest file in order, or what is wrong with it; ManifestError for the file itself."""
    path = Path(path)
    if not path.is_file():
        raise ManifestError(
            f"manifest {path} does not exist; make one with `latentpress scan FOLDER -o {path}`"
        )
    folder = path.resolve().parent
    for number, cells in read_cells(path):
        if isinstance(cells, str):
            yield RowProblem(number, None, "bad_row", cells)
        else:
            yield from _parsed(number, cells, folder=folder)


def _parsed(number: int, cells: dict[str, Any], *, folder: Path) -> Iterator[ManifestRow | RowProblem]:
    """The row, once for every caption of a list; as it is where that is empty, too long or ambiguous."""
    key = _first(cells, CAPTION_KEYS)
    captions = cells.get(key)
    if not isinstance(captions, list) or not 0 < len(captions) <= MAX_CAPTIONS or _rival(cells):
        yield parse_row(number, cells, folder=folder)
        return
    places: dict[str, int] = {}
    for place, caption in enumerate(captions, start=1):
        row = parse_row(number, {**cells, key: caption}, folder=folder)
        if isinstance(row, ManifestRow) and (first := places.setdefault(caption, place)) != place:
            message = f"caption {place} of its list repeats caption {first}; remove one"
            row = RowProblem(number, row.source, "duplicate", message)
        yield row


def _rival(cells: dict[str, Any]) -> str | None:
    """The column that holds a caption beside `captions`."""
    given = [key for key in CAPTION_KEYS if cells.get(key)]
    return given[0] if "captions" in given[1:] else None


def parse_row(number: int, cells: dict[str, Any], *, folder: Path) -> ManifestRow | RowProblem:
    """One row from its cells; relative paths resolve against `folder`."""

    def problem(reason: str, message: str) -> RowProblem:
        return RowProblem(number, source if isinstance(source, str) else None, reason, message)

    video_key = _first(cells, VIDEO_KEYS)
    source = cells.get(video_key)
    if not isinstance(source, str) or not source:
        return problem("no_video", f"has no video; expected one of the columns {', '.join(VIDEO_KEYS)}")
    if "\0" in source or not _is_text(source):
        return problem("bad_path", "the video path holds a NUL character or is not Unicode text")
    if rival := _rival(cells):
        message = f"has both {rival} and captions; expected one of them: move all into captions, or rename"
        return problem("bad_caption", f"{message} the column that holds none")
    caption_key = _first(cells, CAPTION_KEYS)
    caption = cells.get(caption_key)
    if isinstance(caption, list) and len(caption) > MAX_CAPTIONS:
        return problem("bad_caption", f"has {len(caption)} captions; at most {MAX_CAPTIONS} are taken")
    if not isinstance(caption, str) or not caption.strip():
        found = "no caption" if caption is None else f"caption {_shown(caption)}"
        names = ", ".join(CAPTION_KEYS)
        return problem("no_caption", f"has {found}; expected text, or a list of texts, in one of {names}")
    if "\0" in caption or not _is_text(caption):
        return problem("bad_caption", "the caption holds a NUL character or is not Unicode text")
    if len(caption) > MAX_CAPTION_CHARS:
        message = f"the caption has {len(caption)} characters; at most {MAX_CAPTION_CHARS} are taken"
        return problem("bad_caption", message)
    if _LIST_AS_TEXT.fullmatch(caption):
        message = f"the caption {_shown(caption)} is a list written as text; expected each caption in its own"
        return problem("bad_caption", f"{message} row, or the manifest as JSON lines, which hold lists")
    try:
        start_s, end_s = (_seconds(cells.get(name), name) for name in ("start_s", "end_s"))
    except ValueError as error:
        return problem("bad_window", str(error))
    if end_s is not None and end_s <= (start_s or 0.0):
        return problem("bad_window", f"expected start_s < end_s, found start_s = {start_s}, end_s = {end_s}")
    known = {video_key, caption_key, "start_s", "end_s"}
    empty = {key for key in (*VIDEO_KEYS, *CAPTION_KEYS) if not cells.get(key)}
    return ManifestRow(
        number=number,
        source=source,
        path=source if is_url(source) else os.path.normpath(folder / source),
        caption=caption,
        start_s=start_s or None,  # the start of the file, whether it is said or not
        end_s=end_s,
        extra={key: value for key, value in cells.items() if key not in known | empty and value is not None},
    )


def _first(cells: dict[str, Any], aliases: Sequence[str]) -> str:
    """The first alias that says something; the other columns are carried through."""
    return next((key for key in aliases if cells.get(key) not in (None, "")), aliases[0])


def hidden_direction(caption: str) -> str | None:
    """The first character that shows the text after it in another order (`U+202E`); None if there is none.

    A person reads such a caption otherwise than an encoder does. Right-to-left scripts need no such
    character.
    """
    found = _TURNING.search(caption)
    return f"U+{ord(found[0]):04X}" if found else None


def checked_rows(
    items: Iterable[ManifestRow | RowProblem], *, ledger: Ledger, sources: SourcesConfig = _ANYWHERE
) -> Iterator[ManifestRow | RowProblem]:
    """The same items in order; a missing file, one that `sources` does not allow, and a repeated row are
    turned into problems.

    What was seen is kept in `ledger`, on disk, so that memory does not grow with the rows.
    """
    for item in items:
        if isinstance(item, RowProblem):
            yield item
        elif (problem := _source_problem(item, sources)) is not None:
            yield problem
        elif (first := ledger.first_row("asked", item.key, item.number)) is not None:
            message = f"repeats row {first} (same video, window and caption); remove one"
            yield RowProblem(item.number, item.source, "duplicate", message)
        else:
            yield item


def split_rows(
    items: Iterable[ManifestRow | RowProblem], *, sources: SourcesConfig = _ANYWHERE
) -> tuple[list[ManifestRow], list[RowProblem]]:
    """Usable rows and problems, as `checked_rows` finds them."""
    rows: list[ManifestRow] = []
    problems: list[RowProblem] = []
    with Ledger() as ledger:
        for item in checked_rows(items, ledger=ledger, sources=sources):
            if isinstance(item, ManifestRow):
                rows.append(item)
            else:
                problems.append(item)
    return rows, problems


def write_manifest(path: Path, rows: Iterable[ManifestRow]) -> None:
    """Rows as JSONL that `read_manifest` reads back; paths relative to it, but absolute ones stay so.

    Written as they come under another name, and renamed when complete: `rows` may be read from `path`.
    ManifestError for a name that would be read as another format.
    """
    if path.suffix.lower() != ".jsonl":
        raise ManifestError(f"{path}: a manifest is written as JSON lines; give it a name ending in .jsonl")
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    folder = path.resolve().parent
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for row in rows:
                as_given = os.path.isabs(row.source) or is_url(row.source)
                video = row.source if as_given else os.path.relpath(row.path, folder)
                window = {"start_s": row.start_s, "end_s": row.end_s}
                given = {name: value for name, value in window.items() if value is not None}
                cells = {"video": video, "caption": row.caption, **given, **row.extra}
                file.write(json.dumps(cells, ensure_ascii=False, default=str) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _source_problem(row: ManifestRow, sources: SourcesConfig) -> RowProblem | None:
    if is_url(row.path):
        refused = url_problem(row.path, sources)
        return RowProblem(row.number, row.source, "remote", refused) if refused else None
    try:
        mode = os.stat(row.path).st_mode
    except OSError as error:
        message = f"the video cannot be opened: {error.strerror} ({row.path})"
        return RowProblem(row.number, row.source, "missing_file", message)
    if not stat.S_ISREG(mode):
        return RowProblem(row.number, row.source, "not_a_file", "the video is not a regular file")
    if refused := path_problem(row.path, sources):
        return RowProblem(row.number, row.source, "outside_root", refused)
    return None


def _is_text(value: str) -> bool:
    """False for lone surrogates, which no UTF-8 file can hold."""
    return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)


def _seconds(value: Any, name: str) -> float | None:
    if value is None or value == "" or value != value:  # pandas writes a missing number as NaN
        return None
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):  # the last of an integer that no float can hold
        raise ValueError(f"{name} = {_shown(value)}: expected seconds") from None
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError(f"{name} = {_shown(value)}: expected seconds from 0")
    return seconds


def _shown(value: Any) -> str:
    """A value of a manifest, short enough for a sentence."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."
