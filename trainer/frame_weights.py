"""Frame weights: a mixture in, the weight of any latent frame's error out.

Taken from the index once, for all stages. The trade-off: four bytes a latent frame of the whole mixture are
held by every rank.

T latent frames of a window.
"""

from __future__ import annotations

import numpy as np

from trainer.losses import latent_frame_weights
from trainer.mixture import Mixture


class FrameWeights:
    """The weights of `loss.keyframe_lambda`; where that is 1 all are 1, and none are held."""

    def __init__(self, mixture: Mixture, *, keyframe_lambda: float) -> None:
        """DatasetError where a sample has none of the frame weights that a lambda other than 1 needs."""
        self._mixture = mixture
        self.all_one = keyframe_lambda == 1
        catalogs = () if self.all_one else mixture.catalogs
        self._weights = [
            latent_frame_weights(
                each.frame_weights(),
                each.pts_offsets,
                geometry=each.card.geometry,
                keyframe_lambda=keyframe_lambda,
            )
            for each in catalogs
        ]
        self._offsets = [np.concatenate([[0], np.cumsum(each.shapes[:, 0])]) for each in catalogs]

    def of(self, row: int, *, first: int, length: int) -> np.ndarray | None:
        """float32 [T] of a window of a row of the mixture; None where all are 1."""
        if self.all_one:
            return None
        dataset, row = self._mixture.locate(row)
        return self._weights[dataset][self._offsets[dataset][row] + first :][:length]

    def tobytes(self, dataset: int, rows: np.ndarray) -> bytes:
        """Of `rows` of a dataset's catalog, whole: for a digest."""
        if self.all_one:
            return b""
        wanted = np.isin(np.arange(len(self._offsets[dataset]) - 1), rows)
        return self._weights[dataset][np.repeat(wanted, np.diff(self._offsets[dataset]))].tobytes()
