"""Drawn histories of a dataset, against a model that only knows what is asked for and what can be decoded."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.generation import pending_units
from pipeline.retry import retry_failed
from schemas.check import check_dataset
from schemas.index import read_index, read_quarantine
from schemas.manifest import ManifestRow
from schemas.resolve import build_tables
from schemas.sample import EMPTY_PROMPT_UNIT, Family
from tests.pipeline.fake import BROKEN, ask, finish, make_dataset, write_unit

_NAMES = tuple("abcd")
_CONTENTS = (b"one", b"two", b"three", BROKEN)
_CAPTIONS = ("sea", "hill", "town", "")
_CHANGES = ("add", "remove", "edit", "replace", "reorder")
_EVENTS = ("nothing", "killed", "second driver", "retry")
Value = TypeVar("Value", str, bytes)
Change = tuple[str, int, int]
"""What, to which row, and how far."""


def _other(values: Sequence[Value], now: Value, step: int) -> Value:
    """The value `step` places after `now`, from the start again after the last."""
    return values[(values.index(now) + step) % len(values)]


class World:
    """A manifest, its files and its dataset."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.dataset, self.card = make_dataset(folder / "latents")
        self.rows: list[ManifestRow] = []
        self.shards: dict[Path, bytes] = {}
        for name, content in zip(_NAMES, _CONTENTS, strict=True):
            (folder / name).write_bytes(content)
            self.ask_for(name, "sea", None)

    def ask_for(self, name: str, caption: str, end_s: float | None) -> None:
        row = ManifestRow(1, name, str(self.folder / name), caption, end_s=end_s)
        if row.key not in {each.key for each in self.rows}:
            self.rows.append(row)

    def change(self, what: str, at: int, step: int) -> None:
        """The manifest or a file becomes another; nothing runs."""
        row = self.rows[at % len(self.rows)]
        if what == "add":
            self.ask_for(_NAMES[at % len(_NAMES)], _CAPTIONS[step], [None, 1.0][step % 2])
        elif what == "remove" and len(self.rows) > 1:
            self.rows.remove(row)
        elif what == "edit":
            self.rows.remove(row)
            self.ask_for(row.source, _other(_CAPTIONS, row.caption, step), row.end_s)
        elif what == "replace":
            path = Path(row.path)
            path.write_bytes(_other(_CONTENTS, path.read_bytes(), step))
        else:
            self.rows.reverse()

    def happen(self, event: str, number: int) -> None:
        """Something other than a whole run, which leaves units planned or committed and the tables behind."""
        if event == "retry":
            retry_failed(self.dataset, self.card, reasons=None)
            assert read_quarantine(self.dataset.root).num_rows == 0
        elif event == "killed":
            ask(self.dataset, self.card, self.rows)
            families: tuple[Family, ...] = ("prompts", "latents")
            for family in families:
                for unit in pending_units(self.dataset, family)[:number]:
                    write_unit(self.dataset, self.card, unit)
        elif event == "second driver":
            self.second_driver(_NAMES[number], end_s=10.0 + len(self.rows))

    def second_driver(self, name: str, *, end_s: float) -> None:
        """Another manifest lacks a new row when its unit runs."""
        self.ask_for(name, "sea", end_s)
        lacking = self.rows[-1]
        ask(self.dataset, self.card, self.rows)
        ask(self.dataset, self.card, [row for row in self.rows if row.path != lacking.path])
        families: tuple[Family, ...] = ("prompts", "latents")
        for family in families:
            for unit in pending_units(self.dataset, family):
                write_unit(self.dataset, self.card, unit)

    def run(self) -> None:
        """A whole run, and everything that must hold after it."""
        ask(self.dataset, self.card, self.rows)
        finish(self.dataset, self.card)
        index, quarantine = read_index(self.dataset.root), read_quarantine(self.dataset.root)

        # Every row is kept or quarantined, once.
        broken = [Path(row.path).read_bytes() == BROKEN for row in self.rows]
        for table, failed in ((index, False), (quarantine, True)):
            held = [(each["path"], each["end_s"], each["caption"]) for each in table.to_pylist()]
            asked = [row for row, is_broken in zip(self.rows, broken, strict=True) if is_broken == failed]
            assert Counter(held) == Counter((row.path, row.end_s, row.caption) for row in asked)

        # The tables are what commit records give, and hold what a dataset of today's rows would.
        rebuilt = build_tables(self.dataset, self.card)
        assert index.equals(rebuilt[0])
        assert quarantine.equals(rebuilt[1])
        with tempfile.TemporaryDirectory() as folder:
            fresh, card = make_dataset(Path(folder) / "latents")
            ask(fresh, card, self.rows)
            finish(fresh, card)
            names = ["sample_id", "caption", "path"]
            expected = read_index(fresh.root).select(names).to_pylist()
        assert sorted(index.select(names).to_pylist(), key=str) == sorted(expected, key=str)

        # The empty prompt is in a unit of its own, whatever rows were asked for.
        commit = self.dataset.commit("prompts", EMPTY_PROMPT_UNIT)
        assert commit is not None
        assert [sample.key for sample in commit.samples] == [self.card.empty_prompt]
        assert check_dataset(self.dataset.root).clean

        # What was written stays as it is.
        now = {path: path.read_bytes() for path in self.dataset.root.glob("*/*/*.tar")}
        assert {path: now.get(path) for path in self.shards} == self.shards
        self.shards = now


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.tuples(st.sampled_from(_CHANGES), st.integers(0, 7), st.integers(1, 2)), max_size=4),
            st.sampled_from(_EVENTS),
            st.integers(0, 3),
        ),
        min_size=2,
        max_size=4,
    )
)
def test_whatever_happens_the_dataset_holds_what_is_asked_for(
    rounds: list[tuple[list[Change], str, int]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        world.run()
        for changes, event, number in rounds:
            for change in changes:
                world.change(*change)
            world.happen(event, number)
            world.run()
