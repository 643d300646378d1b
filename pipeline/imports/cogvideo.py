"""Caches of CogVideo's `finetune` scripts (diffusers): scaled samples, paired by file stem and caption hash.

    DATA_ROOT/prompts.txt, videos.txt                               captions and videos, line by line
    DATA_ROOT/cache/video_latent/MODEL/FxHxW/STEM.safetensors       encoded_video [C, T, H, W]
    DATA_ROOT/cache/prompt_embeddings/SHA256.safetensors            prompt_embedding [S, D]

A sample of the posterior times `scaling_factor`, also with the VAE of 1.5. Text-to-video drops a frame of the
training resolution (49 gives 48 frames and 12 latent ones), image-to-video puts the image there.
Source: THUDM/CogVideo finetune/datasets/t2v_dataset.py, i2v_dataset.py, trainer.py,
models/cogvideox_t2v/lora_trainer.py.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import Literal

from pipeline.imports.cache import CachedClip, CachedLatents, CachedPrompt, Listing, refused, require_folder
from pipeline.imports.files import CacheFile, read_lines
from schemas.errors import ConfigError

_RESOLUTION = re.compile(r"(\d+)x(\d+)x(\d+)")


class CogVideoCache:
    """See the module."""

    scaled = True
    single: Literal["sample"] = "sample"
    padding: Literal["full"] = "full"
    text_family: Literal["cogvideox"] = "cogvideox"

    def __init__(self, source: Path, *, prompts: Path | None, videos: Path | None) -> None:
        """`prompts`, `videos`: the trainer's `caption_column` and `video_column`."""
        self._root = source
        self._prompts = prompts or source / "prompts.txt"
        self._videos = videos or source / "videos.txt"

    def listing(self) -> Listing:
        cache = self._root / "cache"
        latents, embeddings = cache / "video_latent", cache / "prompt_embeddings"
        require_folder(latents, holds="cache/video_latent (the trainer's data_root)")
        models = sorted(folder.name for folder in latents.iterdir() if folder.is_dir())
        if len(models) != 1:
            raise ConfigError(
                f"{latents}: expected the latents of one model, found {', '.join(models) or 'none'}; they "
                "may be of different VAEs: move all but one model's folder away"
            )
        folders = sorted(folder for folder in (latents / models[0]).iterdir() if folder.is_dir())
        captions = self._captions()
        clips, used = [], set()
        for folder in folders:
            if not (size := _RESOLUTION.fullmatch(folder.name)):
                raise refused(folder, "is not named by a resolution", "expected frames x height x width")
            counts, pixels = (int(size[1]), int(size[1]) - 1), (int(size[2]), int(size[3]))
            for stem, caption in captions:
                path = folder / f"{stem}.safetensors"
                if path.is_file():
                    used.add(path)
                    prompt = embeddings / f"{_hash(caption)}.safetensors"
                    if not prompt.is_file():
                        what = f"its prompt embeddings {prompt} are missing (caption {caption[:60]!r})"
                        raise refused(path, what, "let the trainer compute them, or remove the latents")
                    clips.append(CachedClip(path, (prompt,), caption, counts, pixels))
        files = {path for folder in folders for path in folder.glob("*.safetensors")}
        missing = len({stem for stem, _ in captions} - {path.stem for path in used})
        empty = embeddings / f"{_hash('')}.safetensors"
        return Listing(
            clips,
            empty_prompt=(empty,) if empty.is_file() else (),
            says={"model_name": models[0]},
            notes=tuple(
                note
                for count, note in (
                    (missing, f"{missing} videos of {self._videos.name} have no latents in the cache"),
                    (len(files - used), f"{len(files - used)} files are of no video in {self._videos.name}"),
                )
                if count
            ),
        )

    def _captions(self) -> list[tuple[str, str]]:
        """File stem and caption of every video; one that is listed again has that caption too."""
        prompts = _lines(self._prompts, option="--prompts", column="caption_column")
        videos = _lines(self._videos, option="--videos", column="video_column")
        if len(prompts) != len(videos):
            raise ConfigError(
                f"{self._prompts} has {len(prompts)} captions and {self._videos} {len(videos)} videos; "
                "expected as many: they are paired line by line"
            )
        stems = [Path(video).stem for video in videos]
        places = defaultdict(set)
        for stem, video in zip(stems, videos, strict=True):
            places[stem].add(os.path.normpath(video))
        if twice := [stem for stem, paths in places.items() if len(paths) > 1]:
            raise ConfigError(
                f"{self._videos}: {len(twice)} file names come twice, such as {twice[0]!r}: the cache holds "
                "the latents of one of these videos and does not say which; take them out of both lists"
            )
        return list(zip(stems, prompts, strict=True))

    def latents(self, file: CacheFile) -> CachedLatents:
        file.only("encoded_video")
        return CachedLatents(file.tensor("encoded_video", dims=4).transpose(0, 1))

    def prompt(self, files: list[CacheFile]) -> CachedPrompt:
        (file,) = files
        file.only("prompt_embedding")
        embeds = file.tensor("prompt_embedding", dims=2)
        return CachedPrompt(embeds, None, (len(embeds),))


def _hash(caption: str) -> str:
    return hashlib.sha256(caption.encode()).hexdigest()


def _lines(path: Path, *, option: str, column: str) -> list[str]:
    """The lines of a list as the trainer reads them: stripped, empty ones left out."""
    try:
        lines = read_lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} cannot be read: {error}; the cache is paired with its captions by it, so give {option} "
            f"FILE, the trainer's {column}"
        ) from error
    return [stripped for line in lines if (stripped := line.strip())]
