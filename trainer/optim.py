"""The optimizer and what it may change: regexes over parameter names in; AdamW with two groups out.

The `foreach` implementation is used on every device: it takes sharded parameters, and repeats bit for
bit. (`fused` is quicker on GPUs; its share of a step is small while the model is sharded.)
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

import torch
from torch import nn

from schemas.errors import ConfigError
from schemas.train_config import OptimConfig


def set_trainable(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Freeze every parameter that no pattern is found in; returns a table of what each pattern trains.

    Before sharding: FSDP keeps frozen parameters out of the gradient reduction. ConfigError where a
    pattern matches nothing.
    """
    parameters = dict(model.named_parameters())
    rows = []
    trainable: set[str] = set()
    for i, pattern in enumerate(patterns):
        matched = [name for name in parameters if re.search(pattern, name)]
        if not matched:
            close = difflib.get_close_matches(pattern.replace("\\", ""), parameters, n=3, cutoff=0.0)
            raise ConfigError(
                f"trainable.{i} = {pattern!r} matches no parameter of the model; the closest names are "
                + ", ".join(close)
            )
        trainable.update(matched)
        rows.append((pattern, len(matched), sum(parameters[name].numel() for name in matched)))
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trainable)
    rows.append(("trained", len(trainable), sum(parameters[name].numel() for name in trainable)))
    rows.append(("all", len(parameters), sum(parameter.numel() for parameter in parameters.values())))
    width = max(len(row[0]) for row in rows)
    return [f"{name:{width}}  {tensors:6d} tensors  {count:14,d} parameters" for name, tensors, count in rows]


def make_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; no weight decay on biases and norms (one dimension)."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=0.0,  # set before every step
        betas=optim.betas,
        eps=optim.eps,
        foreach=True,
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
