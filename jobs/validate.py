"""`latentpress validate`: every row of a manifest held against its file and the rules of a config.

Exit code 0 where the share of bad rows is within the config's quarantine rate (0 without a config),
3 above it. Rows that preprocess would refuse to start with (missing file, no caption, repeated row)
count like rows it would quarantine; rows that only repeat another's content are warned of. Rows stream
from the manifest to the report and the output: what must be remembered of them is on disk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from jobs.console import Pace, console, print_json
from jobs.report import Report
from pipeline.copies import Copies
from pipeline.graph import checked_encoder, manifest_items
from pipeline.progress import gated_failures
from pipeline.survey import survey
from pipeline.text_encode import TextEncoder, is_at_hand, load_text_encoder
from schemas.config import PreprocessConfig
from schemas.errors import EXIT_DONE, EXIT_GATE, ClipError, ConfigError, ManifestError
from schemas.ledger import Ledger
from schemas.load import check_config, load_config
from schemas.manifest import ManifestRow, RowProblem, checked_rows, hidden_direction, write_manifest


def validate(
    manifest: Path,
    *,
    config: Path | None,
    overrides: Sequence[str],
    output: Path | None,
    as_json: bool,
    decode: bool = False,
) -> int:
    """Validate `manifest`, every picture of it with `decode`; the exit code of the command."""
    settings = _settings(manifest, config=config, overrides=overrides)
    text, unread = None, False
    if config is not None:
        unread = not is_at_hand(settings.text_encoder)
        text = None if unread else load_text_encoder(settings.text_encoder)
    with ExitStack() as stack:
        ledger = stack.enter_context(Ledger())
        copies = stack.enter_context(Copies(ledger))
        report = Report(ledger, None if config is None else settings)
        rows = _good_rows(manifest, settings, report, text=text, ledger=ledger, copies=copies, decode=decode)
        if output is None:
            deque(rows, maxlen=0)
        else:
            write_manifest(output, rows)
        if as_json:
            lists = {f"{kind}s": report.findings(kind) for kind in ("problem", "warning")}
            print_json({"manifest": str(manifest), **report.as_json()}, lists)
        else:
            report.show()
            if unread:
                console.print("not checked: which captions are cut (the text encoder is not here yet)")
            if output is not None:
                console.print(f"wrote the {report.good} good rows to {output}")
    allowed = 0.0 if config is None else settings.quarantine.max_rate
    # Rows dropped because a setting asks for it do not count, unless the setting is to stop the run.
    unwanted = report.bad if settings.frames.short == "error" else gated_failures(report.reasons)
    if unwanted <= allowed * (report.good + report.bad):
        return EXIT_DONE
    if config is not None and not as_json:
        rate = unwanted / (report.good + report.bad)
        console.print(f"{rate:.1%} of the rows are bad, over quarantine.max_rate = {allowed:.1%}: exit 3")
    return EXIT_GATE


def _settings(manifest: Path, *, config: Path | None, overrides: Sequence[str]) -> PreprocessConfig:
    """The config, its frame rules checked before a file is opened; the defaults without one."""
    if config is None:
        if overrides:
            raise ConfigError("--set changes a config; name it with -c CONFIG")
        return check_config({"manifest": str(manifest), "output": "unused"}, PreprocessConfig, where="--set")
    settings = load_config(config, PreprocessConfig, overrides=overrides)
    checked_encoder(settings)
    return settings


def _good_rows(
    manifest: Path,
    settings: PreprocessConfig,
    report: Report,
    *,
    text: TextEncoder | None,
    ledger: Ledger,
    copies: Copies,
    decode: bool,
) -> Iterator[ManifestRow]:
    """The rows that can be used, in order; every row is counted in `report` on its way."""

    def readable() -> Iterator[ManifestRow]:
        for item in checked_rows(manifest_items(manifest), ledger=ledger, sources=settings.sources):
            if isinstance(item, RowProblem):
                report.add_problem(item)
            else:
                copies.watch(item)
                yield item

    pace = Pace("rows")
    for row, found in survey(readable(), settings, full=decode):
        if isinstance(found, ClipError):
            report.add_problem(RowProblem(row.number, row.source, found.reason, found.message))
        else:
            report.add(row, found)
            _note_direction(row, report)
            _note_copy(row, copies, report)
            if text is not None:
                _note_length(row, report, text, most=settings.text_encoder.max_length)
            yield row
        pace.tick(report.good + report.bad, f"{report.bad} bad")
    if not report.good + report.bad:
        raise ManifestError(f"{manifest} holds no rows")


def _note_direction(row: ManifestRow, report: Report) -> None:
    character = hidden_direction(row.caption)
    if character is not None:
        report.add_warning(
            row,
            "hidden_direction",
            f"the caption holds {character}, which shows text in another order than it is stored: the text "
            "encoder does not read what you see",
        )


def _note_length(row: ManifestRow, report: Report, text: TextEncoder, *, most: int) -> None:
    (tokens,) = text.count_tokens([row.caption])
    if tokens > most:
        report.add_warning(row, "caption_cut", f"the caption has {tokens} tokens and will be cut to {most}")


def _note_copy(row: ManifestRow, copies: Copies, report: Report) -> None:
    first, same_file = copies.first_row(row)
    if first is not None:
        report.add_warning(
            row,
            "duplicate_content",
            f"the same bytes, window and caption as row {first} under another name; "
            "preprocess stores its latents once",
        )
    elif same_file != row.path:
        report.add_copy()
