"""Video encoders behind one interface, and what of their posterior is stored.

In: uint8 frames [B, F, H, W, 3]. Out: the posterior's moments, float32 [B, T, C, H, W], unscaled;
then, clip by clip, the tensors of one sample in the stored dtype. An encoder gives the same bytes
for a clip whatever else is in its batch.

B clips, F pixel frames, T latent frames, C channels, H, W pixels (frames) or latent cells.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pipeline import dct
from schemas.bucket import Geometry
from schemas.codec import TAGS, Tensor, from_float32
from schemas.config import VideoEncoderConfig
from schemas.scaling import Scaling

if TYPE_CHECKING:
    import torch

_LOGVAR_MIN, _LOGVAR_MAX = -30.0, 20.0
"""diffusers' clamp of a posterior's log-variance; the floor stands for "no noise"."""


class VideoEncoder(Protocol):
    """Frames to moments and back."""

    name: str
    geometry: Geometry
    scaling: Scaling

    def hard_fields(self) -> dict[str, Any]:
        """JSON values of everything, beyond the config, that changes the numbers."""

    def encode(self, frames: np.ndarray) -> dict[str, torch.Tensor]:
        """uint8 [B, F, H, W, 3] -> `mean` and `logvar`, float32 [B, T, C, H, W], unscaled."""

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Unscaled float32 latents [T, C, H, W] -> uint8 frames [F, H, W, 3]."""


class DctEncoder:
    """The embedded codec of `pipeline.dct`. It is deterministic: `logvar` is -30 everywhere."""

    name = "dct"
    geometry = dct.GEOMETRY
    scaling = dct.SCALING

    def hard_fields(self) -> dict[str, Any]:
        return {"kind": self.name, "table_sha256": dct.table_digest()}

    def encode(self, frames: np.ndarray) -> dict[str, torch.Tensor]:
        import torch

        mean = torch.from_numpy(np.stack([dct.encode_frames(clip) for clip in frames]))
        return {"mean": mean, "logvar": torch.full_like(mean, _LOGVAR_MIN)}

    def decode(self, latents: np.ndarray) -> np.ndarray:
        return dct.decode_latents(latents)


def load_video_encoder(config: VideoEncoderConfig) -> VideoEncoder:
    """The encoder a config names."""
    return DctEncoder()


def stored_latents(
    moments: Mapping[str, torch.Tensor], *, config: VideoEncoderConfig, seed: int, sample_id: str
) -> dict[str, Tensor]:
    """The tensors of one clip as `config.store` and `config.dtype` want them.

    `moments` holds `mean` and `logvar` [T, C, H, W]. `store = "sample"` draws from the posterior with
    noise keyed by (seed, sample_id), so a sample never depends on its neighbours or on the order of
    encoding.
    """
    mean, logvar = (np.asarray(moments[name].cpu().float()) for name in ("mean", "logvar"))
    if config.store == "moments":
        tensors = {"mean": mean, "logvar": logvar}
    elif config.store == "mean":
        tensors = {"latents": mean}
    else:
        key = hashlib.blake2b(f"{seed}/{sample_id}".encode(), digest_size=16).digest()
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
        noise = generator.standard_normal(mean.shape, np.float32)
        tensors = {"latents": mean + np.exp(0.5 * logvar.clip(_LOGVAR_MIN, _LOGVAR_MAX)) * noise}
    return {name: from_float32(values, dtype=TAGS[config.dtype]) for name, values in tensors.items()}
