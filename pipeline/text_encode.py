"""Text encoders behind one interface: captions in, prompt embeddings [S, D] out.

`tiny-t5` needs no files and gives the same bytes everywhere; `t5` runs published weights as the pipelines of
diffusers do.
"""

from __future__ import annotations

from collections.abc import Sequence
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

    def load(self) -> None:
        """Build the model now instead of at the first `encode`."""

    def batch_size(self) -> int:
        """Captions to give to `encode` at once, where memory allows."""

    def encode(self, captions: Sequence[str]) -> list[TextEncoding]:
        """One encoding per caption, in order. Out of memory is raised."""


def load_text_encoder(config: TextEncoderConfig) -> TextEncoder:
    """The encoder a config names; the model itself is made at the first `encode`. ConfigError where the
    files of it or of its tokenizer are not to be had."""
    if config.kind == "t5":
        return T5(config)
    return TinyT5(max_length=config.max_length, padding=config.padding)
