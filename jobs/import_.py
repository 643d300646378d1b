"""`latentpress import`: a cache of another trainer in, a dataset out, and how it went in a few lines."""

from __future__ import annotations

from jobs.console import console, count_of, count_table, print_json
from pipeline.imports.options import ImportOptions
from pipeline.imports.story import import_cache
from schemas.errors import EXIT_DONE, EXIT_GATE


def run(options: ImportOptions, *, as_json: bool) -> int:
    """Import; the exit code of the command: 3 where rows were quarantined."""
    summary, ran = import_cache(options)
    if as_json:
        print_json(summary)
    else:
        _report(options, summary, ran=ran)
    return EXIT_GATE if summary["quarantined"] else EXIT_DONE


def _report(options: ImportOptions, summary: dict[str, object], *, ran: bool) -> None:
    console.print(f"{summary['kept']} of {count_of(int(str(summary['rows'])), 'clip')} imported")
    if reasons := summary["reasons"]:
        assert isinstance(reasons, dict)
        console.print(count_table("quarantined for", reasons))
    if not ran:
        console.print("nothing to do: all of it is imported")
    if not summary["empty_prompt"]:
        console.print(
            "no empty prompt, so training cannot drop captions: --text-encoder at the first import makes it"
        )
    console.print(f"stored: {summary['stored']}; card.json says what is not known (imported_from)")
    console.print(f"dataset: {options.output}  (check it with `latentpress verify {options.output}`)")
