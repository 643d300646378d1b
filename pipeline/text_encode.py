"""Text encoders behind one interface: captions in, prompt embeddings [S, D] out.

`tiny-t5` needs no files and gives the same bytes everywhere; `t5` runs published weights as the pipelines of
diffusers do.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from pipeline.t5 import T5
from pipeline.text_encoding import TextEncoding
from pipeline.tiny_t5 import TinyT5
from schemas.config import TextEncoderConfig


class TextEncoder(Protocol):
    """Captions to prompt embeddings."""

    name: str

    def hard_fields(self) -> dict[str, Any]:
        """JSON values of everything, beyond the config, that changes the numbers; loads no weights."""

    def check(self) -> None:
        """See that captions can be tokenized here: ConfigError or MissingExtraError where they cannot."""

    def row_bytes(self) -> int:
        """Bytes that one prompt token takes in a shard: a row of `prompt_embeds` and one of `prompt_mask`."""

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        """Of each whole caption with its end token, before any cut; loads no weights."""

    def load(self) -> None:
        """Build the model now instead of at the first `encode`."""

    def batch_size(self) -> int:
        """Captions to give to `encode` at once, where memory allows."""

    def encode(self, captions: Sequence[str]) -> list[TextEncoding]:
        """One encoding per caption, in order. Out of memory is raised."""


def is_at_hand(config: TextEncoderConfig) -> bool:
    """Whether `load_text_encoder` has nothing to fetch from the hub but what a broken download left out."""
    if config.kind != "t5" or Path(config.model).expanduser().is_dir():
        return True
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    names = {f"{config.subfolder}/config.json", "config.json"}
    try:
        found = [
            try_to_load_from_cache(config.model, name, revision=config.revision or None) for name in names
        ]
    except HFValidationError:  # no hub id: loading says so
        return True
    return any(isinstance(path, str) for path in found)


def load_text_encoder(config: TextEncoderConfig) -> TextEncoder:
    """The encoder a config names; the model itself is made at the first `encode`. ConfigError where the
    files of it or of its tokenizer are not to be had."""
    if config.kind == "t5":
        return T5(config)
    return TinyT5(max_length=config.max_length, padding=config.padding)
