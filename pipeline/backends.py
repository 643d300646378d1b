"""Other decoders behind the interface of `pipeline.pictures`: torchcodec and decord.

In: the ticks chosen on our own timeline. Out: the same pictures as those libraries give them. Each is asked
for by its position in the timeline, and its time as the library tells it must agree, or the clip fails as
`backend`: these libraries have no salvage, and a wrong picture is worse than none. They convert colours
their own way, turn pictures themselves and leave out what 8-bit RGB cannot say (HDR curves, alpha), so
such clips are refused. Kept for comparison, and for NVDEC.
"""

from __future__ import annotations

import bisect
import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from av.video.frame import VideoFrame

from pipeline.clip import HDR
from pipeline.color import TRANSFERS
from pipeline.container import Video, check_pixels
from pipeline.normalize import Normalizer
from pipeline.packets import Packets
from pipeline.pictures import Outcome
from schemas.config import DecodeConfig, LimitsConfig
from schemas.errors import ClipError, MissingExtraError, RunError

BATCH_BYTES = 128 * 2**20
"""Full-size RGB pictures held at once."""


class Given(NamedTuple):
    """A picture as a library gives it."""

    seconds: float
    """Its time in the file, as the library tells it."""
    rgb: np.ndarray
    """uint8 [H, W, 3], upright."""


