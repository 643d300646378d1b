"""Whether a VAE's first latent frame of a clip is its first frame alone: tried with the real weights, once.

In: a VAE. Out: yes or no, for image latents. It runs in float32 on a CPU whatever the config says, so that
every machine finds the same; the price is a few seconds and the weights in memory for so long.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from pipeline.vae_frames import FrameFeed

if TYPE_CHECKING:
    import torch

    from pipeline.vae_model import VaeModel

_DETERMINISTIC = -30.0
"""Log-variance of a VAE without noise (Cosmos): diffusers' floor."""


@functools.lru_cache(maxsize=8)
def first_is_alone(model: VaeModel) -> bool:
    """Whether the first latent frame of a clip is the encoding of its first frame alone.

    Two clips that share a first frame must agree in it bit for bit, and with that frame encoded alone up to
    rounding: the kernels for one frame sum in another order than those for many.
    """
    import torch

    cpu = torch.device("cpu")
    vae = model.load(dtype=torch.float32, device=cpu)
    feed = FrameFeed(device=cpu, dtype=torch.float32, channels_last=False)
    shape = (1, 3, 1 + 2 * model.geometry.temporal, *[max(64, 2 * model.geometry.spatial)] * 2)
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randint(256, shape, dtype=torch.uint8, generator=generator) for _ in range(2))
    other[:, :, 0] = one[:, :, 0]
    with torch.no_grad():
        first, again, alone = (
            torch.cat(posterior(vae, feed(clip)), 1)[:, :, :1] for clip in (one, other, one[:, :, :1])
        )
    return torch.equal(first, again) and torch.allclose(first, alone, rtol=1e-3, atol=1e-4)


def posterior(vae: Any, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log-variance of what `vae` takes, in its layout."""
    import torch

    found = vae.encode(frames).latent_dist
    if hasattr(found, "logvar"):
        return found.mean, found.logvar
    mean: torch.Tensor = found.mode()
    return mean, torch.full_like(mean, _DETERMINISTIC)
