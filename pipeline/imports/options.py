"""What an import is asked for, and the reader that follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.imports.cache import COGVIDEOX, Cache, Vae
from pipeline.imports.cogvideo import CogVideoCache
from pipeline.imports.finetrainers import FinetrainersCache
from pipeline.imports.musubi import MusubiCache
from pipeline.imports.ttt_video import TttVideoCache
from schemas.config import UnitsConfig
from schemas.errors import ConfigError
from schemas.store import absolute

Format = Literal["cogvideo", "finetrainers", "ttt-video", "musubi"]


@dataclass(frozen=True)
class ImportOptions:
    """What the command was asked for."""

    source: Path
    output: str
    format: Format
    vae: str
    """Folder or hub id of the VAE the latents are of."""
    fps: float
    text_encoder: str | None = None
    """Folder or hub id; makes the empty prompt."""
    prompts: Path | None = None
    videos: Path | None = None
    leave_out: tuple[str, ...] = ()
    unit_rows: int = UnitsConfig().rows

    def arguments(self) -> list[str]:
        """Of a command that repeats it from any working folder; but for `-o`."""
        given = {
            "--format": self.format,
            "--vae": as_named(self.vae),
            "--fps": f"{self.fps:g}",
            "--text-encoder": self.text_encoder and as_named(self.text_encoder),
            "--prompts": self.prompts and str(self.prompts.absolute()),
            "--videos": self.videos and str(self.videos.absolute()),
        }
        pairs = [(name, value) for name, value in given.items() if value]
        pairs += [("--leave-out", name) for name in self.leave_out]
        return [str(self.source.absolute()), *(word for pair in pairs for word in pair)]


def open_cache(options: ImportOptions, vae: Vae) -> Cache:
    """The reader of a format; ConfigError for options that are another's, or a VAE that never made it."""
    if options.format != "cogvideo" and (options.prompts or options.videos):
        raise ConfigError("--prompts and --videos are the lists of --format cogvideo; this one has none")
    source = options.source.absolute()
    if options.format in ("cogvideo", "ttt-video"):
        vae.require(COGVIDEOX, made=f"caches of {options.format} are made")
    if options.format == "cogvideo":
        return CogVideoCache(source, prompts=options.prompts, videos=options.videos)
    if options.format == "finetrainers":
        return FinetrainersCache(source, vae=vae)
    if options.format == "ttt-video":
        return TttVideoCache(source)
    return MusubiCache(source, vae=vae, left_out=options.leave_out)


def as_named(model: str) -> str:
    """A folder as every later command finds it; a hub id as it is."""
    return absolute(model) if Path(model).is_dir() else model