class LibraryDecoder(ABC):
    """Decodes pictures of one open file through another library."""

    name: str

    def __init__(self, video: Video, packets: Packets, *, limits: LimitsConfig) -> None:
        self._video, self._timeline, self._limits = video, packets.timeline, limits
        if not packets.timed:
            raise self.refusal("its packets do not say when their pictures are shown")
        if TRANSFERS.get(video.decoder.color_trc) in HDR:
            raise self.refusal("it is HDR, and 8-bit RGB has lost what tone mapping needs")
        pixels = video.decoder.format
        if video.stream.metadata.get("alpha_mode") == "1" or (
            pixels is not None and any(component.is_alpha for component in pixels.components)
        ):
            raise self.refusal("it is transparent, and the pictures come without alpha")

    @abstractmethod
    def fetch(self, positions: list[int]) -> Iterator[Given]:
        """The pictures at `positions` of the timeline (sorted), in order."""

    def planned(self, homes: Mapping[int, np.ndarray], normalizer: Normalizer) -> Outcome:
        """Fill `homes` (tick -> [H, W, 3]); a picture whose time disagrees is left out, and doubted."""
        outcome, pts = Outcome(num_fed=len(homes)), self._timeline.pts
        ticks = sorted(homes)
        batch = max(1, BATCH_BYTES // (3 * self._video.decoder.width * self._video.decoder.height))
        for k in range(0, len(ticks), batch):
            part = ticks[k : k + batch]
            for tick, given in zip(
                part, self._given([bisect.bisect_left(pts, t) for t in part]), strict=True
            ):
                if self._nearest(given.seconds) != tick:
                    wanted_s = float(tick * self._timeline.time_base)
                    told = f"{self.name} gives the picture of {given.seconds:.4f} s for {wanted_s:.4f} s"
                    outcome.doubt = outcome.doubt or told
                    continue
                normalizer.convert(self._frame(given.rgb), homes[tick])
                outcome.intact.add(tick)
        return outcome

    def in_order(self, homes: Mapping[int, np.ndarray], normalizer: Normalizer) -> Outcome:
        """As `planned`: there is no other way to ask. ClipError `backend` where a picture is missing."""
        outcome = self.planned(homes, normalizer)
        if outcome.doubt:
            raise self.refusal(outcome.doubt)
        return outcome

    def refusal(self, why: str) -> ClipError:
        return ClipError("backend", f"{self.name} cannot serve this file: {why}; use decode.backend = 'pyav'")

    def _given(self, positions: list[int]) -> Iterator[Given]:
        """`fetch`, with the library's own errors as ClipError."""
        try:
            yield from self.fetch(positions)
        except MemoryError as error:
            raise ClipError("limit_memory", f"no memory for {self.name}'s pictures: {error}") from error
        except Exception as error:
            raise self.refusal(first_line(error)) from error

    def _nearest(self, seconds: float) -> int:
        """Tick of the picture whose time is nearest: libraries round times to 32-bit floats."""
        pts = self._timeline.pts
        tick = seconds / float(self._timeline.time_base)
        k = bisect.bisect_left(pts, tick)
        return min(pts[max(0, k - 1) : k + 1], key=lambda near: abs(near - tick))

    def _frame(self, rgb: np.ndarray) -> VideoFrame:
        height, width, _ = rgb.shape
        check_pixels(width, height, self._limits)
        decoder = self._video.decoder
        turned = width != height and (width, height) == (decoder.height, decoder.width)
        if turned and self._video.sar != 1:
            raise self.refusal("its pixels are not square and it turns the pictures")
        return VideoFrame.from_ndarray(np.ascontiguousarray(rgb), "rgb24")


class TorchcodecBackend(LibraryDecoder):
    """torchcodec in exact mode; on a GPU (`device = "cuda"`) by NVDEC.

    Its times are those of the pictures it gives: with some edit lists they are not the ones asked for.
    """

    name = "torchcodec"

    def __init__(self, video: Video, packets: Packets, *, decode: DecodeConfig, limits: LimitsConfig) -> None:
        super().__init__(video, packets, limits=limits)
        library = load_library(self.name)
        try:
            self._decoder: Any = library.decoders.VideoDecoder(
                video.path,
                stream_index=video.stream.index,
                dimension_order="NHWC",
                num_ffmpeg_threads=decode.threads,
                device=decode.device,
                seek_mode="exact",
            )
        except Exception as error:
            raise self.refusal(first_line(error)) from error

    def fetch(self, positions: list[int]) -> Iterator[Given]:
        found = self._decoder.get_frames_at(positions)
        yield from map(Given, found.pts_seconds.tolist(), found.data.cpu().numpy())


class DecordBackend(LibraryDecoder):
    """decord on the CPU.

    Its times belong to its index, not to the picture it gives, so a wrong picture does not show. Files
    from which it is known to give others are refused: transport and program streams, edit lists, and
    groups that open with pictures of the group before.
    """

    name = "decord"

    def __init__(self, video: Video, packets: Packets, *, decode: DecodeConfig, limits: LimitsConfig) -> None:
        super().__init__(video, packets, limits=limits)
        if video.container_name in ("mpegts", "mpeg"):
            raise self.refusal(f"it gives other pictures than asked for from {video.container_name} files")
        if _has_open_groups(packets):
            raise self.refusal("it gives other pictures than asked for from open groups of pictures")
        library = load_library(self.name)
        library.logging.set_level(library.logging.QUIET)
        try:
            self._reader: Any = library.VideoReader(video.path, num_threads=decode.threads)
        except Exception as error:
            raise self.refusal(first_line(error)) from error
        found, expected = len(self._reader), len(packets.timeline.pts)
        if found != expected:
            raise self.refusal(f"it counts {found} pictures where {expected} are shown")
        self._start = (video.stream.start_time or 0) * float(packets.timeline.time_base)

    def fetch(self, positions: list[int]) -> Iterator[Given]:
        seconds = self._reader.get_frame_timestamp(positions)[:, 0] + self._start
        yield from map(Given, seconds.tolist(), self._reader.get_batch(positions).asnumpy())


def _has_open_groups(packets: Packets) -> bool:
    """Whether a packet after a key packet is shown before it."""
    key = None
    for tick, is_key in zip(packets.pts, packets.keys, strict=True):
        if is_key:
            key = tick
        elif tick is not None and key is not None and tick < key:
            return True
    return False


def load_library(name: str, *, device: str = "cpu") -> Any:
    """The module of a backend, imported; MissingExtraError where it is not installed, RunError where it
    does not load or there is no such device. Do this before file writes are given up: torch makes a
    temporary file."""
    try:
        if device == "cuda" and not importlib.import_module("torch").cuda.is_available():
            raise RunError("decode.device = 'cuda', but torch finds no CUDA device on this machine")
        if name == "torchcodec":
            importlib.import_module("torchcodec.decoders")
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or name, "bench") from None
    except (RuntimeError, OSError) as error:
        raise RunError(
            f"{name} does not load: {first_line(error)}; torchcodec needs the shared libraries of FFmpeg "
            "4 to 8 and a torch of its own kind (constraints.txt)"
        ) from error


def open_backend(
    video: Video, packets: Packets, *, decode: DecodeConfig, limits: LimitsConfig
) -> LibraryDecoder:
    """The decoder that `decode.backend` names, on an open file. ClipError `backend` where it cannot read the
    file; MissingExtraError where the library is not installed."""
    made = TorchcodecBackend if decode.backend == "torchcodec" else DecordBackend
    return made(video, packets, decode=decode, limits=limits)


def first_line(error: Exception) -> str:
    """One line for a person: native errors come with their stack."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
