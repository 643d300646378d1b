"""Keyframe boosting: which share of the frames falls where things happen.

In: a folder of clips. Out: a table, a line in benchmarks/results/boost.jsonl and docs/images/boost.png. A
clip is drawn with one burst of motion; of real clips the tenth of the time with the most true luma
change counts as bursts. Shares are means over `COUNTS`, as one count of frames is a matter of luck; the
plot shows `SHOWN` frames.

    python -m benchmarks.boost CLIPS_FOLDER
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.record import append_result
from pipeline.activity import luma_activity, packet_activity
from pipeline.frames import choose_frames
from pipeline.luma import luma_changes
from pipeline.media import open_media
from pipeline.pictures import PictureDecoder
from pipeline.timeline import Timeline
from schemas.config import FramesConfig, LimitsConfig

CLIPS = (
    "one-by-one-person-detection.mp4",
    "scene_cuts.mp4",
    "bikes.mp4",
    "test_video_30s.mp4",
    "derived_long_5min_720p_h264.mp4",
)
PLOTTED = ("drawn burst", *CLIPS[:2])
COUNTS = (33, 41, 49, 65, 81)
SHOWN = 49
BOOSTS = (1.0, 2.0, 4.0)
PLOT = Path(__file__).parent.parent / "docs" / "images" / "boost.png"
_BINS = 100
_DRAWN_PICTURES, _BURST = 500, range(225, 275)


@dataclass(frozen=True)
class Measured:
    """One clip, its two kinds of activity and where its bursts are."""

    name: str
    timeline: Timeline
    packets: Sequence[int]
    exact: list[int]
    changes: list[float]
    """True luma change of each picture, 0..255."""
    bursts: frozenset[int]
    """Hundredths of the clip's time."""

    def hundredth(self, picture: int) -> int:
        pts, end = self.timeline.pts, self.timeline.end
        return (pts[picture] - pts[0]) * _BINS // (end - pts[0])

    def pictures(self, num_frames: int, boost: float, activity: Sequence[int] | None = None) -> Sequence[int]:
        frames = FramesConfig(policy="keyframe", boost=boost)
        return choose_frames(self.timeline, num_frames=num_frames, frames=frames, activity=activity).pictures

    def share(self, boost: float, activity: Sequence[int] | None = None) -> float:
        """Share of the frames that lie inside bursts."""
        return statistics.fmean(
            statistics.fmean(self.hundredth(p) in self.bursts for p in self.pictures(count, boost, activity))
            for count in COUNTS
        )

    @property
    def correlation(self) -> float:
        """Spearman's, of packet activity and true luma change, in as many bins as frames are shown."""
        return _spearman(_binned(self.packets, SHOWN), _binned(self.changes, SHOWN))


def run(folder: Path) -> list[Measured]:
    """Every clip measured; those that `folder` lacks are left out."""
    with tempfile.TemporaryDirectory(prefix="latentpress-bench-") as scratch:
        drawn = Path(scratch) / "burst.mp4"
        draw_burst(drawn)
        found = [measure(drawn, name=PLOTTED[0], burst=_BURST)]
    return found + [measure(folder / name, name=name) for name in CLIPS if (folder / name).is_file()]


