"""Frames on their way into a VAE: uint8 on the host in, what the model takes out, as late as can be.

The clip itself stays on the host; each piece that the model's encoder asks for is moved and converted there.
So a VAE that takes a long clip piece by piece holds one piece of it, whatever its length. The numbers are
those of diffusers' VideoProcessor, bit for bit. The price: tiles that overlap are moved more than once.

B clips, N pictures, F frames, C channels, H, W pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class FrameFeed:
    """Turns uint8 [B, C, F, H, W], or [N, C, H, W], into values from -1 to 1 where the model is."""

    def __init__(self, *, device: torch.device, dtype: torch.dtype, channels_last: bool) -> None:
        import torch

        self._device, self._dtype, self._channels_last = device, dtype, channels_last
        # A number would be turned into its inverse on a GPU, and x * (1 / 255) is not x / 255.
        self._divisor = torch.tensor(255.0, device=device)

    def __call__(self, frames: torch.Tensor) -> torch.Tensor:
        """Of the same shape; the host does not wait for the copy where its memory is pinned."""
        import torch

        # Frames come channels last; one by one they are contiguous, so that a copy is one piece.
        moved = [item.contiguous().to(self._device, non_blocking=True) for item in frames.movedim(1, -1)]
        pixels = (torch.stack(moved) if len(moved) > 1 else moved[0][None]).movedim(-1, 1)
        values = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        values = values.div_(self._divisor).mul_(2).sub_(1).to(self._dtype)
        if not self._channels_last:
            return values
        is_clip = values.ndim == 5
        return values.to(memory_format=torch.channels_last_3d if is_clip else torch.channels_last)

    def attach(self, encoder: torch.nn.Module) -> None:
        """Let `encoder`, the part of a VAE that sees frames, convert what it is given as uint8."""
        import torch

        def convert(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if isinstance(args[0], torch.Tensor) and args[0].dtype == torch.uint8:
                return (self(args[0]), *args[1:])
            return None

        encoder.register_forward_pre_hook(convert)
