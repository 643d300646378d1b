"""First weights of a model: where they come from in; a reader of slices out.

`random` draws every parameter from a generator keyed by seed and name; a folder or a hub id in the diffusers
layout is read slice by slice and strictly, buffers too. Either way a rank reads what it holds only. A full
tensor is drawn even where a rank keeps a slice of it: slower for large models, equal for all world sizes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from schemas.errors import ConfigError
from schemas.model_files import ModelFiles
from trainer.model_folder import model_files
from trainer.order import keyed_generator
from trainer.sharding import ReadSlice, Slices

_ADDED = re.compile(r"\.(long_context|lora_[AB])\.")
"""Parameters that are beside those of published models: drawn where given weights have none of that part."""


def initial_values(
    init: str, model: nn.Module, *, seed: int, revision: str = "", key: str = "model.init"
) -> ReadSlice:
    """The reader of first weights, and of buffers that are kept with them, by their names in `model`.

    `init` and `revision` as in `ModelConfig`; `key` is the setting that `init` is of, for messages.
    ConfigError where names or shapes of given weights differ from the model's.
    """
    shapes = _shapes(model)

    def draw(name: str, slices: Slices) -> torch.Tensor:
        return random_value(name, shapes[name], seed=seed)[slices]

    tensors, drawn = _given(init, shapes, revision, key)

    def read(name: str, slices: Slices) -> torch.Tensor:
        if name in drawn:
            return draw(name, slices)
        values: torch.Tensor = tensors[name].get_slice(name)[slices]
        return values

    return read


def drawn_names(init: str, model: nn.Module, *, revision: str = "", key: str = "model.init") -> set[str]:
    """What `initial_values` draws, of `model`'s; the same errors, without reading a value."""
    return _given(init, _shapes(model), revision, key)[1]


def random_value(name: str, shape: tuple[int, ...], *, seed: int) -> torch.Tensor:
    """Norms start as identity, biases at 0; modulation and the last layer too, as in DiT's adaLN-Zero.

    Every block then passes its input on and the first prediction is 0 (https://arxiv.org/abs/2212.09748).
    What is beside a block's own layers starts without effect: cross attention as in PixArt
    (https://arxiv.org/abs/2310.00426), adapters as in LoRA, long context by its gate.
    """
    if len(shape) == 1:
        return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    if re.search(r"\.lora_B\.|^(?!.*\.lora_A\.)(.*norm\w*\.linear\.|proj_out\.|.*\.cross\.to_out\.)", name):
        return torch.zeros(shape)
    fan_in = math.prod(shape[1:])
    return torch.randn(shape, generator=keyed_generator(seed, "init", name)) / math.sqrt(fan_in)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _given(
    init: str, shapes: Mapping[str, tuple[int, ...]], revision: str, key: str
) -> tuple[dict[str, Any], set[str]]:
    """Name -> the open file that holds the tensor; and the names of those that are drawn instead."""
    if init == "random":
        return {}, set(shapes)
    tensors = _tensors(model_files(init, revision=revision, key=key), key)
    known = {part[1] for name in tensors if (part := _ADDED.search(name))}
    drawn = {name for name in shapes if (part := _ADDED.search(name)) and part[1] not in known}
    _check_names(tensors, {name: shape for name, shape in shapes.items() if name not in drawn}, init, key)
    return tensors, drawn


def _tensors(files: ModelFiles, key: str) -> dict[str, Any]:
    """Name -> the open file that holds the tensor."""
    found: dict[str, Any] = {}
    for path in files.weights:
        try:
            handle = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{key}: {path} cannot be read: {error}; fetch it again") from error
        found |= dict.fromkeys(handle.keys(), handle)
    return found


def _check_names(
    tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], init: str, key: str
) -> None:
    problems = [f"{name} is missing" for name in shapes.keys() - tensors.keys()]
    problems += [f"{name} is unknown to this architecture" for name in tensors.keys() - shapes.keys()]
    for name in shapes.keys() & tensors.keys():
        found = tuple(tensors[name].get_slice(name).get_shape())
        if found != shapes[name]:
            problems.append(f"{name}: expected {shapes[name]}, found {found}")
    if problems:
        raise ConfigError(
            f"{key}: the weights in {init} are not those its config.json describes "
            f"({len(problems)} differences): {'; '.join(sorted(problems)[:5])}"
        )
