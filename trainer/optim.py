"""The optimizer and what it may change: regexes and named groups in; AdamW over parameter groups out.

The `foreach` implementation is used on every device: it takes sharded parameters, and repeats bit for
bit. (`fused` is quicker on GPUs; its share of a step is small while the model is sharded.)
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

import torch
from torch import nn

from schemas.errors import ConfigError
from schemas.train_config import LrConfig, OptimConfig, StageConfig
from trainer.curriculum import lr_at
from trainer.lora import ADAPTER

GROUPS = {
    "@attention": r"\.attn1\.(to_[qkv]|to_out\.0|norm_[qk])\.(weight|bias)$",
    "@cross_attention": r"\.(cross|norm_cross)\.",
    "@feed_forward": r"\.ff\.",
    "@norms": r"(^|\.)(?<!long_context\.)(norm_(q|k|final|cross)|norm\w*\.norm)\.(weight|bias)$",
    "@modulation": r"(^|\.)norm\w*\.linear\.|^(time|ofs)_embedding\.",
    "@long_context": r"\.long_context\.",
    "@projector": r"^(patch_embed\.text_proj|text_projector)\.",
    "@patches": r"^patch_embed\.(proj\.)?(weight|bias)$|^proj_out\.",
    "@lora": ADAPTER.pattern,
}
"""What a name in `trainable` and `lr.groups` stands for, in both kinds of model.

`@attention`: queries, keys, values and output of attention within spans, and the norms of its queries and
keys, without adapters; `@projector`: what brings prompts to the model's width; `@patches`: what takes patches
in and gives them out; `@modulation`: what the timestep works through.
"""


def set_trainable(model: nn.Module, stage: StageConfig) -> list[str]:
    """Freeze every parameter but those of `stage`; returns a table of what each pattern trains.

    Before sharding: FSDP keeps frozen parameters out of the gradient reduction. With `stage.lora` that is the
    adapters, and what `trainable` names besides. ConfigError where a pattern matches nothing.
    """
    parameters = dict(model.named_parameters())
    patterns = [("trainable", i, pattern) for i, pattern in enumerate(stage.trainable)]
    if stage.lora:
        patterns.append(("lora", 0, "@lora"))
    found = {pattern: matching(pattern, parameters, key=f"{key}.{i}") for key, i, pattern in patterns}
    trainable = {name for names in found.values() for name in names} if patterns else set(parameters)
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trainable)
    rows = {**found, "trained": sorted(trainable), "all": list(parameters)}
    width = max(map(len, [*rows, *GROUPS]))  # the same for all stages
    counts = {title: sum(parameters[name].numel() for name in names) for title, names in rows.items()}
    return [
        f"{title:{width}}  {len(names):6d} tensors  {counts[title]:14,d} parameters"
        for title, names in rows.items()
    ]


def matching(pattern: str, names: Iterable[str], *, key: str, what: str = "parameter") -> list[str]:
    """The names that a regex is found in, or that a named group has; ConfigError where there are none."""
    names = list(names)
    if pattern.startswith("@") and pattern not in GROUPS:
        close = difflib.get_close_matches(pattern, GROUPS, n=1, cutoff=0.0)
        raise ConfigError(
            f"{key} = {pattern!r} is no named group; the closest is {close[0]}, all are {', '.join(GROUPS)}"
        )
    regex = re.compile(GROUPS.get(pattern, pattern))
    matched = [name for name in names if regex.search(name)]
    if not matched:
        if pattern in GROUPS:
            others = [group for group, each in GROUPS.items() if any(re.search(each, name) for name in names)]
            hint = f"groups that do are {', '.join(others)}"
        else:
            close = difflib.get_close_matches(pattern.replace("\\", ""), names, n=3, cutoff=0.0)
            hint = f"the closest names are {', '.join(close)}"
        raise ConfigError(f"{key} = {pattern!r} matches no {what} of the model; {hint}")
    return matched


def make_optimizer(model: nn.Module, optim: OptimConfig, lr: LrConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; no weight decay on biases and norms (one dimension).

    A parameter belongs to the first of `lr.groups` that finds it. ConfigError where one finds nothing that is
    trained.
    """
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    group_of: dict[str, int] = {}
    for i, group in enumerate(lr.groups):
        for name in matching(group.match, parameters, key=f"lr.groups.{i}.match", what="trained parameter"):
            group_of.setdefault(name, i)
    split: dict[tuple[int | None, bool], list[nn.Parameter]] = {}
    for name, value in parameters.items():
        split.setdefault((group_of.get(name), value.ndim > 1), []).append(value)
    return torch.optim.AdamW(
        [
            {"params": values, "weight_decay": optim.weight_decay if decays else 0.0, "group": group}
            for (group, decays), values in split.items()
        ],
        lr=0.0,  # set before every step
        betas=optim.betas,
        eps=optim.eps,
        foreach=True,
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: LrConfig, *, step_in_stage: int, steps: int) -> float:
    """Give every group the rate of this step; returns that of parameters in none of `lr.groups`."""
    for group in optimizer.param_groups:
        own = None if group["group"] is None else lr.groups[group["group"]]
        group["lr"] = lr_at(step_in_stage, lr, steps=steps, group=own)
    return lr_at(step_in_stage, lr, steps=steps)
