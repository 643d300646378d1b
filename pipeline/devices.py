"""Where a model runs: the word of a config in, a torch device out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from schemas.config import Device
from schemas.errors import ConfigError

if TYPE_CHECKING:
    import torch


def pick_device(wanted: Device, *, key: str) -> torch.device:
    """The first GPU that torch sees here (a Ray worker sees its own), or the CPU; ConfigError naming `key`
    where a GPU is asked for and there is none."""
    import torch

    has_gpu = torch.cuda.is_available()
    if wanted == "cuda" and not has_gpu:
        raise ConfigError(f"{key} = 'cuda': torch sees no GPU here; expected 'auto' or 'cpu'")
    return torch.device("cpu" if wanted == "cpu" or not has_gpu else "cuda")
