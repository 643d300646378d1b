"""Precomputed data of TTT-Video: moments as `.pt`, time-major, paired with text by JSON lines.

    NAME.jsonl        {"vid_emb": PATH, "text_chunk_emb": [PATH, ...]} a line, paths relative to its folder
    PATH of vid_emb   one tensor [T, 2 C, H, W], mean before logvar, unscaled
    PATH of text      one tensor [S, D] for every 3 s, pad rows kept, no mask

Text of several segments is stored in one piece, in order; each sample says where segments end.
Source: test-time-training/ttt-video-dit data/precomp_video.py, data/precomp_text.py, docs/dataset.md,
ttt/datasets/preembedding_dataset.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pipeline.imports.cache import CachedClip, CachedLatents, CachedPrompt, Listing, refused
from pipeline.imports.files import ALONE, CacheFile, read_lines
from schemas.errors import ConfigError

_KEYS = {"vid_emb", "text_chunk_emb"}


class TttVideoCache:
    """See the module."""

    scaled = False
    single: Literal["sample"] = "sample"
    padding: Literal["full"] = "full"
    text_family: Literal["cogvideox"] = "cogvideox"

    def __init__(self, source: Path) -> None:
        """`source`: a JSONL file, or the folder its paths are relative to with one or more of them."""
        self._source = source

    def listing(self) -> Listing:
        source = self._source
        root = source.parent if source.is_file() else source
        lists = [source] if source.is_file() else sorted(source.glob("*.jsonl"))
        if not lists:
            raise ConfigError(
                f"{source} holds no .jsonl file; name the training JSONL, or the folder it lies in"
            )
        clips = []
        for path in lists:
            try:
                lines = read_lines(path)
            except (OSError, UnicodeDecodeError) as error:
                raise refused(path, f"cannot be read: {error}", "expected JSON lines in UTF-8") from error
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    clips.append(self._clip(path, number, line, root))
        return Listing(clips)

    def _clip(self, path: Path, number: int, line: str, root: Path) -> CachedClip:
        try:
            row: Any = json.loads(line)
            texts = row["text_chunk_emb"]
            latents, prompt = root / row["vid_emb"], tuple(root / text for text in texts)
        except (ValueError, KeyError, TypeError) as error:
            what = f"line {number} is no row of it ({error!r})"
            raise refused(path, what, "expected vid_emb and text_chunk_emb") from error
        if unknown := sorted(row.keys() - _KEYS):
            raise refused(
                path, f"line {number} has {', '.join(unknown)}", "remove what a dataset has no place for"
            )
        if not texts:
            raise refused(path, f"line {number} has no text_chunk_emb", "expected a file per segment of 3 s")
        for file in (latents, *prompt):
            if not file.is_file():
                raise refused(
                    path, f"line {number} names {file}, which is missing", "put it there, or drop the line"
                )
        return CachedClip(latents, prompt, None)

    def latents(self, file: CacheFile) -> CachedLatents:
        file.only(ALONE)
        return CachedLatents(file.tensor(ALONE, dims=4))

    def prompt(self, files: list[CacheFile]) -> CachedPrompt:
        import torch

        for file in files:
            file.only(ALONE)
        segments = [file.tensor(ALONE, dims=2) for file in files]
        if len({(part.shape[1], part.dtype) for part in segments}) > 1:
            what = f"its segments are {[list(part.shape) for part in segments]}"
            raise refused(files[0].path, what, "expected one width and type")
        return CachedPrompt(torch.cat(segments), None, tuple(len(part) for part in segments))
