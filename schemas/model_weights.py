"""The weight files of a model folder in the layout of diffusers and transformers, and their digest.

Only safetensors are known: other weight files run code when they are read. The trade-off: a file in the hub's
cache that is called by its sha256 is believed and not hashed, others once (`schemas.digest_cache`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from schemas.digest_cache import SHA256, file_digests
from schemas.errors import ConfigError

VAE_WEIGHTS = "diffusion_pytorch_model"
"""Name of weight files of diffusers' models, without their ends."""


def read_model_json(path: Path, *, key: str) -> dict[str, Any]:
    """A config.json or an index of weights; ConfigError, naming the config's `key`, where it is none."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: {path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{key}: {path}: expected a table of settings, found {type(value).__name__}")
    return value


def weight_files(folder: Path, name: str, *, key: str) -> tuple[Path, ...]:
    """The files called `name` in `folder`, as its index lists them; ConfigError where one is missing."""
    index = folder / f"{name}.safetensors.index.json"
    if index.is_file():
        listed = read_model_json(index, key=key).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise ConfigError(f"{key}: {index} has no weight_map of file names")
        files = [folder / str(file) for file in sorted(set(listed.values()))]
    else:
        files = [folder / f"{name}.safetensors"]
    if missing := [path.name for path in files if not path.is_file()]:
        raise ConfigError(
            f"{key}: {folder} lacks {', '.join(missing[:3])}; expected its weights as safetensors, fetch "
            "them (again)"
        )
    return tuple(files)


def weights_sha256(files: Sequence[Path]) -> str:
    """Of the one file, as the hub names it, or of the list of theirs."""
    named = {path: _blob_name(path) for path in files}
    unnamed = [path for path, name in named.items() if name is None]
    known = named | dict(zip(unnamed, file_digests(unnamed), strict=True))
    if len(files) == 1:
        return str(known[files[0]])
    lines = [f"{known[path]}  {path.name}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _blob_name(path: Path) -> str | None:
    """The sha256 that a file of the hub's cache is called by: there, a name is a link to such a blob."""
    target = path.resolve()
    is_blob = path.is_symlink() and target.parent.name == "blobs" and SHA256.fullmatch(target.name)
    return target.name if is_blob else None
