"""Errors cross processes whole: Ray and process pools pickle what a worker raises."""

from __future__ import annotations

import pickle
from collections.abc import Iterator

import pytest

from pipeline.starved import ProcessDied
from schemas.errors import (
    ClipError,
    ConfigError,
    DatasetError,
    LatentpressError,
    ManifestError,
    MissingExtraError,
    RunError,
    StaleDatasetError,
)

ERRORS = (
    LatentpressError("a"),
    ConfigError("b"),
    MissingExtraError("s3fs", "s3"),
    ManifestError("c", ["row 1", "row 2"]),
    StaleDatasetError("d", {"seed": (1, 2)}),
    DatasetError("e"),
    RunError("f"),
    ProcessDied("h"),
    ClipError("bad", "g", stage="encode", attempts=3),
)


def tree(root: type[LatentpressError]) -> Iterator[type[LatentpressError]]:
    yield root
    for each in root.__subclasses__():
        yield from tree(each)


def test_every_class_is_tried() -> None:
    assert {type(error) for error in ERRORS} == set(tree(LatentpressError))


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_is_the_same_in_another_process(error: LatentpressError) -> None:
    error.add_note("seen in a worker")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert (str(again), again.args, vars(again)) == (str(error), error.args, vars(error))
