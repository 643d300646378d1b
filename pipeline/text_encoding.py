"""One caption as a text encoder gives it.

S prompt tokens, D embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass

from schemas.codec import Tensor


@dataclass(frozen=True)
class TextEncoding:
    """One caption: `prompt_embeds` [S, D] and `prompt_mask` [S] (1 on the caption's own tokens)."""

    tensors: dict[str, Tensor]
    num_tokens: int
    """Of the whole caption with its end token, before any cut."""
    truncated: bool
    """The caption was cut to the encoder's `max_length`."""
