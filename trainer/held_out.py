"""The held-out split: which samples are never trained on, and which of them a validation looks at.

A source file is held out by a hash of its content and of nothing else, so with all its clips and captions, in
every run, stage and dataset that has it. A larger share holds out what a smaller one does, and more. The
trade-off: of few files the share is met only roughly.
"""

from __future__ import annotations

import numpy as np

from schemas.errors import ConfigError
from trainer.mixture import Mixture
from trainer.order import key_of, keyed_shares

_SPLIT, _CHOICE = key_of("held out"), key_of("validation")


def held_out_rows(mixture: Mixture, *, share: float) -> np.ndarray:
    """bool [n]: rows whose source file belongs to the `share` of all files that is held out."""
    if share == 0:
        return np.zeros(len(mixture), bool)
    return _draws(mixture) < share


def check_split(mixture: Mixture, *, share: float, wanted: np.ndarray, stage: str) -> None:
    """ConfigError where nothing of a stage's rows (bool [n], `wanted`) is held out, or all of it."""
    draws = np.unique(_draws(mixture)[wanted])
    files = f"the {len(draws)} source files of stage {stage!r}"
    if share <= draws[0]:
        raise ConfigError(
            f"validation.share = {share}: none of {files} is held out; set more than {draws[0]:.4f} to hold "
            "one out, or 0 to validate on training clips"
        )
    if share > draws[-1]:
        raise ConfigError(
            f"validation.share = {share}: all of {files} are held out, none is left to train on; set "
            f"{draws[-1]:.4f} or less"
        )


def validation_rows(mixture: Mixture, rows: np.ndarray, *, limit: int) -> np.ndarray:
    """int64, at most `limit` of `rows`: one of each clip, the same ones whatever else is in the dataset."""
    order = rows[np.argsort(keyed_shares(mixture.row_hashes[rows], key=_CHOICE), kind="stable")]
    once = np.unique(mixture.clip_hashes[order], return_index=True)[1]
    return order[np.sort(once)][:limit]


def _draws(mixture: Mixture) -> np.ndarray:
    return keyed_shares(mixture.source_hashes, key=_SPLIT)
