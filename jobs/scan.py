"""`latentpress scan`: a folder of videos becomes manifest.jsonl; a video without a caption is only named."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from jobs.console import console, count_table, print_json
from pipeline.discover import search
from schemas.errors import EXIT_DONE, ManifestError
from schemas.manifest import split_rows, write_manifest

SHOWN = 20


def scan(folder: Path, *, output: Path, as_json: bool) -> int:
    """Write the rows of `folder` to `output`, with paths relative to it; returns the exit code."""
    found = search(folder)
    rows, problems = split_rows(found.items)
    if not rows:
        raise ManifestError(f"{folder}: no video has a caption", [str(problem) for problem in problems])
    write_manifest(output, rows)
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
            console.print("\n".join(f"  {line}" for line in lines[:SHOWN]))
            if len(lines) > SHOWN:
                console.print(f"  ... and {len(lines) - SHOWN} more (--json lists all)")
    console.print(count_table("kind", Counter(Path(row.path).suffix.lower() for row in rows)))
    console.print(f"wrote {output}: {len(rows)} rows")
    return EXIT_DONE
