"""Low-rank adapters beside linear layers: a model and targets in, the model with small matrices more out.

`y = W x + scale * B (A x)` (https://arxiv.org/abs/2106.09685), with B = 0 at first. A layer keeps its own
names and gains `lora_A.weight` [rank, in] and `lora_B.weight` [out, rank], which is how diffusers and peft
call them. Merged they are one matrix again: `W + scale * B A`. Where ranks share W, its output's rows are B's
and its input's columns are A's; the other of the two is whole on every rank, and multiplied there again.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor, Partial

from schemas.errors import ConfigError
from schemas.train_config import LoraConfig

LORA_NAME = "pytorch_lora_weights.safetensors"
"""The file of adapters in a folder, as diffusers calls it."""
ADAPTER = re.compile(r"\.lora_[AB]\.weight$")
"""Found in the names of adapters' parameters, and in no others."""


class LoraLinear(nn.Linear):
    """A linear layer with an adapter; made of an nn.Linear in place."""

    lora_A: nn.Linear
    lora_B: nn.Linear
    lora_scale: float

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        out = super().forward(input)
        x, a, b = (_local(value) for value in (input, self.lora_A.weight, self.lora_B.weight))
        added = F.linear(F.linear(x, a), b) * self.lora_scale
        if isinstance(out, DTensor):
            # Cut or summed up over ranks as the layer's own is: the adapter adds nothing to what they trade.
            added = DTensor.from_local(added, out.device_mesh, out.placements, run_check=False)
        return out + added


def _local(value: torch.Tensor) -> torch.Tensor:
    """This rank's part. Of what every rank has whole, each has a part of the gradient."""
    if not isinstance(value, DTensor):
        return value
    return value.to_local(grad_placements=[Partial() if p.is_replicate() else p for p in value.placements])


def lora_scale(lora: LoraConfig) -> float:
    """What an adapter's output is multiplied with: alpha / rank."""
    return 1.0 if lora.alpha is None else lora.alpha / lora.rank


def add_adapters(model: nn.Module, lora: LoraConfig) -> list[str]:
    """Give the targeted layers of `model` their adapters, without values; returns their names.

    Before sharding. ConfigError where a target finds no layer, or one that is not called as a layer.
    """
    linears = {
        name: module
        for name, module in model.named_modules()
        # Layers of long context are new and trained whole; the patch embedding is used as a matrix.
        if isinstance(module, nn.Linear) and not re.search(r"(^|\.)long_context\.|^patch_embed\.proj$", name)
    }
    names: set[str] = set()
    for i, target in enumerate(lora.targets):
        found = {name for name in linears if any(re.fullmatch(target, end) for end in _ends(name))}
        if not found:
            ends = dict.fromkeys(re.sub(r"^transformer_blocks\.\d+\.", "", name) for name in linears)
            close = difflib.get_close_matches(target.replace("\\", ""), ends, n=3, cutoff=0.0)
            raise ConfigError(
                f"lora.targets.{i} = {target!r} is the end of no name of a linear layer that can have an "
                f"adapter; the closest names are {', '.join(close)}"
            )
        names |= found
    for name in sorted(names):
        linear = linears[name]
        device = linear.weight.device
        linear.__class__ = LoraLinear
        assert isinstance(linear, LoraLinear)
        linear.lora_A = nn.Linear(linear.in_features, lora.rank, bias=False, device=device)
        linear.lora_B = nn.Linear(lora.rank, linear.out_features, bias=False, device=device)
        linear.lora_scale = lora_scale(lora)
    return sorted(names)


def _ends(name: str) -> list[str]:
    """`a.b.c`, `b.c`, `c`."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def adapter_scales(model: nn.Module) -> dict[str, float]:
    """Name of each layer with an adapter -> its scale."""
    return {
        name: module.lora_scale for name, module in model.named_modules() if isinstance(module, LoraLinear)
    }


def adapted_layers(names: Mapping[str, object]) -> list[str]:
    """Layers that have an adapter among parameters of these names."""
    return sorted({ADAPTER.sub("", name) for name in names if ADAPTER.search(name)})


def merged_delta(values: Mapping[str, torch.Tensor], layer: str, *, scale: float) -> torch.Tensor:
    """[out, in] float32, what merging adds to the weight of `layer`.

    Summed in float64: then it is the same number however a weight is cut over ranks.
    """
    a, b = (values[f"{layer}.lora_{part}.weight"].double() for part in "AB")
    return (b @ a * scale).float()
