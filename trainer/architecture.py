"""What a model is before it has weights: a config and the dataset's shape in; architecture and layout out.

A model is made for the dataset, or found (`trainer.model_folder`) and then held against it and against the
settings: everything in which they differ is named before training starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from schemas.adoption import read_adoptions
from schemas.bucket import PATCH
from schemas.card import Card
from schemas.errors import ConfigError
from schemas.model_files import ModelFiles
from schemas.train_config import ModelConfig
from trainer.catalog import Catalog
from trainer.dit import dit_layout
from trainer.inputs import INPUTS_NAME, check_attention, check_inputs
from trainer.layout import Layout
from trainer.model_folder import Kind, complete, config_of, model_files, schedule_of
from trainer.objective import Schedule

_OWN = ("num_layers", "num_attention_heads", "attention_head_dim", "time_embed_dim")
"""Settings of a model made anew that have its config's names."""


@dataclass(frozen=True)
class Architecture:
    """A transformer before it has weights."""

    kind: Kind
    config: dict[str, Any]
    """`cogvideox`: all arguments of diffusers' CogVideoXTransformer3DModel; `dit`: those of `trainer.dit`."""
    schedule: Schedule
    local_frames: int = 0
    """As `ModelConfig` has it."""
    leading_frames: int = 1
    """As `Layout` has it."""
    long_context: Literal["none", "linear"] = "none"

    def attention(self) -> dict[str, Any]:
        """What tokens attend to, as far as `config` does not say; JSON values."""
        return {name: getattr(self, name) for name in ("local_frames", "leading_frames", "long_context")}

    @property
    def layout(self) -> Layout:
        """The token stream its model takes."""
        config = self.config
        if self.kind == "dit":
            return dit_layout(
                config,
                local_frames=self.local_frames,
                leading_frames=self.leading_frames,
                long_context=self.long_context != "none",
            )
        patch, patch_t = config["patch_size"], config["patch_size_t"]
        heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
        frames = (config["sample_frames"] - 1) // config["temporal_compression_ratio"] + 1
        rotary: Literal["squeezed", "counted"] = "counted" if patch_t else "squeezed"
        return Layout(
            patch=patch,
            patch_t=patch_t or 1,
            in_channels=config["in_channels"],
            out_channels=config["out_channels"],
            head_dim=head_dim,
            width=heads * head_dim,
            positions=rotary if config["use_rotary_positional_embeddings"] else "sincos",
            base=(
                -(-frames // (patch_t or 1)),
                config["sample_height"] // patch,
                config["sample_width"] // patch,
            ),
            max_text=config["max_text_seq_length"],
            spatial_scale=config["spatial_interpolation_scale"],
            temporal_scale=config["temporal_interpolation_scale"],
            learned=config["use_learned_positional_embeddings"],
            image=config["in_channels"] == 2 * config["out_channels"],
            local_frames=self.local_frames,
            leading_frames=self.leading_frames,
            long_context=self.long_context != "none",
        )

    def record(self) -> dict[str, Any]:
        """All of it as JSON, for meta.json."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Architecture:
        """What `record` wrote."""
        return cls(**{**record, "schedule": Schedule(**record["schedule"])})


@dataclass(frozen=True)
class DataShape:
    """What a model must fit, as the dataset has it."""

    latents: tuple[int, int, int, int]
    """T, C, H, W of the largest clip."""
    temporal: int
    """Pixel frames per latent frame."""
    prompt: tuple[int, int]
    """S of the longest prompt, and D."""
    leading_frames: int = 1
    """As `Geometry` has it."""
    card: Card | None = None
    """Of the dataset; without one nothing is known of its encoders."""
    adoptions: Sequence[Mapping[str, Any]] = ()
    """Records of what was adopted since (`schemas.adoption`)."""
    without_images: Sequence[str] = ()
    """Datasets that have no latents of the clip's first frame."""


def data_shape(*catalogs: Catalog) -> DataShape:
    """The largest clip and the longest prompt of datasets that are trained on together."""
    catalog = catalogs[0]
    shapes = np.concatenate([each.shapes for each in catalogs])
    prompts = np.concatenate([each.prompt_shapes for each in catalogs])
    return DataShape(
        latents=tuple(shapes[shapes.prod(1).argmax()].tolist()),
        temporal=catalog.card.geometry.temporal,
        prompt=tuple(prompts[prompts[:, 0].argmax()].tolist()),
        leading_frames=catalog.card.geometry.leading_frames,
        card=catalog.card,
        adoptions=read_adoptions(catalog.dataset),
        without_images=[str(each.dataset) for each in catalogs if each.card.image == "none"],
    )


def architecture(model: ModelConfig, data: DataShape, *, key: str = "model.init") -> Architecture:
    """What `model` describes; ConfigError where it, or what `model.init` names, does not fit the dataset.

    `key` is the setting that `model.init` was taken from, for messages.
    """
    if model.text == "cross" and model.kind == "cogvideox":
        raise ConfigError(
            "model.text = 'cross' is for model.kind = 'dit'; a CogVideoX has text in its stream"
        )
    if model.init == "random":
        config, schedule = complete(_random_config(model, data), model.kind), Schedule()
    else:
        files = model_files(model.init, revision=model.revision, key=key)
        config, schedule = config_of(files, model.kind, key=key), schedule_of(files, key=key)
        _check_fits(config, data, files, key)
        if data.card is not None and (model.kind == "cogvideox" or (files.folder / INPUTS_NAME).is_file()):
            check_inputs(data.card, files.folder, config, adoptions=data.adoptions, key=key)
        _check_unused(model, config, key)
    found = Architecture(
        kind=model.kind,
        config=config,
        schedule=schedule,
        local_frames=model.local_frames,
        leading_frames=data.leading_frames,
        long_context=model.long_context,
    )
    if model.init != "random":
        check_attention(found.attention(), files.folder, key=key)
    _check_settings(found.layout, data)
    return found


def _random_config(model: ModelConfig, data: DataShape) -> dict[str, Any]:
    """Of a model with rotary positions; the base grid of a CogVideoX is the dataset's largest clip."""
    frames, channels, height, width = data.latents
    prompt_tokens, prompt_width = data.prompt
    config = {
        "num_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "attention_head_dim": model.attention_head_dim,
        "time_embed_dim": model.time_embed_dim,
        "in_channels": channels * (1 + model.image_condition),
        "out_channels": channels,
        "text_embed_dim": prompt_width,
        "max_text_seq_length": prompt_tokens,
        "patch_size": PATCH,
    }
    if model.kind == "dit":
        return config | {"patch_size_t": model.patch_size_t, "text": model.text}
    return config | {
        "sample_frames": (frames - 1) * data.temporal + 1,
        "sample_height": height,
        "sample_width": width,
        "temporal_compression_ratio": data.temporal,
        "patch_size_t": model.patch_size_t if model.patch_size_t > 1 else None,
        "use_rotary_positional_embeddings": True,
    }


def _check_fits(config: Mapping[str, Any], data: DataShape, files: ModelFiles, key: str) -> None:
    channels, (tokens, width) = data.latents[1], data.prompt
    name = "out_channels" if config["in_channels"] == 2 * config["out_channels"] else "in_channels"
    checks = [
        (name, config[name], channels, "latent channels"),
        ("text_embed_dim", config["text_embed_dim"], width, "prompt width"),
        ("patch_size", config["patch_size"], PATCH, "patch the dataset's tokens are counted with"),
        (
            "temporal_compression_ratio",
            config.get("temporal_compression_ratio", data.temporal),
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
        raise ConfigError(f"{key} = {str(files.folder)!r} does not fit the dataset: {'; '.join(wrong)}")


def _check_unused(model: ModelConfig, config: Mapping[str, Any], key: str) -> None:
    """ConfigError where settings of a model made anew ask for another one than was found."""
    found = {
        **{name: config[name] for name in _OWN},
        "patch_size_t": config["patch_size_t"] or 1,
        "image_condition": config["in_channels"] == 2 * config["out_channels"],
        "text": config.get("text", "joint"),
    }
    wrong = [
        f"model.{name} = {asked!r}, it has {found[name]!r}"
        for name in found
        if (asked := getattr(model, name)) not in (found[name], ModelConfig.model_fields[name].default)
    ]
    if wrong:
        raise ConfigError(
            f"{key} = {model.init!r} brings a config of its own, which these settings would not change: "
            f"{'; '.join(wrong)}; remove them, or set {key} = 'random'"
        )


def _check_settings(layout: Layout, data: DataShape) -> None:
    if layout.local_frames % layout.patch_t:
        raise ConfigError(
            f"model.local_frames = {layout.local_frames}: expected a multiple of {layout.patch_t}, the "
            "latent frames of a token"
        )
    if layout.learned and layout.local_frames:
        raise ConfigError(
            "model.local_frames: this model has learned positions for whole clips; leave local_frames = 0"
        )
    if layout.image and data.without_images:
        raise ConfigError(
            f"this model is given the clip's first frame, and {', '.join(data.without_images)} has no "
            "latents of it: preprocess with video_encoder.image_latents = true"
        )
