"""Caches of musubi-tuner: latents and text as safetensors, paired by file name, captions in the metadata.

    STEM_POS-FRAMES_WxH_ARCH.safetensors    latents_TxHxW_DTYPE [C, T, H, W]; an image has no POS-FRAMES
    STEM_ARCH_te.safetensors                embeddings by encoder, `caption1` in the metadata

Wan's are the scaled mean of the posterior, HunyuanVideo's an unscaled sample. W x H in the name is the size
of the source. Wan's text is cut to its tokens (`varlen_t5_DTYPE`), HunyuanVideo's is padded (`llm_DTYPE`,
`llm_mask`). Other architectures store parts of clips or pictures and are refused.
Source: kohya-ss/musubi-tuner src/musubi_tuner/dataset/cache_io.py, dataset/image_video_dataset.py,
wan_cache_latents.py, wan/modules/vae.py, cache_latents.py, hv_train_network.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pipeline.imports.cache import (
    HUNYUANVIDEO,
    WAN,
    CachedClip,
    CachedLatents,
    CachedPrompt,
    Listing,
    Vae,
    refused,
    require_folder,
)
from pipeline.imports.files import CacheFile, dtype_name, read_file
from schemas.errors import ClipError, ConfigError

_KNOWN = {"wan": "wan", "hv": "hunyuan_video"}
"""End of a file name -> `architecture` in its metadata."""
_NAME = re.compile(r"(.+?)(?:_(\d{5,})-(\d{3,}))?_(\d{4,})x(\d{4,})_([a-z0-9]+)\.safetensors")


class MusubiCache:
    """See the module."""

    def __init__(self, source: Path, *, vae: Vae, left_out: Sequence[str]) -> None:
        """`left_out`: as of `read_file`; text files are opened to learn captions."""
        require_folder(source, holds="the cache (cache_directory of the dataset config)")
        self._root, self._left_out = source, left_out
        ends = {path.stem.rsplit("_", 1)[-1] for path in self._files()}
        if not ends:
            raise ConfigError(f"{source} holds no latents such as NAME_00000-081_0832x0480_wan.safetensors")
        if len(ends) > 1:
            raise ConfigError(
                f"{source} holds latents of {', '.join(sorted(ends))}, which are of different VAEs; move all "
                "but one kind away"
            )
        self._end = ends.pop()
        if self._end not in _KNOWN:
            raise ConfigError(
                f"{source} holds latents of {self._end!r}; only {', '.join(_KNOWN)} are whole clips with one "
                "known meaning"
            )
        wan = self._end == "wan"
        vae.require(
            WAN if wan else HUNYUANVIDEO, made=f"{_KNOWN[self._end]} latents of musubi-tuner are made"
        )
        self.scaled = wan
        self.single: Literal["sample", "mean"] = "mean" if wan else "sample"
        self.padding: Literal["full", "trim"] = "trim" if wan else "full"
        self.text_family: Literal["cogvideox", "wan"] = "wan"

    def _files(self) -> list[Path]:
        return sorted(path for path in self._root.glob("*.safetensors") if _NAME.fullmatch(path.name))

    def listing(self) -> Listing:
        clips: list[CachedClip] = []
        empty: tuple[Path, ...] = ()
        for path in self._files():
            match = _NAME.fullmatch(path.name)
            assert match is not None
            prompt = self._root / f"{match[1]}_{self._end}_te.safetensors"
            if not prompt.is_file():
                what = f"its prompt embeddings {prompt.name} are missing"
                raise refused(path, what, "run the trainer's caching of text encoder outputs, or remove it")
            caption = self._caption(prompt)
            if caption == "":
                empty = (prompt,)
            clips.append(CachedClip(path, (prompt,), caption, (int(match[3]) if match[3] else 1,)))
        return Listing(clips, empty_prompt=empty, says={"architecture": _KNOWN[self._end]})

    def _caption(self, path: Path) -> str | None:
        try:
            metadata = read_file(path).metadata
        except ClipError:  # its rows are quarantined when they run
            return None
        if "caption1" not in metadata:
            raise refused(path, "has no caption1 in its metadata", "cache the text encoder outputs again")
        return metadata["caption1"]

    def latents(self, file: CacheFile) -> CachedLatents:
        self._require_architecture(file)
        keys = [key for key in file.values if re.fullmatch(r"latents_\d+x\d+x\d+_[a-z0-9]+", key)]
        file.only(*keys)
        if len(keys) != 1:
            raise refused(file.path, f"holds {sorted(file.values)}", "expected one latents_TxHxW_DTYPE")
        values = file.tensor(keys[0], dims=4)
        said = keys[0].split("_", 1)[1]
        found = f"{'x'.join(map(str, values.shape[1:]))}_{dtype_name(values)}"
        if said != found:
            raise refused(file.path, f"{keys[0]} is {found}", "its name and its tensor must agree")
        return CachedLatents(values.transpose(0, 1))

    def prompt(self, files: list[CacheFile]) -> CachedPrompt:
        (file,) = files
        self._require_architecture(file)
        name = "varlen_t5_" if self._end == "wan" else "llm_"
        masks = [] if self._end == "wan" else ["llm_mask"]
        keys = [key for key in file.values if key.startswith(name) and key not in masks]
        file.only(*keys, *masks)
        if len(keys) != 1 or any(mask not in file.values for mask in masks):
            expected = " and ".join([f"one {name}DTYPE", *masks])
            raise refused(file.path, f"holds {sorted(file.values)}", f"expected {expected}")
        embeds = file.tensor(keys[0], dims=2)
        mask = file.mask(masks[0], shape=[len(embeds)]) if masks else None
        return CachedPrompt(embeds, mask, (len(embeds),))

    def _require_architecture(self, file: CacheFile) -> None:
        found = file.metadata.get("architecture")
        if found != _KNOWN[self._end]:
            what = f"its metadata says architecture {found!r}, its name {self._end!r}"
            raise refused(file.path, what, "move files of other models away")
