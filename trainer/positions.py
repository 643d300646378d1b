"""Positions of video tokens, as diffusers' CogVideoX pipeline has them: a grid of patches in, tables out.

CogVideoX 5B (1.0) squeezes its rotary grid into the base grid of the config, 1.5 counts patches, 2B
adds sines and cosines to the embeddings. Tables are kept per clip shape, as a dataset has few, up to a
bound in bytes: those of minute-long clips are large.

T, H, W patches of a clip in time, height and width; V = T * H * W video tokens, in that order; L tokens of a
stream (`trainer.collate`); D width of a head, E width of the model.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed, get_3d_sincos_pos_embed

from trainer.layout import Grid, Layout

Rotary = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines."""


class TableCache:
    """Tables by what they are of, up to `limit` bytes; what was used longest ago goes first."""

    def __init__(self, limit: int) -> None:
        self._limit, self._kept, self._bytes = limit, OrderedDict[Hashable, tuple[torch.Tensor, ...]](), 0
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
        """The tables of `key`, made where they are not kept."""
        with self._lock:
            if key not in self._kept:
                self._kept[key] = made = make()
                self._bytes += sum(table.nbytes for table in made)
            self._kept.move_to_end(key)
            found = self._kept[key]
            while self._bytes > self._limit:
                _, dropped = self._kept.popitem(last=False)
                self._bytes -= sum(table.nbytes for table in dropped)
            return found


_TABLES = TableCache(limit=1 << 30)


def span_positions(
    grids: Sequence[Grid], spans: Sequence[Sequence[int]], texts: Sequence[int], layout: Layout
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(cos, sin, None) for rotary models, (None, None, positions) for absolute ones; each span from 0.

    Of the stream, [L, D] each, or of its video tokens, [V, E]. `grids` are of clips, `spans` the patches in
    time of each clip's spans, `texts` the prompt tokens in front of each span.
    """
    parts = [
        (patches, height, width)
        for (_, height, width), clip in zip(grids, spans, strict=True)
        for patches in clip
    ]
    if layout.positions == "sincos":
        tables = [
            sincos_table(
                part,
                width=layout.width,
                spatial_scale=layout.spatial_scale,
                temporal_scale=layout.temporal_scale,
            )
            for part in parts
        ]
        return None, None, torch.cat(tables)
    base = layout.base[1:] if layout.positions == "squeezed" else None
    rotary = [rotary_table(part, head_dim=layout.head_dim, base=base) for part in parts]
    return *_with_text(rotary, texts), None


def clip_positions(
    grids: Sequence[Grid], spans: Sequence[Sequence[int]], texts: Sequence[int], layout: Layout
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(cos, sin) that count on through the spans of a clip; None where no layer takes them, or no clip has
    several."""
    if not layout.long_context or all(len(clip) == 1 for clip in spans):
        return None, None
    base = layout.base[1:] if layout.positions == "squeezed" else None
    rotary: list[Rotary] = []
    for (frames, height, width), clip in zip(grids, spans, strict=True):
        cos, sin = rotary_table((frames, height, width), head_dim=layout.head_dim, base=base)
        lengths = [patches * height * width for patches in clip]
        rotary += zip(cos.split(lengths), sin.split(lengths), strict=True)
    return _with_text(rotary, texts)


def _with_text(rotary: Sequence[Rotary], texts: Sequence[int]) -> Rotary:
    """Tables of spans -> that of the stream; text is not rotated."""
    cos, sin = [], []
    for (span_cos, span_sin), text in zip(rotary, texts, strict=True):
        cos += [span_cos.new_ones(text, span_cos.shape[1]), span_cos]
        sin += [span_sin.new_zeros(text, span_sin.shape[1]), span_sin]
    return torch.cat(cos), torch.cat(sin)


def learned_rows(grids: Sequence[Grid], text_lengths: Sequence[int], layout: Layout) -> torch.Tensor:
    """Rows of a table that has those of the longest prompt first, then those of the base grid."""
    frames, height, width = layout.base
    video = torch.arange(layout.max_text, layout.max_text + frames * height * width)
    return torch.cat([video.repeat(len(grids)), *(torch.arange(text) for text in text_lengths)])


def rotary_table(
    grid: Grid, *, head_dim: int, base: tuple[int, int] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin), each [V, D] float32; `base` is the (height, width) grid of 1.0, None for 1.5."""

    def make() -> Rotary:
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

    cos, sin = _TABLES.get(("rotary", grid, head_dim, base), make)
    return cos, sin


def sincos_table(grid: Grid, *, width: int, spatial_scale: float, temporal_scale: float) -> torch.Tensor:
    """[V, E] float32, added to the embedded patches of CogVideoX 2B."""

    def make() -> tuple[torch.Tensor]:
        frames, rows, columns = grid
        table: torch.Tensor = get_3d_sincos_pos_embed(
            width, (columns, rows), frames, spatial_scale, temporal_scale, output_type="pt"
        )
        return (table.flatten(0, 1).float(),)

    (table,) = _TABLES.get(("sincos", grid, width, spatial_scale, temporal_scale), make)
    return table


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
