"""What every reader of a foreign cache gives: which clips there are, their latents, their prompts.

In: the folder another trainer wrote. Out: plain records, and tensors laid out our way. A reader knows the
layout and the meaning that its trainer's source code fixes, and nothing else: what a cache leaves open comes
from the VAE the user names. Tensors are mapped from their files, so looking at a shape reads no payload.

T latent frames, C latent channels, K stored channels (C, or 2 C for moments), H, W latent cells, S prompt
tokens, D embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from schemas.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from pipeline.imports.files import CacheFile


COGVIDEOX, HUNYUANVIDEO = "AutoencoderKLCogVideoX", "AutoencoderKLHunyuanVideo"
LTX, WAN = "AutoencoderKLLTXVideo", "AutoencoderKLWan"
"""Classes of diffusers whose latents these trainers cache."""


@dataclass(frozen=True)
class CachedClip:
    """One clip of a cache and the caption it was trained with."""

    path: Path
    """File of its latents."""
    prompt: tuple[Path, ...]
    """Files of its prompt embeddings; several are segments of one clip, in order."""
    caption: str | None
    """None where the cache holds no captions."""
    num_frames: tuple[int, ...] = ()
    """Pixel frames it may have, as the cache says; empty where it does not say."""
    pixels: tuple[int, int] | None = None
    """Height and width in pixels, where the cache says."""


@dataclass(frozen=True)
class CachedLatents:
    """Latents of one clip, time-major."""

    values: torch.Tensor
    """[T, K, H, W]; of moments, mean first."""
    stated: tuple[list[float], list[float]] | None = None
    """Mean and standard deviation by channel, where the file itself names those of its VAE."""


@dataclass(frozen=True)
class CachedPrompt:
    """Prompt embeddings of one clip."""

    embeds: torch.Tensor
    """[S, D]"""
    mask: torch.Tensor | None
    """[S], 1 on the tokens that count; None where the cache has none: all rows count."""
    segments: tuple[int, ...]
    """Rows of each segment; they add up to S."""


@dataclass(frozen=True)
class Vae:
    """What a reader may need to know of the VAE behind a cache."""

    kind: str
    """Its diffusers class."""
    channels: int

    def require(self, *kinds: str, made: str) -> None:
        """ConfigError where it is of none of these classes; `made` says what they are the classes of."""
        if self.kind not in kinds:
            raise ConfigError(
                f"--vae is an {self.kind}, and {made} with an {' or '.join(kinds)}: give the VAE it is of"
            )


@dataclass(frozen=True)
class Listing:
    """What a cache holds."""

    clips: list[CachedClip]
    empty_prompt: tuple[Path, ...] = ()
    """Embeddings of the empty caption."""
    says: Mapping[str, Any] = field(default_factory=dict)
    """What its names and metadata tell of how it was made; goes into the card."""
    notes: tuple[str, ...] = ()
    """What a person should know, one sentence each."""


class Cache(Protocol):
    """A reader of one format."""

    @property
    def scaled(self) -> bool:
        """Whether latents were scaled for the transformer before they were saved."""

    @property
    def single(self) -> Literal["sample", "mean"]:
        """What latents of C channels are."""

    @property
    def padding(self) -> Literal["full", "trim"]:
        """Whether prompts kept their pad rows."""

    @property
    def text_family(self) -> Literal["cogvideox", "wan"]:
        """Whose convention the text encoder was run by: `cogvideox` unmasked, `wan` masked."""

    def listing(self) -> Listing:
        """Every clip, in a fixed order; ConfigError where pairing with captions cannot be known."""

    def latents(self, file: CacheFile) -> CachedLatents:
        """ConfigError for keys or shapes this trainer never writes."""

    def prompt(self, files: list[CacheFile]) -> CachedPrompt:
        """As `latents`."""


def refused(path: Path, found: str, do: str) -> ConfigError:
    """The sentence of a refusal: which file, what is wrong with it, what to do."""
    return ConfigError(f"{path}: {found}; {do}")


def require_folder(folder: Path, *, holds: str) -> None:
    """ConfigError where `folder` is not there."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} does not exist; expected the folder that holds {holds}")
