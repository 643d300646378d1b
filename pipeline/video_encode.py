"""Video encoders behind one interface, and what of their posterior is stored.

In: uint8 frames [B, F, H, W, 3]. Out: the posterior's moments, float32 [B, T, C, H, W], unscaled;
then, clip by clip, the tensors of one sample in the stored dtype. The embedded codec gives the same bytes
for a clip whatever else is in its batch; VAEs give the same up to rounding (within 1e-5 in float32), as their
kernels sum in another order for another batch.

B clips, F pixel frames, T latent frames, C channels, H, W pixels (frames) or latent cells.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pipeline import dct
from pipeline.segments import Segmented
from schemas.bucket import Geometry
from schemas.codec import TAGS, Tensor, from_float32
from schemas.config import VideoEncoderConfig
from schemas.scaling import ImageLatents, ImageScaling, Scaling

if TYPE_CHECKING:
    import torch

_LOGVAR_MIN, _LOGVAR_MAX = -30.0, 20.0
"""diffusers' clamp of a posterior's log-variance; the floor stands for "no noise"."""


Moments = dict[str, "torch.Tensor"]
"""`mean` and `logvar`, float32 [B, T, C, H, W] on the host, unscaled; the caller's to keep. Where
`image` is "apart", also `image_mean` and `image_logvar` [B, 1, C, H, W], of the first frame alone."""


class VideoEncoder(Protocol):
    """Frames to moments and back. `begin`, and what it returns, are called from a thread of their own."""

    name: str
    geometry: Geometry
    scaling: Scaling
    image_scaling: ImageScaling

    @property
    def image(self) -> ImageLatents:
        """Where image latents are; "none" where the config does not ask for them."""

    def hard_fields(self) -> dict[str, Any]:
        """JSON values of everything, beyond the config, that changes the numbers; loads no weights."""

    def load(self) -> None:
        """Load the weights now instead of at the first `encode`."""

    def tiling_fields(self) -> dict[str, Any]:
        """Sizes of the tiles of `tiled`, JSON values; empty where the encoder knows no tiles."""

    def batch_size(self, shape: tuple[int, int, int]) -> int:
        """Clips of F, H, W pixels to encode at once, where memory allows."""

    def buffer(self, num_clips: int, shape: tuple[int, int, int]) -> np.ndarray:
        """uint8 [num_clips, F, H, W, 3] to fill and give to `begin`; it may be the one given two
        calls before for that shape."""

    def begin(self, frames: np.ndarray, *, tiled: bool = False) -> Callable[[], Moments]:
        """Start to encode uint8 [B, F, H, W, 3]; the function returned waits for the moments.

        Where the model runs beside the host (on a GPU) this returns before the work is done; one such batch
        is under way at most, or two in pieces of a clip. Out of memory is raised here or by the function.
        """

    def encode(self, frames: np.ndarray, *, tiled: bool = False) -> Moments:
        """`begin`, and the wait for it."""

    def decode(self, latents: np.ndarray, *, tiled: bool = False) -> np.ndarray:
        """Unscaled float32 latents [T, C, H, W] -> uint8 frames [F, H, W, 3]."""


class DctEncoder:
    """The embedded codec of `pipeline.dct`. It is deterministic: `logvar` is -30 everywhere."""

    name = "dct"
    geometry = dct.GEOMETRY
    scaling = dct.SCALING
    image_scaling: ImageScaling = "as_video"

    def __init__(self, config: VideoEncoderConfig) -> None:
        # Its first latent frame is the first pixel frame alone, see `pipeline.dct`.
        self.image: ImageLatents = "first_latent" if config.image_latents else "none"

    def hard_fields(self) -> dict[str, Any]:
        return {"kind": self.name, "table_sha256": dct.table_digest()}

    def load(self) -> None:
        pass

    def tiling_fields(self) -> dict[str, Any]:
        return {}

    def batch_size(self, shape: tuple[int, int, int]) -> int:
        return 1

    def buffer(self, num_clips: int, shape: tuple[int, int, int]) -> np.ndarray:
        return np.empty((num_clips, *shape, 3), np.uint8)

    def begin(self, frames: np.ndarray, *, tiled: bool = False) -> Callable[[], Moments]:
        moments = self.encode(frames)
        return lambda: moments

    def encode(self, frames: np.ndarray, *, tiled: bool = False) -> Moments:
        import torch

        mean = torch.from_numpy(np.stack([dct.encode_frames(clip) for clip in frames]))
        return {"mean": mean, "logvar": torch.full_like(mean, _LOGVAR_MIN)}

    def decode(self, latents: np.ndarray, *, tiled: bool = False) -> np.ndarray:
        return dct.decode_latents(latents)


def load_video_encoder(config: VideoEncoderConfig, *, image: ImageLatents | None = None) -> VideoEncoder:
    """The encoder a config names; ConfigError where there is none. `image` as a card has it saves the trial
    that finds it."""
    encoder: VideoEncoder = DctEncoder(config)
    if config.kind == "diffusers":
        from pipeline.vae import DiffusersEncoder

        encoder = DiffusersEncoder(config, image=image)
    return Segmented(encoder, config.segment_frames) if config.segment_frames else encoder


def stored_latents(
    moments: Mapping[str, torch.Tensor], *, config: VideoEncoderConfig, seed: int, sample_id: str
) -> dict[str, Tensor]:
    """The tensors of one clip as `config.store` and `config.dtype` want them.

    `moments` holds `mean` and `logvar` [T, C, H, W], perhaps `image_mean` and `image_logvar` [1, C, H, W].
    `store = "sample"` draws from the posterior with noise keyed by (seed, sample_id), so a sample never
    depends on its neighbours or on the order of encoding.
    """
    stored = _stored(moments, "", config=config, seed=seed, key=sample_id)
    if "image_mean" in moments:
        stored |= _stored(moments, "image_", config=config, seed=seed, key=f"{sample_id}/image")
    return stored


def _stored(
    moments: Mapping[str, torch.Tensor], prefix: str, *, config: VideoEncoderConfig, seed: int, key: str
) -> dict[str, Tensor]:
    mean, logvar = (np.asarray(moments[f"{prefix}{name}"].cpu().float()) for name in ("mean", "logvar"))
    if config.store == "moments":
        tensors = {"mean": mean, "logvar": logvar}
    elif config.store == "mean":
        tensors = {"latents": mean}
    else:
        digest = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=16).digest()
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
        noise = generator.standard_normal(mean.shape, np.float32)
        tensors = {"latents": mean + np.exp(0.5 * logvar.clip(_LOGVAR_MIN, _LOGVAR_MAX)) * noise}
    tag = TAGS[config.dtype]
    return {f"{prefix}{name}": from_float32(values, dtype=tag) for name, values in tensors.items()}
