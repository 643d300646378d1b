"""The two encoders of a worker: which of them is in memory, and how much each takes at once.

One at a time is loaded, unless `executor.together`. When memory runs out, something gives way and is not
taken back by this worker: first the other encoder, if it is idle in memory, then half of the batch, for the
shape that ran out and all larger ones. Whether frames are cut into tiles is never changed here: that changes
numbers, and is settled before the first unit.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pipeline.decoders import clock
from pipeline.starved import EncoderStarved, free_memory, is_starved
from pipeline.text_encode import TextEncoder, load_text_encoder
from pipeline.video_encode import VideoEncoder, load_video_encoder
from schemas.adoption import unlike_card
from schemas.card import Card
from schemas.config import PreprocessConfig
from schemas.errors import RunError
from schemas.sample import Family

Shape = tuple[int, int, int]
"""F, H, W of one clip."""
Incident = tuple[str, str]
"""Kind, and a sentence."""


@dataclass(frozen=True)
class Lack:
    """What memory ran out over."""

    family: Family
    why: str
    count: int = 0
    """Clips or captions that were encoded at once; 0 while the encoder was loaded."""
    shape: Shape | None = None
    """Of the clips."""
    tiled: bool = False

    @property
    def over(self) -> str:
        if not self.count:
            return f"loading the {_NAMES[self.family]} encoder"
        if self.shape is None:
            return f"encoding {self.count} caption{'s' if self.count > 1 else ''} at once"
        size = "x".join(map(str, self.shape))
        how = " in tiles" if self.tiled else ""
        return f"encoding {self.count} clip{'s' if self.count > 1 else ''} of {size} at once{how}"


class Starved(Exception):
    """Memory ran out in an encoder; its traceback may hold what it ran out over."""

    def __init__(self, lack: Lack) -> None:
        super().__init__(lack.over)
        self.lack = lack


@contextlib.contextmanager
def starving(
    family: Family, *, count: int = 0, shape: Shape | None = None, tiled: bool = False
) -> Iterator[None]:
    """Turn an error of what is done inside into Starved, where it means that memory ran out."""
    try:
        yield
    except Exception as error:
        if not is_starved(error):
            raise
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise Starved(Lack(family, why, count, shape, tiled)) from error


class Encoders:
    """Loads and drops the encoders of one worker, and remembers what fits."""

    def __init__(self, config: PreprocessConfig, card: Card | None = None) -> None:
        """With `card`, encoders of which another dataset would be made are refused."""
        self._config, self._card = config, card
        self._together = config.executor.together
        self._video: VideoEncoder | None = None
        self._text: TextEncoder | None = None
        self._most_clips: dict[Shape, int] = {}
        """Clips at once for this shape and larger ones, where memory ran out over more."""
        self._most_captions: int | None = None
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="latentpress-encode")
        """The one that clips are encoded on, for as long as the worker is there: cuDNN keeps its plans by
        thread."""

    def video(self, seconds: dict[str, float]) -> VideoEncoder:
        """The video encoder, loaded; Starved where it does not fit, RunError where it is not the card's."""
        if self._video is None:
            with clock(seconds, "load"):
                self._make_room_for("latents")
                image = self._card.image if self._card else None
                video = load_video_encoder(self._config.video_encoder, image=image)
                self._hold_against_card("latents", video.hard_fields())
                self._keep_to_share()
                with starving("latents"):
                    video.load()
            self._video = video
        return self._video

    def text(self, seconds: dict[str, float]) -> TextEncoder:
        """The text encoder, loaded; Starved where it does not fit, RunError where it is not the card's."""
        if self._text is None:
            with clock(seconds, "load"):
                self._make_room_for("prompts")
                text = load_text_encoder(self._config.text_encoder)
                self._hold_against_card("prompts", text.hard_fields())
                self._keep_to_share()
                with starving("prompts"):
                    text.load()
            self._text = text
        return self._text

    def clips_at_once(self, shape: Shape) -> int:
        """Of the video encoder, which is loaded."""
        assert self._video is not None
        known = [most for small, most in self._most_clips.items() if is_within(small, shape)]
        return min([self._video.batch_size(shape), *known])

    def captions_at_once(self) -> int:
        """Of the text encoder, which is loaded."""
        assert self._text is not None
        return self._most_captions or self._text.batch_size()

    def give_way(self, lack: Lack) -> Incident:
        """Use less memory from now on, and what that is; EncoderStarved where there is nothing less.

        Call it when nothing holds the error any more, so that what it ran out over is gone.
        """
        over = _told(lack)
        idle: Family = "prompts" if lack.family == "latents" else "latents"
        if (self._text if idle == "prompts" else self._video) is not None:
            self._together = False
            self._make_room_for(lack.family)
            return "encoder_dropped", f"{over}; the {_NAMES[idle]} encoder, idle, is no longer kept in memory"
        free_memory()
        if lack.count < 2:
            raise EncoderStarved(self.verdict(lack))
        now = self.captions_at_once() if lack.shape is None else self.clips_at_once(lack.shape)
        while now >= lack.count:  # a last batch can be smaller than what is taken at once
            now //= 2
        if lack.shape is None:
            self._most_captions = now
        else:
            self._most_clips[lack.shape] = now
        return "batch_halved", f"{over}; from now on {now} at once"

    def verdict(self, lack: Lack) -> str:
        """What to say where nothing is left to give: what it was over, and what to do."""
        config = self._config.video_encoder if lack.family == "latents" else self._config.text_encoder
        ways = ["more free memory (other programs and executor.workers share it)"]
        if lack.shape is not None:
            ways.append("a smaller bucket in a new dataset")
            if not self._config.video_encoder.segment_frames:
                ways.append("video_encoder.segment_frames, clips in pieces, in a new dataset")
            if not lack.tiled and self._video is not None and self._video.tiling_fields():
                ways.insert(1, "video_encoder.tiling = 'on' in a new dataset")
        if config.compute_dtype == "float32":
            ways.append(f"{_NAMES[lack.family]}_encoder.compute_dtype = 'bfloat16' in a new dataset")
        return f"{_told(lack)}. What helps: {', or '.join(ways)}"

    def _hold_against_card(self, family: Family, fields: dict[str, Any]) -> None:
        """The driver made the card with the files of its machine; those of this one may be others."""
        if self._card is None:
            return
        name = f"{_NAMES[family]}_encoder"
        named = {f"{name}.{field}": value for field, value in fields.items()}
        for field, (card, here) in unlike_card(self._config.output, self._card, family, named).items():
            raise RunError(
                f"{field} is {here!r} on {socket.gethostname()}, the dataset's card says {card!r}: this "
                f"machine has other files under {name}.model = {getattr(self._config, name).model!r}. Copy "
                "the model from where the run was started, or name a folder that all machines share"
            )

    def _keep_to_share(self) -> None:
        """Of a GPU's memory no more than the worker's share: a trial must not find what workers beside each
        other will not."""
        share = self._config.executor.gpus_per_worker
        if share is None or not 0 < share < 1:
            return
        import torch

        if torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(share)

    def _make_room_for(self, family: Family) -> None:
        if self._together:
            return
        if family == "latents" and self._text is not None:
            self._text = None
            free_memory()
        elif family == "prompts" and self._video is not None:
            self._video = None
            free_memory()


_NAMES: dict[Family, str] = {"latents": "video", "prompts": "text"}


def _told(lack: Lack) -> str:
    return f"{lack.over} ran out of memory ({lack.why})"


def is_within(small: Shape, large: Shape) -> bool:
    """Whether a clip of `large` needs at least the memory of one of `small`."""
    return small[0] <= large[0] and small[1] * small[2] <= large[1] * large[2]
