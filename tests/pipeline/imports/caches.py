"""Caches as other trainers write them, with tiny shapes: the same calls, keys, layouts and file names.

Each writer encodes nothing: it takes latents [C, T, H, W] (or moments) and embeddings [S, D] as the trainer
has them in memory and saves them the way its source code does; `docs/import.md` names the files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

WIDTH = 64
"""D of all embeddings."""


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Seeded noise."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def write_cogvideo(
    root: Path,
    clips: Mapping[str, tuple[str, torch.Tensor]],
    *,
    resolution: str,
    embeddings: Mapping[str, torch.Tensor],
    model: str = "cogvideox-t2v",
) -> Path:
    """`clips`: video -> caption, scaled sample [C, T, H, W]; `embeddings`: caption -> [S, D]."""
    latents = root / "cache" / "video_latent" / model / resolution
    prompts = root / "cache" / "prompt_embeddings"
    latents.mkdir(parents=True)
    prompts.mkdir(exist_ok=True)
    (root / "prompts.txt").write_text("".join(f"{caption}\n" for caption, _ in clips.values()))
    (root / "videos.txt").write_text("".join(f"{video}\n" for video in clips))
    for video, (_, values) in clips.items():
        save_file({"encoded_video": values}, latents / f"{Path(video).stem}.safetensors")
    for caption, values in embeddings.items():
        name = hashlib.sha256(caption.encode()).hexdigest()
        save_file({"prompt_embedding": values}, prompts / f"{name}.safetensors")
    return root


def write_finetrainers(
    root: Path, pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]], *, early: bool = False
) -> Path:
    """`pairs`: (latents, conditions) as the model's specification returns them."""
    folder = root / ("precomputed" if early else "finetrainers-precomputed-data")
    for number, (latents, conditions) in enumerate(pairs):
        names = [f"latent-{number}.pt", f"condition-{number}.pt"]
        if early:
            names = [f"latents/latents-0-{number}.pt", f"conditions/conditions-0-{number}.pt"]
        for name, value in zip(names, (latents, conditions), strict=True):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            torch.save(value, folder / name)
    return root


def write_ttt_video(root: Path, clips: Sequence[tuple[torch.Tensor, Sequence[torch.Tensor]]]) -> Path:
    """`clips`: moments [2 C, T, H, W], embeddings [S, D] per 3 s."""
    lines = []
    for number, (moments, texts) in enumerate(clips):
        video = Path(f"videos/episode/video_sample_{number:04d}.pt")
        names = [Path(f"text/{i}/video_sample_{number:04d}_txt_emb.pt") for i in range(len(texts))]
        values = (moments.permute(1, 0, 2, 3).contiguous(), *texts)
        for name, value in zip((video, *names), values, strict=True):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            torch.save(value, root / name)
        lines.append({"vid_emb": str(video), "text_chunk_emb": [str(name) for name in names]})
    (root / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def write_musubi(
    root: Path,
    name: str,
    latents: torch.Tensor,
    *,
    frames: int,
    caption: str,
    text: Mapping[str, torch.Tensor],
    end: str = "wan",
    architecture: str = "wan",
    more: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """`latents` [C, T, H, W]; `text` and `more` with the keys they get."""
    root.mkdir(exist_ok=True)
    shape = "x".join(map(str, latents.shape[1:]))
    key = f"latents_{shape}_{str(latents.dtype).removeprefix('torch.')}"
    metadata = {"architecture": architecture, "format_version": "1.0.1"}
    path = root / f"{name}_00000-{frames:03d}_0640x0480_{end}.safetensors"
    size = {"width": "640", "height": "480", "frame_count": str(frames)}
    save_file({key: latents, **(more or {})}, path, metadata={**metadata, **size})
    save_file(dict(text), root / f"{name}_{end}_te.safetensors", metadata={**metadata, "caption1": caption})
    return path
