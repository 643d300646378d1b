"""Scaling: the same numbers for numpy and torch, and its own inverse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from schemas.scaling import Scaling, scale, unscale

RULES = [
    Scaling(rule="none"),
    Scaling(rule="factor", factor=0.7),
    Scaling(rule="per_channel", mean=(1.0, -2.0, 0.5), std=(2.0, 0.25, 1.0)),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.rule)
def test_numpy_and_torch_agree_and_unscale_undoes(rule: Scaling) -> None:
    values = np.random.default_rng(0).standard_normal((2, 5, 3, 4, 6)).astype(np.float32)
    scaled = scale(values, rule)
    np.testing.assert_array_equal(scale(torch.from_numpy(values), rule).numpy(), scaled)
    np.testing.assert_allclose(unscale(scaled, rule), values, atol=1e-6)
    assert scaled.dtype == np.float32


def test_per_channel_is_by_channel() -> None:
    scaled = scale(np.ones((1, 3, 1, 1), np.float32), RULES[2])
    np.testing.assert_allclose(scaled.ravel(), [0.0, 12.0, 0.5])


def test_wrong_channel_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 3 channels"):
        scale(np.ones((1, 4, 1, 1), np.float32), RULES[2])
    with pytest.raises(ValidationError, match="as many means as stds"):
        Scaling(rule="per_channel", mean=(1.0,), std=())
