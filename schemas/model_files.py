"""The files of a model: a hub id or a folder in; its config and the digest of its weights out.

A name that is a folder is one; all others are asked of the hub. The trade-off: what its cache holds whole,
with what it needs of the pipeline around it, is not asked for again, so a branch that moved is noticed only
where a `revision` says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from schemas.errors import ConfigError
from schemas.model_weights import VAE_WEIGHTS, read_model_json, weight_files, weights_sha256


@dataclass(frozen=True)
class ModelFiles:
    """A model on this machine's disk."""

    folder: Path
    """Holds config.json and the weights."""
    config: dict[str, Any] = field(hash=False)
    """Of config.json."""
    weights: tuple[Path, ...]
    """Weight files, in the order of their names."""

    def weights_sha256(self) -> str:
        """Digest of the weights, which are read only where they changed."""
        return weights_sha256(self.weights)


def _nothing_more(folder: Path) -> bool:
    return True


def find_model(
    model: str,
    *,
    subfolder: str,
    key: str,
    revision: str = "",
    weights: str,
    beside: tuple[str, ...] = (),
    has_all: Callable[[Path], bool] = _nothing_more,
) -> ModelFiles:
    """The files of `model`, a hub id or a folder; those in its `subfolder` where it is a whole pipeline.

    `key` is the config's key, for messages; `weights` the name of the weight files without their ends, such
    as `diffusion_pytorch_model`; `beside` patterns of what else to fetch of a pipeline, relative to its root,
    where `has_all` does not say of the model's folder in the hub's cache that what is needed of it is there.
    ConfigError where the model, its config.json or its weights are not to be had.
    """
    root = Path(model).expanduser()
    if not root.is_dir():
        ask = _Wanted(weights, beside, has_all)
        root = _from_hub(model, subfolder, revision=revision, key=key, wanted=ask)
    elif revision:
        raise ConfigError(f"{key} = {model!r} is a folder, and revision = {revision!r} names one of a hub id")
    folders = [root / subfolder, root] if subfolder else [root]
    folder = next((folder for folder in folders if (folder / "config.json").is_file()), None)
    if folder is None:
        places = " nor in ".join(map(repr, map(str, folders)))
        raise ConfigError(
            f"{key} = {model!r}: found no config.json in {places}; name the folder of the model"
        )
    config = read_model_json(folder / "config.json", key=key)
    if weights == VAE_WEIGHTS and "_class_name" not in config and "model_type" in config:
        raise ConfigError(
            f"{key} = {model!r}: expected a VAE in the layout of diffusers, found a "
            f"{config['model_type']!r} of transformers in {str(folder)!r}"
        )
    return ModelFiles(folder, config, weight_files(folder, weights, key=key))


def commit_of(model: str, revision: str) -> str:
    """The commit that a hub id, found before, stands for in this machine's cache; "" for a folder."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    if not model or Path(model).expanduser().is_dir():
        return ""
    repository = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=model, repo_type="model")
    branch = repository / "refs" / (revision or "main")
    return branch.read_text(encoding="ascii") if branch.is_file() else revision


@dataclass(frozen=True)
class _Wanted:
    """As `find_model` has them."""

    weights: str
    beside: tuple[str, ...]
    has_all: Callable[[Path], bool]


def _from_hub(model: str, subfolder: str, *, revision: str, key: str, wanted: _Wanted) -> Path:
    """The folder in the hub's cache that holds a model; fetched where that lacks it."""
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    logging.getLogger("huggingface_hub").setLevel(
        logging.ERROR
    )  # its retries are told in the one sentence below
    prefixes = [f"{subfolder}/", ""] if subfolder else [""]
    at = f" at revision {revision!r}" if revision else ""
    try:
        if cached := _cached(model, prefixes, revision=revision, wanted=wanted):
            return cached
        for prefix in prefixes:
            try:
                hf_hub_download(model, f"{prefix}config.json", revision=revision or None)
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                continue
            ends = ("config.json", f"{wanted.weights}.safetensors*", f"{wanted.weights}-*.safetensors")
            patterns = [*(f"{prefix}{end}" for end in ends), *wanted.beside]
            return Path(snapshot_download(model, revision=revision or None, allow_patterns=patterns))
    except HFValidationError:
        raise ConfigError(
            f"{key} = {model!r}: expected a folder that exists, or a hub id OWNER/NAME"
        ) from None
    except LocalEntryNotFoundError as error:
        raise ConfigError(
            f"{key} = {model!r}{at} is no folder here and not in the hub's cache, and the hub cannot be "
            "reached; give a folder, or run once where it can"
        ) from error
    except OSError as error:  # the hub's own errors are of this kind too
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{key} = {model!r}{at} cannot be fetched from the hub: {text}") from error
    places = " nor ".join(f"{prefix}config.json" for prefix in prefixes)
    raise ConfigError(f"{key} = {model!r}{at}: its repository on the hub has no {places}")


def _cached(model: str, prefixes: list[str], *, revision: str, wanted: _Wanted) -> Path | None:
    """The folder of a model that was fetched before, whole."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    for prefix in prefixes:
        config = f"{prefix}config.json"
        try:
            # Told what it is about, or a snapshot of which a part was fetched counts as none.
            found = snapshot_download(
                model, revision=revision or None, local_files_only=True, allow_patterns=config
            )
            folder = Path(found) / prefix
            if (folder / "config.json").is_file():
                weight_files(folder, wanted.weights, key=model)
                return Path(found) if wanted.has_all(folder) else None
        except (LocalEntryNotFoundError, ConfigError):
            return None
    return None
