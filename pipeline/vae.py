"""The video encoder `diffusers`: any VAE of `schemas.vae_rules`, for clips or frame by frame.

In: uint8 frames. Out: the posterior as the library has it, unscaled, time-major. On a GPU nothing waits: the
clip lies in pinned memory, is copied piece by piece between the work on pieces, and its moments come back
while the host fills the next batch. Copies and work share a stream, as frames are small beside the work.

B clips, F pixel frames, T latent frames, C channels, H, W pixels (frames) or latent cells.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.devices import pick_device
from pipeline.first_frame import first_is_alone, posterior
from pipeline.vae_frames import FrameFeed
from pipeline.vae_model import find_vae
from schemas.config import VideoEncoderConfig
from schemas.errors import ConfigError
from schemas.scaling import ImageLatents

if TYPE_CHECKING:
    import torch

    from pipeline.video_encode import Moments

_CLIP_PIXELS = 49 * 480 * 720
"""Encoded at once on a GPU where `batch_size` is unset."""
_PICTURES_AT_ONCE = {"cpu": 1, "cuda": 8}
"""Frames of a picture VAE in one call, whatever the batch."""
_FRAMES_DECODED_AT_ONCE = 14
"""Of a picture VAE whose decoder looks along time, as the pipeline of Stable Video Diffusion has it."""


class DiffusersEncoder:
    """A VAE of diffusers; everything but `load`, `encode` and `decode` needs no weights in memory."""

    name = "diffusers"

    def __init__(self, config: VideoEncoderConfig, *, image: ImageLatents | None = None) -> None:
        """ConfigError where the model is not to be had, or is not of a known class.

        `image` is where image latents are, if that is known.
        """
        self._config, self._model, self._image = config, find_vae(config), image
        self.geometry, self.scaling = self._model.geometry, self._model.scaling
        self.image_scaling = self._model.image_scaling
        self._vae: Any = None

    @cached_property
    def image(self) -> ImageLatents:
        """Where image latents are, if asked for; found by a trial with the weights where it is not known."""
        if not self._config.image_latents:
            return "none"
        if self._image is not None:
            return self._image
        if self._model.name == "AutoencoderKLTemporalDecoder":
            raise ConfigError(
                "video_encoder.image_latents: Stable Video Diffusion adds noise to a picture before it is "
                "encoded, anew each time, and does not scale the result: no stored image latents are that"
            )
        if not self.geometry.takes(1):
            raise ConfigError(
                f"video_encoder.image_latents: {self._model.name} takes {self.geometry.rule} frames, and so "
                "cannot encode a first frame alone"
            )
        return "first_latent" if self._model.by_frame or first_is_alone(self._model) else "apart"

    def hard_fields(self) -> dict[str, Any]:
        fields = {
            "kind": self.name,
            "class": self._model.name,
            "config": self._model.own_config,
            "weights_sha256": self._model.files.weights_sha256(),
            "compute_dtype": self._config.compute_dtype,
        }
        if self._model.time_tiles:
            fields["time_tiles"] = self._model.time_tiles
        return fields if self.image == "none" else {**fields, "image_latents": self.image}

    def tiling_fields(self) -> dict[str, Any]:
        return self._model.tiles

    def load(self) -> None:
        import torch

        if self._vae is not None:
            return
        dtype, channels_last = getattr(torch, self._config.compute_dtype), self._config.channels_last
        vae: Any = self._model.load(dtype=dtype, device=self._device)
        if channels_last:
            layouts = {4: torch.channels_last, 5: torch.channels_last_3d}  # a VAE may have kernels of both
            for weight in vae.parameters():
                if weight.ndim in layouts:
                    weight.data = weight.data.contiguous(memory_format=layouts[weight.ndim])
        if self._config.compile:
            vae.encoder = torch.compile(vae.encoder)
        if not self._model.takes_batches:
            vae.enable_slicing()
        self._feed = FrameFeed(device=self._device, dtype=dtype, channels_last=channels_last)
        self._feed.attach(vae.encoder)
        self._vae = vae

    def batch_size(self, shape: tuple[int, int, int]) -> int:
        if self._config.batch_size is not None:
            return self._config.batch_size
        if self._device.type == "cpu" or not self._model.takes_batches:
            return 1
        return max(1, _CLIP_PIXELS // (shape[0] * shape[1] * shape[2]))

    def buffer(self, num_clips: int, shape: tuple[int, int, int]) -> np.ndarray:
        import torch

        # torch keeps pinned memory for the next buffer.
        pinned = self._device.type == "cuda"
        frames: np.ndarray = torch.empty((num_clips, *shape, 3), dtype=torch.uint8, pin_memory=pinned).numpy()
        return frames

    def begin(self, frames: np.ndarray, *, tiled: bool = False) -> Callable[[], Moments]:
        import torch

        self.geometry.latent_frames(frames.shape[1])
        self.load()
        self._model.set_tiling(self._vae, tiled=tiled)
        clips = torch.from_numpy(frames)
        with torch.no_grad():
            if self._device.type == "cuda" and (tiled or self._model.cuts_patches):
                # What is cut out of pinned memory is copied on the host; as bytes, a clip is small on a GPU.
                clips = clips.to(self._device, non_blocking=True)
            found = self._moments(clips)
            if self.image == "apart":
                first = self._moments(clips[:, :1])
                found |= {f"image_{name}": values for name, values in first.items()}
            if self._device.type == "cpu":
                return lambda: found
            host = {name: _to_pinned(values) for name, values in found.items()}
            done = torch.cuda.Event(blocking=True)  # else the host spins while it waits
            done.record()

        # The argument keeps the frames: torch does not see that a copy still reads memory known to numpy.
        def wait(frames: np.ndarray = frames) -> Moments:
            done.synchronize()
            return host

        return wait

    def encode(self, frames: np.ndarray, *, tiled: bool = False) -> Moments:
        return self.begin(frames, tiled=tiled)()

    def decode(self, latents: np.ndarray, *, tiled: bool = False) -> np.ndarray:
        import torch

        self.load()
        self._model.set_tiling(self._vae, tiled=tiled)
        dtype = getattr(torch, self._config.compute_dtype)
        with torch.no_grad():
            values = torch.from_numpy(latents).to(self._device, dtype)
            pixels = torch.cat([self._decoded(piece) for piece in self._decodable(values)])
            pixels = (pixels.float() / 2 + 0.5).clamp_(0, 1).mul_(255).round_().to(torch.uint8)
            frames: np.ndarray = pixels.movedim(1, -1).cpu().numpy()
        return frames

    @cached_property
    def _device(self) -> torch.device:
        return pick_device(self._config.device, key="video_encoder.device")

    def _moments(self, clips: torch.Tensor) -> dict[str, torch.Tensor]:
        """uint8 [B, F, H, W, 3] -> float32 [B, T, C, H, W] where the model is."""
        import torch

        if self._model.by_frame:
            size = _PICTURES_AT_ONCE[self._device.type]
            pictures = clips.flatten(0, 1).movedim(-1, 1).split(size)
            parts = [posterior(self._vae, self._feed(each)) for each in pictures]
            joined = (torch.cat(each) for each in zip(*parts, strict=True))
            found = [each.unflatten(0, clips.shape[:2]) for each in joined]
        else:
            frames = clips.movedim(-1, 1)
            # Windows are cut out of a copy of the clip's type, so that one must be the model's.
            whole = self._feed(frames) if self.geometry.windows else frames
            found = [each.transpose(1, 2) for each in posterior(self._vae, whole)]
        return {name: each.float().contiguous() for name, each in zip(("mean", "logvar"), found, strict=True)}

    def _decodable(self, latents: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if not self._model.by_frame:
            return (latents,)
        along_time = "num_frames" in self._decode_arguments
        return latents.split(_FRAMES_DECODED_AT_ONCE if along_time else 1)

    def _decoded(self, latents: torch.Tensor) -> torch.Tensor:
        """[T, C, H, W] -> [F, 3, H, W] from -1 to 1."""
        import torch

        if self._model.by_frame:
            count = {"num_frames": len(latents)} if "num_frames" in self._decode_arguments else {}
            pictures: torch.Tensor = self._vae.decode(latents, **count).sample
            return pictures
        extra = {}
        if self._model.config.get("timestep_conditioning"):  # LTX: clean latents are those of time 0
            extra["temb"] = torch.zeros(1, device=latents.device, dtype=latents.dtype)
        clip: torch.Tensor = self._vae.decode(latents.transpose(0, 1)[None], **extra).sample
        if self.geometry.windows:  # Allegro's decoder has brought time to the front already
            return clip[0]
        # Of an even number of latent frames, CogVideoX makes more of the first one than it stands for.
        return clip[0].transpose(0, 1)[-((len(latents) - 1) * self.geometry.temporal + 1) :]

    @cached_property
    def _decode_arguments(self) -> frozenset[str]:
        import inspect

        return frozenset(inspect.signature(type(self._vae).decode).parameters)


def _to_pinned(values: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
