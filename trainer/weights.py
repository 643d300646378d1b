"""Where a model comes from: a config in; its architecture, noise schedule and initial values out.

`random` draws every parameter from a generator keyed by seed and name; a folder in the diffusers
layout is read slice by slice and strictly. Either way a rank reads what it holds only. A full tensor
is drawn even where a rank keeps a slice of it: slower for large models, equal for all world sizes.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel
from safetensors import SafetensorError, safe_open
from torch import nn

from schemas.adoption import read_adoptions
from schemas.bucket import PATCH
from schemas.card import Card
from schemas.errors import ConfigError
from schemas.train_config import ModelConfig
from trainer.catalog import Catalog
from trainer.inputs import check_inputs
from trainer.objective import Schedule, read_json, read_schedule
from trainer.order import keyed_generator
from trainer.parallel import ReadSlice, Slices

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Architecture:
    """A transformer before it has weights."""

    config: dict[str, Any]
    """Arguments of diffusers' CogVideoXTransformer3DModel."""
    schedule: Schedule


@dataclass(frozen=True)
class DataShape:
    """What a model must fit, as the dataset has it."""

    latents: tuple[int, int, int, int]
    """T, C, H, W of the largest clip."""
    temporal: int
    """Pixel frames per latent frame."""
    prompt: tuple[int, int]
    """S of the longest prompt, and D."""
    card: Card | None = None
    """Of the dataset; without one nothing is known of its encoders."""
    adoptions: Sequence[Mapping[str, Any]] = ()
    """Records of what was adopted since (`schemas.adoption`)."""


def data_shape(catalog: Catalog) -> DataShape:
    """The largest clip and the longest prompt of a dataset."""
    frames, channels, height, width = catalog.shapes[catalog.shapes.prod(1).argmax()].tolist()
    tokens, embed_width = catalog.prompt_shapes[catalog.prompt_shapes[:, 0].argmax()].tolist()
    return DataShape(
        latents=(frames, channels, height, width),
        temporal=catalog.card.geometry.temporal,
        prompt=(tokens, embed_width),
        card=catalog.card,
        adoptions=read_adoptions(catalog.dataset),
    )


def architecture(model: ModelConfig, data: DataShape) -> Architecture:
    """What `model` describes; ConfigError where its folder does not fit the dataset."""
    if model.init == "random":
        return Architecture(_complete(_random_config(model, data)), Schedule())
    folder = _transformer_folder(model.init)
    config = _complete(read_json(folder / "config.json"))
    _check_fits(config, data, folder)
    if data.card is not None:
        check_inputs(data.card, folder, config, adoptions=data.adoptions)
    for scheduler in (folder / "scheduler", folder.parent / "scheduler"):
        if (path := scheduler / "scheduler_config.json").is_file():
            return Architecture(config, read_schedule(path))
    # The published models without rotary positions, the 2B family, are trained with the shifted schedule.
    rotary = config["use_rotary_positional_embeddings"]
    return Architecture(config, Schedule() if rotary else Schedule(snr_shift_scale=3.0))


def initial_values(init: str, model: nn.Module, *, seed: int) -> ReadSlice:
    """The reader of first weights; ConfigError where a folder's names or shapes differ from `model`'s."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if init != "random":
        return _folder_values(_transformer_folder(init), shapes)

    def read(name: str, slices: Slices) -> torch.Tensor:
        return _random_value(name, shapes[name], seed=seed)[slices]

    return read


def _random_config(model: ModelConfig, data: DataShape) -> dict[str, Any]:
    """A CogVideoX of version 1.0 with rotary positions, whose base grid is the dataset's largest clip."""
    frames, channels, height, width = data.latents
    prompt_tokens, prompt_width = data.prompt
    return {
        "num_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "attention_head_dim": model.attention_head_dim,
        "time_embed_dim": model.time_embed_dim,
        "in_channels": channels,
        "out_channels": channels,
        "text_embed_dim": prompt_width,
        "max_text_seq_length": prompt_tokens,
        "sample_frames": (frames - 1) * data.temporal + 1,
        "sample_height": height,
        "sample_width": width,
        "temporal_compression_ratio": data.temporal,
        "patch_size": PATCH,
        "use_rotary_positional_embeddings": True,
    }


