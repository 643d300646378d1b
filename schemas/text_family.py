"""What each video model expects of its prompt embeddings: the conventions of diffusers' pipelines, as data.

In: the name of a family. Out: how its T5 is run, and what its transformer is given in place of pad tokens.
Writer and reader both follow it, so it is here; how captions are cleaned is `pipeline.prompt_cleaning`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FamilyName = Literal["cogvideox", "wan", "ltx", "mochi", "allegro", "cosmos"]


@dataclass(frozen=True)
class TextFamily:
    """One convention; its source is the pipeline of that name in diffusers."""

    max_length: int
    """Tokens that every caption is padded or cut to."""
    masked: bool
    """The text encoder is given the attention mask. Otherwise the pad tokens change all other rows."""
    pad_rows: Literal["encoded", "zeros", "masked"]
    """What the transformer is given in the rows of pad tokens: what the encoder made of them, zeros, or
    anything, since a mask hides them."""

    @property
    def trims(self) -> bool:
        """Whether nothing is lost with the pad rows."""
        return self.pad_rows != "encoded"


FAMILIES: dict[FamilyName, TextFamily] = {
    "cogvideox": TextFamily(226, masked=False, pad_rows="encoded"),
    "wan": TextFamily(512, masked=True, pad_rows="zeros"),
    "ltx": TextFamily(128, masked=False, pad_rows="masked"),
    "mochi": TextFamily(256, masked=True, pad_rows="masked"),
    "allegro": TextFamily(512, masked=True, pad_rows="masked"),
    "cosmos": TextFamily(512, masked=True, pad_rows="zeros"),
}
