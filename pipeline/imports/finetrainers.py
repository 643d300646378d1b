"""Precomputed data of finetrainers: unscaled moments or samples as `.pt`, paired by number, without captions.

    precomputed/conditions/conditions-RANK-I.pt, latents/latents-RANK-I.pt    0.0.1
    finetrainers-precomputed-data/condition-I.pt, latent-I.pt (or -RANK-I)    later

Each latents file is a dict with a batch of one: `latents` [1, K, T, H, W]; CogVideoX of the later layout is
[1, T, K, H, W]. LTX and Wan add `latents_mean` and `latents_std`, which for Wan is 1 / std. Prompts are
`prompt_embeds`, later `encoder_hidden_states` [1, S, D], with a mask for some models.
Source: a-r-r-o-w/finetrainers finetrainers/trainer.py, dataset.py (0.0.1); data/precomputation.py,
models/*/base_specification.py (later).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pipeline.imports.cache import (
    COGVIDEOX,
    HUNYUANVIDEO,
    LTX,
    WAN,
    CachedClip,
    CachedLatents,
    CachedPrompt,
    Listing,
    Vae,
    refused,
    require_folder,
)
from pipeline.imports.files import CacheFile
from schemas.errors import ConfigError

_SUBFOLDERS = ("precomputed", "finetrainers-precomputed-data")
_LATER = re.compile(r"latent-(\d+(?:-\d+)?)\.pt")
_EARLIER = re.compile(r"latents-(\d+-\d+)\.pt")
_SIZES = ("num_frames", "height", "width")
_EMBEDS = {"prompt_embeds": "prompt_attention_mask", "encoder_hidden_states": "encoder_attention_mask"}
"""Key of the embeddings -> key of their mask, by layout."""
_MASKED = {COGVIDEOX: False, HUNYUANVIDEO: True, LTX: True}
"""Whether prompts have a mask; those of Wan had one for a while."""


class FinetrainersCache:
    """See the module."""

    scaled = False
    single: Literal["sample"] = "sample"
    padding: Literal["full"] = "full"
    text_family: Literal["cogvideox"] = "cogvideox"

    def __init__(self, source: Path, *, vae: Vae) -> None:
        below = [source / name for name in _SUBFOLDERS if (source / name).is_dir()]
        self._root, self._vae = below[0] if below else source, vae

    def listing(self) -> Listing:
        require_folder(self._root, holds="latents and conditions")
        pairs = list(self._pairs())
        if not pairs:
            raise ConfigError(
                f"{self._root} holds no latents/latents-RANK-I.pt, nor latent-I.pt; name the folder that does"
            )
        clips = []
        for path, prompt in pairs:
            if not prompt.is_file():
                raise refused(
                    path, f"its prompt embeddings {prompt} are missing", "remove the latents, or redo it"
                )
            clips.append(CachedClip(path, (prompt,), None))
        return Listing(clips)

    def _pairs(self) -> Iterator[tuple[Path, Path]]:
        """(latents, prompt) of every clip, in the order the trainer has them."""
        earlier = (self._root / "latents").is_dir()
        folder, pattern = (self._root / "latents", _EARLIER) if earlier else (self._root, _LATER)
        found = [(match[1], path) for path in folder.iterdir() if (match := pattern.fullmatch(path.name))]
        for number, path in sorted(found, key=lambda item: [int(part) for part in item[0].split("-")]):
            yield (
                path,
                self._root / "conditions" / f"conditions-{number}.pt"
                if earlier
                else self._root / f"condition-{number}.pt",
            )

    def latents(self, file: CacheFile) -> CachedLatents:
        file.only("latents", "latents_mean", "latents_std", *_SIZES)
        kinds, how = [COGVIDEOX, HUNYUANVIDEO], "without"
        if "latents_mean" in file.values:
            kinds, how = [LTX if "num_frames" in file.values else WAN], "with"
        self._vae.require(*kinds, made=f"latents {how} latents_mean, as in {file.path}, are made")
        values = file.tensor("latents", dims=5)
        if len(values) != 1:
            raise refused(file.path, f"holds a batch of {len(values)}", "expected one clip a file")
        later = _LATER.fullmatch(file.path.name) is not None
        if not (later and self._vae.kind == COGVIDEOX):
            values = values.transpose(1, 2)
        if ("latents_mean" in file.values) != ("latents_std" in file.values):
            raise refused(file.path, "holds one of latents_mean and latents_std", "expected both or none")
        stated = None
        if "latents_mean" in file.values:
            mean, std = (file.tensor(name, dims=1).float() for name in ("latents_mean", "latents_std"))
            stated = (mean.tolist(), (std if self._vae.kind == LTX else 1 / std).tolist())
        return CachedLatents(values[0], stated)

    def prompt(self, files: list[CacheFile]) -> CachedPrompt:
        (file,) = files
        key = next((key for key in _EMBEDS if key in file.values), None)
        if key is None:
            raise refused(file.path, f"holds {sorted(file.values)}", f"expected one of {', '.join(_EMBEDS)}")
        file.only(key, _EMBEDS[key])
        embeds = file.tensor(key, dims=3)
        if len(embeds) != 1:
            raise refused(file.path, f"holds a batch of {len(embeds)}", "expected one prompt a file")
        mask = file.mask(_EMBEDS[key], shape=[1, embeds.shape[1]])
        if _MASKED.get(self._vae.kind, mask is not None) != (mask is not None):
            what = f"holds {'a' if mask is not None else 'no'} mask, and --vae is an {self._vae.kind}"
            raise refused(file.path, what, "give the VAE the latents are of")
        return CachedPrompt(embeds[0], None if mask is None else mask[0], (embeds.shape[1],))
