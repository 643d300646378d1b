"""What is told about a clip: by its file (`ClipInfo`), by the settings it meets (`Placed`), and by the
frames taken from it (`ClipRecord`).

Plain values only: both travel as JSON between processes and into the sample's metadata.
"""

from __future__ import annotations

from dataclasses import dataclass

HDR = {"smpte2084": "PQ", "arib_std_b67": "HLG"}
"""Transfer curves of high dynamic range, and what people call them."""


@dataclass(frozen=True)
class ClipInfo:
    """A readable file: its packets read, its first picture decoded."""

    codec: str
    container: str
    pixel_format: str
    width: int
    """Coded pixels, before sample aspect ratio and rotation."""
    height: int
    display_width: int
    """Pixels a player shows: after sample aspect ratio and rotation."""
    display_height: int
    sar: str
    """Sample aspect ratio, such as "1:1"."""
    rotation: int
    """Degrees clockwise a player turns the picture: 0, 90, 180 or 270."""
    fps: float
    """Mean pictures per second."""
    duration_s: float
    num_pictures: int
    num_key_pictures: int
    color_matrix: str
    color_range: str
    color_rule: str
    """"tagged" by the file, or how an untagged one was taken: "untagged:bt709"."""
    color_transfer: str
    interlaced: bool
    alpha: bool
    file_bytes: int
    variable_rate: bool = False
    """Whether the pictures keep no constant rate."""


@dataclass(frozen=True)
class Decoded:
    """What a decode of every picture of a window found."""

    num_pictures: int
    """That came out sound."""
    num_damaged: int
    """Whose packet gives an error, or that the decoder flags, or that follow one before the next clean
    key picture."""
    num_hidden: int
    """Packets that silently give no picture."""


@dataclass(frozen=True)
class Placed:
    """What will become of a row, known before its pictures are decoded."""

    info: ClipInfo
    bucket: int
    """Position in the config's buckets."""
    num_frames: int
    """Of each of its samples."""
    num_available: int
    """Frames its window fills without repeating or blending."""
    num_clips: int
    """Samples it makes: 1, or more where `frames.clips` says so."""
    notes: list[str]
    """What a person should know of how its frames are chosen, one sentence each."""
    decoded: Decoded | None
    """Where a full check was asked for."""


@dataclass(frozen=True)
class ClipRecord:
    """Where the frames of one sample come from. Positions count output frames; seconds count from the
    stream's first picture."""

    codec: str
    container: str
    source_width: int
    source_height: int
    rotation: int
    sar: str
    source_fps: float
    duration_s: float
    """Of the clip, or of its time window."""
    num_pictures: int
    """Pictures in the clip, or in its time window."""
    pts_s: list[float]
    """When each frame was on screen; a blended frame's own time, a stand-in's for a repaired one."""
    coverage: float
    """Share of `duration_s` that the frames stand for."""
    effective_fps: float
    """Frames per second of source time."""
    interpolated: list[int]
    """Positions blended from two pictures."""
    duplicated: list[int]
    """Positions that repeat the picture before them."""
    clip: int
    """Which of the clips of its row this is, from 0."""
    num_fed: int
    """Packets the decoder was given for it, the last time through; the others were not needed."""
    repaired: list[int]
    """Positions whose picture was undecodable: they hold its nearest decodable neighbour."""
    frame_weights: list[float]
    """Activity of each frame from packet sizes; mean 1."""
    color_matrix: str
    color_range: str
    color_rule: str
    color_transfer: str
    interlaced: bool
    notes: list[str]
    """What else a reader of the sample should know, one sentence each."""
