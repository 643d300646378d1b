"""Clips of a cache -> manifest rows, each with the files its latents and its prompt come from.

A row's source is its latents file, so identity is the content of that file, as a video's is. Where a cache
holds no captions, one stands in that names the embeddings by their digest: equal embeddings, equal caption.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from pipeline.imports.cache import CachedClip, CachedPrompt, Listing
from pipeline.imports.files import carried
from pipeline.source import Source, identify
from schemas.codec import checksum
from schemas.dataset import Dataset
from schemas.errors import ManifestError, StaleDatasetError
from schemas.history import History
from schemas.manifest import ManifestRow


def identified(listing: Listing, known: dict[tuple[str, int, int], str]) -> dict[str, Source]:
    """What every file of latents and prompts is; ManifestError lists those that cannot be read."""
    paths = {str(path): None for clip in listing.clips for path in (clip.path, *clip.prompt)}
    try:
        return identify(list(paths), mode="content", known=known)
    except ManifestError as error:
        what = f"{len(error.problems)} of {len(paths)} files of the cache cannot be read"
        raise ManifestError(what, error.problems) from error


def paired_rows(
    listing: Listing, files: dict[str, Source], *, root: Path
) -> list[tuple[ManifestRow, CachedClip]]:
    """A row per clip and caption, in the order of the cache; pairs that repeat count once."""
    base = (root if root.is_dir() else root.parent).absolute()
    found: dict[tuple[str, str], tuple[ManifestRow, CachedClip]] = {}
    for number, clip in enumerate(listing.clips, start=1):
        digest = hashlib.sha256("".join(files[str(path)].digest for path in clip.prompt).encode()).hexdigest()
        caption = clip.caption if clip.caption is not None else f"[not in the cache: {digest[:16]}]"
        path, inside = str(clip.path), clip.path.is_relative_to(base)
        source = clip.path.relative_to(base).as_posix() if inside else path
        row = ManifestRow(number, source, path, caption, extra={"prompt_sha256": digest})
        found.setdefault((path, caption), (row, clip))
    return list(found.values())


def by_caption(
    listing: Listing, clips: Sequence[tuple[ManifestRow, CachedClip]]
) -> dict[str, tuple[Path, ...]]:
    """Caption -> files of its embeddings; of several, those that come first."""
    found: dict[str, tuple[Path, ...]] = {}
    for row, clip in clips:
        found.setdefault(row.caption, clip.prompt)
    if listing.empty_prompt:
        found.setdefault("", listing.empty_prompt)
    return found


def require_same_prompts(
    clips: Sequence[tuple[ManifestRow, CachedClip]],
    before: History,
    dataset: Dataset,
    *,
    prompt: Callable[[CachedClip], CachedPrompt],
) -> None:
    """StaleDatasetError where embeddings are others than were imported for the same caption.

    A file written again may hold the same: where its digest differs, its values are held against the stored.
    """
    columns = ["path", "caption", "caption_digest", "prompt_unit", "extra"]
    known = {(row["path"], row["caption"]): row for row in before.live_table(columns).to_pylist()}
    for row, clip in clips:
        there = known.get((row.path, row.caption))
        if there is None or json.loads(there["extra"])["prompt_sha256"] == row.extra["prompt_sha256"]:
            continue
        commit = dataset.commit("prompts", there["prompt_unit"])
        stored = {sample.key: sample for sample in commit.samples} if commit else {}
        values = carried(prompt(clip).embeds).data
        sample = stored.get(there["caption_digest"])
        if commit and (not sample or sample.tensors["prompt_embeds"].checksum != checksum(values.tobytes())):
            raise StaleDatasetError(
                f"{row.source}: its prompt embeddings changed since they were imported into {dataset.root}; "
                "import into another folder"
            )
