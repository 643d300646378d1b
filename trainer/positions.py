"""Positions of video tokens, as diffusers' CogVideoX pipeline has them: a grid of patches in, tables out.

CogVideoX 5B (1.0) squeezes its rotary grid into the base grid of the config, 1.5 counts patches, 2B
adds sines and cosines to the embeddings. Tables are cached per clip shape, as a dataset has few.

T, H, W patches of a clip in time, height and width; V = T * H * W video tokens, in that order;
D width of a head, E width of the model.
"""

from __future__ import annotations

import functools

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed, get_3d_sincos_pos_embed

Grid = tuple[int, int, int]
"""T, H, W."""


@functools.lru_cache(maxsize=64)
def rotary_table(
    grid: Grid, *, head_dim: int, base: tuple[int, int] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin), each [V, D] float32; `base` is the (height, width) grid of 1.0, None for 1.5."""
    frames, height, width = grid
    cos, sin = get_3d_rotary_pos_embed(
        head_dim,
        _crop(height, width, base) if base else None,
        (height, width),
        frames,
        grid_type="linspace" if base else "slice",
        max_size=(height, width),
    )
    return cos, sin


@functools.lru_cache(maxsize=64)
def sincos_table(grid: Grid, *, width: int, spatial_scale: float, temporal_scale: float) -> torch.Tensor:
    """[V, E] float32, added to the embedded patches of CogVideoX 2B."""
    frames, rows, columns = grid
    table: torch.Tensor = get_3d_sincos_pos_embed(
        width, (columns, rows), frames, spatial_scale, temporal_scale, output_type="pt"
    )
    return table.flatten(0, 1)


def _crop(height: int, width: int, base: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Corners of the largest centred box of the clip's aspect inside `base`.

    The rule, roundings included, of `get_resize_crop_region_for_grid` in diffusers' pipeline_cogvideox.py.
    """
    base_height, base_width = base
    if height / width > base_height / base_width:
        rows, columns = base_height, round(base_height / height * width)
    else:
        rows, columns = round(base_width / width * height), base_width
    top, left = round((base_height - rows) / 2), round((base_width - columns) / 2)
    return (top, left), (top + rows, left + columns)
