"""The demo's clips: a folder in, thirteen short captioned videos and their manifest out.

Every clip is awkward in its own way, as collected clips are: codec, container, rate, size, shape,
timing, orientation, damage. The same folder content comes from every run on one version of the encoders:
they run on one thread and the containers carry no dates. Sizes are moderate, so that it takes seconds.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

from jobs import scenes

X264 = {"preset": "veryfast", "crf": "20"}
X265 = {"preset": "superfast", "crf": "22", "x265-params": "pools=none:frame-threads=1:log-level=none"}
# libvpx's "realtime" adapts to the clock, and x264 in 4:4:4 is not reproducible: neither is used.
VPX = {"deadline": "good", "cpu-used": "5", "crf": "12", "b": "1500k"}
SVT = {"preset": "8", "crf": "32", "svtav1-params": "lp=1"}
QUANTIZER = {"qmin": "3", "qmax": "5"}


@dataclass(frozen=True)
class DemoClip:
    """One clip: what it shows, how it is encoded, and its quirk."""

    file: str
    scene: scenes.Scene
    caption: str
    size: tuple[int, int]
    """Displayed width and height; `sample_aspect` and `rotation` change what is stored."""
    fps: Fraction
    seconds: float
    codec: str
    options: dict[str, str] = field(default_factory=dict)
    pix_fmt: str = "yuv420p"
    sample_aspect: Fraction = Fraction(1)
    rotation: int = 0
    """Degrees counter-clockwise that a player turns the stored picture by."""
    variable_rate: bool = False
    """The second half shows every third picture only, each for three times as long."""
    full_range: bool = False
    """Tagged and converted as full-range BT.709; otherwise untagged, as most files are."""
    truncated: bool = False
    """Cut off before its index: cannot be opened."""
    quirk: str = ""


CLIPS = (
    DemoClip(
        "sailing_boat.mkv", scenes.sailing_boat,
        "A small boat with a white and a red sail rocks on blue waves while the sun climbs.",
        (720, 480), Fraction(24), 5, "libx265", X265, quirk="HEVC in Matroska",
    ),
    DemoClip(
        "bouncing_ball.mp4", scenes.bouncing_ball,
        "A shiny red ball bounces across a blue and white checkered floor.",
        (640, 360), Fraction(60), 4, "libx264", X264, quirk="60 frames per second",
    ),
    DemoClip(
        "steam_train.webm", scenes.steam_train,
        "A red steam locomotive pulls a blue and a yellow carriage past green hills.",
        (640, 360), Fraction(25), 5, "libvpx-vp9", VPX, quirk="VP9 in WebM, no frame count",
    ),
    DemoClip(
        "wall_clock.avi", scenes.wall_clock,
        "A wall clock with a swinging golden pendulum on pale green wallpaper; its hands turn fast.",
        (480, 480), Fraction(12), 6, "mpeg4", QUANTIZER, quirk="square, 12 frames per second, MPEG-4",
    ),
    DemoClip(
        "color_wheel.mov", scenes.color_wheel,
        "A wheel of rainbow colors spins faster and faster on a dark background.",
        (400, 400), Fraction(30), 4, "mjpeg", {"qmin": "2", "qmax": "3"}, "yuvj420p",
        quirk="every picture a key frame, full range",
    ),
    DemoClip(
        "lighthouse.mp4", scenes.lighthouse,
        "At night a red and white lighthouse sweeps its beam over the sea under the stars.",
        (360, 640), Fraction(24), 5, "libsvtav1", SVT, quirk="portrait, AV1",
    ),
    DemoClip(
        "kite.webm", scenes.kite,
        "A child in a red shirt flies a yellow and orange kite with a long tail in a blue sky.",
        (640, 426), Fraction(30), 5, "libvpx", VPX, quirk="VP8",
    ),
    DemoClip(
        "fish_tank.ts", scenes.fish_tank,
        "Orange, yellow and pink fish swim between swaying green plants and rising bubbles.",
        (853, 480), Fraction(30000, 1001), 5, "mpeg2video", QUANTIZER,
        sample_aspect=Fraction(32, 27), quirk="pixels that are not square, 29.97 frames per second",
    ),
    DemoClip(
        "windmill.gif", scenes.windmill,
        "A brown windmill turns its white sails behind rows of colorful tulips.",
        (320, 240), Fraction(25, 2), 5, "gif", {}, "rgb8", quirk="animated GIF",
    ),
    DemoClip(
        "hot_air_balloon.mp4", scenes.hot_air_balloon,
        "Two striped hot air balloons rise over snow-capped mountains.",
        (640, 480), Fraction(30), 5, "libx264", X264, variable_rate=True, quirk="variable frame rate",
    ),
    DemoClip(
        "rocket.mp4", scenes.rocket,
        "A white rocket with red fins lifts off from its pad and climbs into the night sky.",
        (360, 640), Fraction(30), 4, "libx264", X264,
        rotation=90, quirk="stored sideways, turned by metadata",
    ),
    DemoClip(
        "sunrise.mkv", scenes.sunrise,
        "The sun rises quickly behind purple mountains as three birds fly by.",
        (427, 241), Fraction(24), 20 / 24, "libvpx-vp9", VPX,
        full_range=True, quirk="20 pictures only, odd size, full-range BT.709",
    ),
    DemoClip(
        "cut_short.mp4", scenes.steam_train,
        "A steam train passes by.",
        (640, 360), Fraction(25), 2, "libx264", X264,
        truncated=True, quirk="broken: the end of the file is missing",
    ),
)  # fmt: skip


def make_demo(directory: Path) -> Path:
    """Draw and encode every clip into `directory`/clips; returns the path of manifest.jsonl beside it."""
    folder = directory / "clips"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for clip in CLIPS:
        write_clip(clip, folder)
        rows.append({"video": f"clips/{clip.file}", "caption": clip.caption, "quirk": clip.quirk})
    manifest = directory / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return manifest


def write_clip(clip: DemoClip, folder: Path) -> Path:
    """Encode one clip; returns its path."""
    os.environ.setdefault("SVT_LOG", "1")  # errors only: the AV1 encoder prints all its settings otherwise
    path = folder / clip.file
    turns = clip.rotation // 90
    size = (round(clip.size[0] / clip.sample_aspect), clip.size[1])
    num_pictures = round(clip.seconds * clip.fps)
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(clip.codec, rate=clip.fps, options=clip.options)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height = size[::-1] if turns % 2 else size
        stream.pix_fmt = clip.pix_fmt
        context = stream.codec_context
        context.thread_count = 1
        context.sample_aspect_ratio = clip.sample_aspect
        if clip.full_range:
            context.color_range, context.colorspace = ColorRange.JPEG, Colorspace.ITU709
        if clip.rotation:
            stream.set_display_rotation(clip.rotation)
        for i in range(num_pictures):
            if clip.variable_rate and 2 * i > num_pictures and i % 3:
                continue
            picture = clip.scene(float(i / clip.fps), *clip.size).resize(size)
            # The stored picture is turned the other way, so that the player's turn sets it upright.
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(np.rot90(np.asarray(picture), -turns)))
            if clip.full_range:
                frame = frame.reformat(
                    format=clip.pix_fmt, dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.JPEG
                )
            frame.pts, frame.time_base = i, 1 / clip.fps
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    if clip.truncated:
        # An MP4 keeps its index at the end: without it no player can open the file.
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    return path
