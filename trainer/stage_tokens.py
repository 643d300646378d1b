"""A stage's tokens: windows and prompts in; the room that each sample takes of a pack out.

Counted as the model's token stream holds them, and held against the stage's budget and token rule before
anything is read. The trade-off: where the model keeps prompts out of its stream they take no room at all.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from schemas.bucket import PATCH
from schemas.errors import ConfigError
from schemas.train_config import DataConfig, StageConfig
from trainer.curriculum import budget_of
from trainer.layout import num_spans
from trainer.mixture import Mixture


class StageTokens:
    """Of every row of a mixture; arrays are int64 [n]."""

    def __init__(
        self,
        mixture: Mixture,
        latent_frames: np.ndarray,
        *,
        data: DataConfig,
        patch_t: int,
        local_frames: int,
        text: Literal["joint", "cross"],
    ) -> None:
        """`latent_frames` [n] are those of the windows; the rest as of `StagePlan`."""
        catalogs = mixture.catalogs
        shapes = np.concatenate([each.shapes for each in catalogs])
        self.cells = shapes[:, 2] // PATCH * (shapes[:, 3] // PATCH)
        """Tokens of a latent frame, or of `patch_t` of them."""
        # A clip is filled up to whole patches in time, see fill_patches.
        self.video = -(-latent_frames // patch_t) * self.cells
        self.spans = num_spans(
            latent_frames,
            local_frames=local_frames,
            leading_frames=mixture.card.geometry.leading_frames,
            patch_t=patch_t,
        )
        """Attention spans of a window, each with its prompt."""
        self._in_stream = text == "joint"
        self.prompts = self._in_stream * np.concatenate([each.prompt_shapes[:, 0] for each in catalogs])
        """Of one span."""
        self.whole = self.video + self.spans * self.prompts
        """Video and prompt, with the caption."""
        self._empty = self.prompts
        if data.caption_dropout:
            empty = np.repeat([each.empty_prompt_tokens for each in catalogs], np.diff(mixture.starts))
            self._empty = self._in_stream * empty
        self.uncaptioned = self.video + self.spans * self._empty
        """With the empty prompt in its place; without caption dropout the same."""
        self._mixture, self._data = mixture, data

    def check_budget(self, stage: StageConfig, used: np.ndarray) -> None:
        """ConfigError where one of the rows `used` does not fit into a pack."""
        budget = budget_of(stage, self._data)
        most = np.maximum(self.whole, self.uncaptioned)
        longest = int(used[most[used].argmax()])
        if most[longest] > budget:
            name = "data.budget_tokens" if stage.budget_tokens is None else "its budget_tokens"
            video, tokens = self.video[longest], most[longest]
            raise ConfigError(
                f"{name} = {budget}: sample {self._mixture.sample_id(longest)} alone needs {tokens} tokens "
                f"in stage {stage.name!r} ({video} video, {tokens - video} prompt); set {name} to "
                f"{tokens} or more, or the stage's max_s lower"
            )

    def check_multiple(self, stage: StageConfig, used: np.ndarray) -> None:
        """ConfigError where one of the rows `used`, with its caption or without, breaks the token rule."""
        multiple = stage.token_multiple
        tokens = np.stack([self.whole, self.uncaptioned])[:, used]
        breaks = np.argwhere(tokens % multiple > 0)
        if not len(breaks):
            return
        dropped, at = breaks[0].tolist()
        row = int(used[at])
        spans, prompt = int(self.spans[row]), int((self._empty if dropped else self.prompts)[row])
        caption = "empty prompt" if dropped else "prompt"
        kinds = np.unique(np.column_stack([self.video, self.spans])[used] % multiple, axis=0)
        shorter, longer = (
            range(prompt - 1, max(0, prompt - 1 - multiple), -1),
            range(prompt + 1, prompt + multiple),
        )
        near = [
            length
            for way in (shorter, longer)
            if self._in_stream
            and (length := next((n for n in way if not ((kinds @ [1, n]) % multiple).any()), None))
        ]
        raise ConfigError(
            f"stage {stage.name!r}: token_multiple = {multiple}, sample {self._mixture.sample_id(row)} "
            f"has {tokens[dropped, at]} tokens ({self.video[row]} video, {spans} x {prompt} {caption}); "
            + (
                f"prompts of {' or '.join(map(str, near))} tokens (text_encoder.max_length, with padding = "
                "'full') suit all windows"
                if near
                else "no length of prompts suits all windows: other windows are needed"
            )
        )
