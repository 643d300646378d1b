"""A folder of videos -> manifest rows: one per video with a caption, one problem per video without.

A caption comes from a metadata.jsonl, .csv or .parquet anywhere in the tree (its paths are relative to it;
it may hold several rows for one video), else from a .txt of the same name beside the video. Nothing is
opened but captions, so a scan costs one walk. The order is that of sorted paths, whatever the file system.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from schemas.errors import ConfigError, ManifestError
from schemas.manifest import MAX_CAPTION_CHARS, ManifestRow, RowProblem, parse_row, read_manifest
from schemas.manifest_cells import SUFFIXES
from schemas.store import is_url

VIDEO_SUFFIXES = frozenset(
    {".3gp", ".avi", ".flv", ".gif", ".h264", ".h265", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4"}
    | {".mpeg", ".mpg", ".mts", ".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv"}
)
METADATA_NAMES = frozenset(f"metadata{suffix}" for suffix in SUFFIXES)
CAPTION_SUFFIX = ".txt"


def video_files(paths: Sequence[Path]) -> list[Path]:
    """The files among `paths`, and the videos that lie directly in the folders among them, sorted.

    ConfigError for a path that is not there, or where there is no video.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(file for file in path.iterdir() if file.suffix.lower() in VIDEO_SUFFIXES)
        elif path.is_file():
            files.append(path)
        else:
            raise ConfigError(f"{path} does not exist")
    if not files:
        raise ConfigError(f"no video in {', '.join(map(str, paths))}")
    return files


@dataclass(frozen=True)
class Discovery:
    """What a folder holds; paths are relative to it, but for those that metadata gives as absolute."""

    items: list[ManifestRow | RowProblem]
    unused_captions: list[str]
    """Caption files beside no video of their name; other text files are among them."""


def discover(folder: Path) -> Iterator[ManifestRow | RowProblem]:
    """The rows of a folder that is used as a manifest."""
    yield from search(folder).items


def search(folder: Path) -> Discovery:
    """Every video and caption below `folder`; ManifestError if there is no such folder or no video in it."""
    folder = folder.resolve()
    if not folder.is_dir():
        raise ManifestError(f"folder {folder} does not exist")
    names = list(_walk(folder))
    videos = [name for name in names if _suffix(name) in VIDEO_SUFFIXES]
    metadata = [name for name in names if os.path.basename(name) in METADATA_NAMES]
    captions = {name for name in names if _suffix(name) == CAPTION_SUFFIX}
    if not videos and not metadata:
        raise ManifestError(f"{folder} holds no video: no file ending in {', '.join(sorted(VIDEO_SUFFIXES))}")
    items: list[ManifestRow | RowProblem] = []
    listed = set()
    for name in metadata:
        for item in read_manifest(folder / name):
            if isinstance(item, RowProblem):
                items.append(replace(item, message=f"{item.message} ({name}, row {item.number})"))
                continue
            listed.add(os.path.realpath(item.path))
            inside = not os.path.isabs(item.source) and not is_url(item.source)
            items.append(replace(item, source=os.path.relpath(item.path, folder)) if inside else item)
    alone = [name for name in videos if os.path.realpath(folder / name) not in listed]
    items += [_beside(folder, name, captions) for name in alone]
    used = {os.path.splitext(name)[0] + CAPTION_SUFFIX for name in videos}
    numbered = [replace(item, number=number) for number, item in enumerate(items, start=1)]
    return Discovery(numbered, sorted(captions - used))


def _beside(folder: Path, name: str, captions: set[str]) -> ManifestRow | RowProblem:
    """The row of a video from the caption file of its name."""
    caption = os.path.splitext(name)[0] + CAPTION_SUFFIX
    if caption not in captions:
        message = f"has no caption: expected {caption} or a row in a metadata file"
        return RowProblem(0, name, "no_caption", message)
    try:
        with (folder / caption).open(encoding="utf-8-sig") as file:
            text = file.read(MAX_CAPTION_CHARS + 1).strip()
    except (OSError, UnicodeDecodeError) as error:
        return RowProblem(0, name, "bad_caption", f"its caption {caption} cannot be read: {error}")
    return parse_row(0, {"video": name, "caption": text}, folder=folder)


def _walk(folder: Path) -> Iterator[str]:
    """Sorted names of the files below `folder`; hidden ones left out, each real folder entered once."""
    entered = set()
    for where, folders, files in os.walk(folder, followlinks=True):
        here = os.stat(where)
        if (here.st_dev, here.st_ino) in entered:
            folders.clear()
            continue
        entered.add((here.st_dev, here.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            # A pipe or device would block whoever opens it: only a video row may name one, and be refused.
            path = os.path.join(where, name)
            if not name.startswith(".") and (os.path.isfile(path) or _suffix(name) in VIDEO_SUFFIXES):
                yield os.path.relpath(path, folder)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()