def _complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with diffusers' defaults filled in, so that a checkpoint says all of it."""
    parameters = inspect.signature(CogVideoXTransformer3DModel.__init__).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items() if name != "self"}
    given = {name: value for name, value in config.items() if not name.startswith("_")}
    if unknown := sorted(given.keys() - defaults.keys()):
        raise ConfigError(
            f"model.init: config.json has keys that CogVideoXTransformer3DModel of diffusers "
            f"{diffusers.__version__} does not know: {', '.join(unknown)}"
        )
    wrong = [
        f"{name} = {value!r}, expected one like {defaults[name]!r}"
        for name, value in given.items()
        if not _like(value, defaults[name])
    ]
    if wrong:
        raise ConfigError(f"model.init: config.json has values of other types: {'; '.join(wrong)}")
    return defaults | given


def _like(value: Any, default: Any) -> bool:
    """Whether a config's value has the type of diffusers' default; None stands for an optional integer."""
    if default is None:
        return value is None or type(value) is int
    return type(value) is type(default) or (type(default) is float and type(value) is int)


def _random_value(name: str, shape: tuple[int, ...], *, seed: int) -> torch.Tensor:
    """Norms start as identity, biases at 0; modulation and the last layer too, as in DiT's adaLN-Zero.

    Every block then passes its input on and the first prediction is 0 (https://arxiv.org/abs/2212.09748).
    """
    if len(shape) == 1:
        return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    if re.search(r"norm\w*\.linear\.|^proj_out\.", name):
        return torch.zeros(shape)
    fan_in = math.prod(shape[1:])
    return torch.randn(shape, generator=keyed_generator(seed, "init", name)) / math.sqrt(fan_in)


def _transformer_folder(init: str) -> Path:
    """The folder that holds the transformer: `init` itself, or its `transformer` (a whole pipeline)."""
    for folder in (Path(init), Path(init) / "transformer"):
        if (folder / "config.json").is_file():
            return folder
    raise ConfigError(
        f"model.init = {init!r}: expected 'random' or a folder in the diffusers layout; "
        f"found no config.json in it or in its folder `transformer`"
    )


def _check_fits(config: Mapping[str, Any], data: DataShape, folder: Path) -> None:
    channels, (tokens, width) = data.latents[1], data.prompt
    checks = [
        ("in_channels", config["in_channels"], channels, "latent channels"),
        ("text_embed_dim", config["text_embed_dim"], width, "prompt width"),
        ("patch_size", config["patch_size"], PATCH, "patch the dataset's tokens are counted with"),
        (
            "temporal_compression_ratio",
            config["temporal_compression_ratio"],
            data.temporal,
            "pixel frames per latent frame",
        ),
    ]
    wrong = [
        f"{name} = {found}, the dataset has {want} ({what})"
        for name, found, want, what in checks
        if found != want
    ]
    if tokens > (limit := config["max_text_seq_length"]):
        wrong.append(f"max_text_seq_length = {limit}, the dataset's longest prompt has {tokens} tokens")
    if wrong:
        raise ConfigError(f"model.init = {str(folder)!r} does not fit the dataset: {'; '.join(wrong)}")


def _folder_values(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> ReadSlice:
    index = folder / f"{WEIGHTS_NAME}.index.json"
    names = _indexed(index) if index.is_file() else [WEIGHTS_NAME]
    files: dict[str, Any] = {}
    for path in (folder / name for name in names):
        if not path.is_file():
            raise ConfigError(f"model.init: {path} does not exist")
        try:
            handle = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"model.init: {path} cannot be read: {error}; fetch it again") from error
        files |= dict.fromkeys(handle.keys(), handle)
    problems = [f"{name} is missing" for name in shapes.keys() - files.keys()]
    problems += [f"{name} is unknown to this architecture" for name in files.keys() - shapes.keys()]
    for name in shapes.keys() & files.keys():
        found = tuple(files[name].get_slice(name).get_shape())
        if found != shapes[name]:
            problems.append(f"{name}: expected {shapes[name]}, found {found}")
    if problems:
        raise ConfigError(
            f"model.init: the weights in {folder} are not those its config.json describes "
            f"({len(problems)} differences): {'; '.join(sorted(problems)[:5])}"
        )

    def read(name: str, slices: Slices) -> torch.Tensor:
        values: torch.Tensor = files[name].get_slice(name)[slices]
        return values

    return read


def _indexed(index: Path) -> list[str]:
    """Names of the weight files of an index."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ConfigError(f"model.init: {index} has no weight_map of file names")
    return sorted(set(names.values()))
