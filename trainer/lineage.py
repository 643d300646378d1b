"""Where a stage's first weights come from when a stage was before it: its checkpoint in, a filled model out.

Weights pass from stage to stage strictly: names and shapes must be the model's, with one named exception.
Adapters go on where the new stage has the same ones; otherwise they are merged into the matrices they stand
beside, and adapters of the new stage start without effect. Optimizer moments do not pass.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from schemas.errors import ConfigError
from schemas.train_config import LoraConfig
from trainer.checkpoint import Saved, read_metadata, read_state
from trainer.lora import ADAPTER, adapted_layers, adapter_scales, lora_scale, merged_delta
from trainer.sharding import local_part
from trainer.weights import random_value

Shape = tuple[int, ...]


def saved_lora(saved: Saved) -> LoraConfig | None:
    """The adapters of a checkpoint."""
    lora = saved.meta["lora"]
    return LoraConfig.model_validate(lora) if lora else None


def saved_shapes(saved: Saved) -> dict[str, Shape]:
    """Names and shapes of a checkpoint's weights."""
    entries = read_metadata(saved).state_dict_metadata
    return {
        name.removeprefix("model."): tuple(entry.size)
        for name, entry in entries.items()
        if name.startswith("model.") and isinstance(entry, TensorStorageMetadata)
    }


def load_weights(saved: Saved, model: nn.Module, *, seed: int) -> list[str]:
    """Fill a sharded model that has memory with the weights of `saved`; returns lines on what changed.

    All ranks call it. ConfigError where weights other than adapters differ in name or shape; then nothing is
    loaded.
    """
    state: dict[str, torch.Tensor] = model.state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    found = saved_shapes(saved)
    check_same(_without_adapters(shapes), _without_adapters(found), where=str(saved.path))
    before, now = adapted_layers(found), adapted_layers(shapes)
    lora = saved_lora(saved)
    scale = lora_scale(lora) if lora else 1.0
    same = (
        before == now
        and all(shapes[name] == found[name] for name in found if ADAPTER.search(name))
        and all(each == scale for each in adapter_scales(model).values())
    )
    wanted = state if same else {name: state[name] for name in _without_adapters(shapes)}
    old = {} if same else {name: torch.empty(found[name]) for name in found if ADAPTER.search(name)}
    read_state(saved, {"model": wanted | old})
    if same:
        return []
    lines = []
    with torch.no_grad():
        for layer in before:
            weight = state[f"{layer}.weight"]
            local, slices = local_part(weight)
            local += merged_delta(old, layer, scale=scale)[slices].to(local.device)
        if before:
            lines.append(f"adapters of stage {saved.meta['stage']} merged into {len(before)} layers")
        for name in shapes.keys() - wanted.keys():
            local, slices = local_part(state[name])
            local.copy_(random_value(name, shapes[name], seed=seed)[slices])
        if now:
            lines.append(f"new adapters beside {len(now)} layers")
    return lines


def check_same(expected: dict[str, Shape], found: dict[str, Shape], *, where: str) -> None:
    """ConfigError naming what is missing, unknown or of another shape."""
    shapes = [
        f"{name}: expected {expected[name]}, found {found[name]}"
        for name in sorted(expected.keys() & found.keys())
        if expected[name] != found[name]
    ]
    unknown = [f"{name} is unknown to this model" for name in sorted(found.keys() - expected.keys())]
    missing = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    problems = shapes + unknown + missing
    if problems:
        raise ConfigError(
            f"{where} does not hold the weights of this model ({len(problems)} differences): "
            + "; ".join(problems[:5])
        )


def _without_adapters(shapes: dict[str, Shape]) -> dict[str, Shape]:
    return {name: shape for name, shape in shapes.items() if not ADAPTER.search(name)}
