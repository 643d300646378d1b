"""`latentpress scan`: a folder of videos becomes manifest.jsonl; a video without a caption is only named."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from jobs.console import console, count_table, print_json
from pipeline.discover import search
from schemas.errors import EXIT_DONE, ManifestError
from schemas.manifest import ManifestRow, split_rows

SHOWN = 20


def scan(folder: Path, *, output: Path, as_json: bool) -> int:
    """Write the rows of `folder` to `output`, with paths relative to it; returns the exit code."""
    found = search(folder)
    rows, problems = split_rows(found.items)
    if not rows:
        raise ManifestError(f"{folder}: no video has a caption", [str(problem) for problem in problems])
    home = output.absolute().parent
    home.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(_cells(row, home), ensure_ascii=False, default=str) + "\n" for row in rows]
    output.write_text("".join(lines), encoding="utf-8")
    if as_json:
        print_json(
            {
                "manifest": str(output),
                "rows": len(rows),
                "left_out": [
                    {"video": problem.source, "reason": problem.reason, "message": problem.message}
                    for problem in problems
                ],
                "unused_captions": found.unused_captions,
            }
        )
        return EXIT_DONE
    for title, lines in (
        (f"left out {len(problems)} rows:", [f"{problem.source}: {problem.message}" for problem in problems]),
        (f"{len(found.unused_captions)} caption files beside no video:", found.unused_captions),
    ):
        if lines:
            console.print(title)
            console.print("\n".join(f"  {line}" for line in lines[:SHOWN]), markup=False)
            if len(lines) > SHOWN:
                console.print(f"  ... and {len(lines) - SHOWN} more (--json lists all)")
    kinds: dict[str, int] = {}
    for row in rows:
        kinds[Path(row.path).suffix.lower()] = kinds.get(Path(row.path).suffix.lower(), 0) + 1
    console.print(count_table("kind", kinds))
    console.print(f"wrote {output}: {len(rows)} rows", markup=False)
    return EXIT_DONE


def _cells(row: ManifestRow, home: Path) -> dict[str, Any]:
    video = row.source if os.path.isabs(row.source) else os.path.relpath(row.path, home)
    window = {"start_s": row.start_s, "end_s": row.end_s}
    given = {key: value for key, value in window.items() if value is not None}
    return {"video": video, "caption": row.caption, **given, **row.extra}
