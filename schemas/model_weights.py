"""The weight files of a model folder in the layout of diffusers and transformers, and their digest.

Only safetensors are known: other weight files run code when they are read. The trade-off: a file in the hub's
cache that is called by its sha256 is believed and not hashed again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from schemas.errors import ConfigError

VAE_WEIGHTS = "diffusion_pytorch_model"
"""Name of weight files of diffusers' models, without their ends."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


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
    digests = [_sha256(path) for path in files]
    if len(digests) == 1:
        return digests[0]
    lines = [f"{digest}  {path.name}\n" for digest, path in zip(digests, files, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _sha256(path: Path) -> str:
    target = path.resolve()
    # The hub's cache links a name to a blob that is called by its sha256.
    if path.is_symlink() and target.parent.name == "blobs" and _SHA256.fullmatch(target.name):
        return target.name
    state = target.stat()
    return _hashed(target, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _hashed(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