def measure(path: Path, *, name: str, burst: range | None = None) -> Measured:
    """Decode all of a clip. `burst`: pictures of the known one; None takes the busiest tenth of the time."""
    limits = LimitsConfig()
    with open_media(path, limits=limits) as media:
        timeline = media.packets.timeline
        changes, hidden = luma_changes(PictureDecoder(media, limits=limits), timeline)
    timeline = timeline.without(hidden)
    known = [changes.get(tick, 0.0) for tick in timeline.pts]
    result = Measured(
        name, timeline, packet_activity(timeline), luma_activity(timeline, changes), known, frozenset()
    )
    if burst is None:
        per_bin = [0.0] * _BINS
        for picture, change in enumerate(known):
            per_bin[result.hundredth(picture)] += change
        busiest = sorted(range(_BINS), key=lambda k: -per_bin[k])[: _BINS // 10]
        bursts = frozenset(busiest)
    else:
        bursts = frozenset(result.hundredth(picture) for picture in burst)
    return Measured(name, timeline, result.packets, result.exact, known, bursts)


def draw_burst(path: Path) -> None:
    """20 s of H.264: a still, faintly noisy picture that slides quickly for a tenth of the time."""
    random = np.random.default_rng(0)
    width, height = 320, 192
    blocks = random.integers(40, 200, (height // 8, width // 8, 3))
    scene = np.kron(blocks, np.ones((8, 8, 1), np.int64))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "veryfast", "crf": "23"})
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        for i in range(_DRAWN_PICTURES):
            moved = i - _BURST.start + 1 if i in _BURST else 0
            noise = random.integers(-4, 5, scene.shape)
            pixels = (np.roll(scene, (3 * moved, 5 * moved), (0, 1)) + noise).astype(np.uint8)
            frame = VideoFrame.from_ndarray(pixels, "rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def plot(clips: Sequence[Measured], path: Path) -> None:
    """Per clip the activity over time with bursts shaded, and the frames of each setting as ticks."""
    figure = Figure(figsize=(10, 3.1 * len(clips) + 0.4), layout="constrained", dpi=100)
    rows = figure.subplots(2 * len(clips), 1, height_ratios=[1.0, 1.25] * len(clips))
    for k, clip in enumerate(clips):
        _plot_activity(rows[2 * k], clip)
        _plot_frames(rows[2 * k + 1], clip)
    rows[-1].set_xlabel("seconds")
    handles, labels = rows[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=10)
    figure.savefig(path)


def _plot_activity(axes: Axes, clip: Measured) -> None:
    times = [(k + 0.5) / _BINS * clip.timeline.duration_s for k in range(_BINS)]
    _shade(axes, clip, label="bursts: the tenth of the time with the most change")
    for values, color, label in (
        (clip.exact, "#9aa5b1", "true luma change"),
        (clip.packets, "#1f5fa8", "from packet sizes"),
    ):
        curve = np.sqrt(_binned(values, _BINS))  # roots, so that one cut does not flatten all the rest
        curve = curve / max(1.0, float(curve.max()))
        if label.startswith("true"):
            axes.fill_between(times, curve, color=color, linewidth=0, label=label)
        else:
            axes.plot(times, curve, color=color, linewidth=1.1, label=label)
    axes.set_title(clip.name, loc="left", fontsize=11, fontweight="bold")
    axes.set_ylim(0, 1.08)
    axes.set_yticks([])
    axes.set_ylabel("activity", fontsize=9)
    axes.tick_params(labelbottom=False)
    _frame(axes, clip)


def _plot_frames(axes: Axes, clip: Measured) -> None:
    settings: list[tuple[str, float, Sequence[int] | None]] = [("uniform", 0.0, None)]
    settings += [(f"boost {boost:g}", boost, None) for boost in BOOSTS]
    settings.append(("boost 2, exact", 2.0, clip.exact))
    _shade(axes, clip)
    origin = clip.timeline.pts[0]
    for row, (_, boost, activity) in enumerate(settings):
        shown = clip.pictures(SHOWN, boost, activity)
        at = [float((clip.timeline.pts[p] - origin) * clip.timeline.time_base) for p in shown]
        axes.vlines(at, row - 0.36, row + 0.36, color="#333333" if row else "#888888", linewidth=1.3)
        axes.text(
            1.008,
            row,
            f"{clip.share(boost, activity):.0%}",
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize=10,
        )
    axes.text(1.008, -0.85, "in bursts", transform=axes.get_yaxis_transform(), va="bottom", fontsize=8)
    axes.set_yticks(range(len(settings)), [label for label, _, _ in settings], fontsize=10)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(settings) - 0.5, -0.5)
    _frame(axes, clip)


def _shade(axes: Axes, clip: Measured, label: str = "") -> None:
    width = clip.timeline.duration_s / _BINS
    for k in sorted(clip.bursts):
        axes.axvspan(k * width, (k + 1) * width, color="#ffd9a0", linewidth=0, label=label)
        label = ""


def _frame(axes: Axes, clip: Measured) -> None:
    axes.set_xlim(-0.005 * clip.timeline.duration_s, clip.timeline.duration_s)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _binned(values: Sequence[float], bins: int) -> np.ndarray:
    """Means of `bins` runs of about the same number of pictures."""
    edges = [-(-k * len(values) // bins) for k in range(bins + 1)]
    return np.array([np.mean(values[a : max(b, a + 1)]) for a, b in pairwise(edges)])


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation of ranks; 0 where one side is constant."""
    left, right = _ranks(a), _ranks(b)
    return float(np.corrcoef(left, right)[0, 1]) if left.std() and right.std() else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, equal values sharing their mean."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts + 1) / 2)[group]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.boost", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the clips are")
    clips = run(parser.parse_args().folder)
    table = Table(
        "clip",
        "Spearman",
        "uniform",
        *(f"{how} {boost:g}" for how in ("packets", "exact") for boost in BOOSTS),
    )
    numbers = {}
    for clip in clips:
        shares = [clip.share(boost, how) for how in (None, clip.exact) for boost in BOOSTS]
        numbers[clip.name] = {
            "spearman": round(clip.correlation, 2),
            "uniform": round(clip.share(0), 3),
            "packets": [round(share, 3) for share in shares[: len(BOOSTS)]],
            "exact": [round(share, 3) for share in shares[len(BOOSTS) :]],
        }
        table.add_row(
            clip.name,
            f"{clip.correlation:.2f}",
            f"{clip.share(0):.1%}",
            *(f"{share:.1%}" for share in shares),
        )
    Console(width=160).print(table)
    append_result("boost", {"num_frames": COUNTS, "boosts": BOOSTS, "share_in_bursts": numbers})
    plot([clip for clip in clips if clip.name in PLOTTED], PLOT)


if __name__ == "__main__":
    main()
