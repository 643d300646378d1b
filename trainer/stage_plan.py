"""A stage's part of the plan: samples and a stage's settings in; windows, tokens, draws and steps out.

What a visit looks like (window, dropped caption, dropped image) is drawn from the hash of its sample and the
number of its pass, so any visit can be told without those before it, and token counts are exact before
anything is read. The trade-off: a window has the same number of latent frames wherever it begins, which where
times are uneven is not the same time.
"""

from __future__ import annotations

import hashlib
from functools import cached_property

import numpy as np

from schemas.bucket import PATCH
from schemas.errors import ConfigError
from schemas.load import digest_of
from schemas.train_config import StageConfig, TrainConfig
from trainer.curriculum import budget_of, slots_of
from trainer.held_out import check_split, held_out_rows, validation_rows
from trainer.layout import num_spans
from trainer.losses import latent_frame_weights
from trainer.mixture import DatasetOrder, Mixture, Visits, mixed
from trainer.order import key_of, keyed_shares
from trainer.packing import StepWeights, plan_packs
from trainer.plan import LINEAR_COST, PLAN_VERSION, PackPlan, Plan, Step
from trainer.reader import check_windows
from trainer.stage_filter import filtered
from trainer.stage_windows import window_latents, window_seconds
from trainer.visit import Visit

Read = tuple[int, Visit]
"""A visit, and the dataset it goes to."""


class StagePlan:
    """One stage: which samples it uses and how much of each, and its steps."""

    def __init__(
        self,
        mixture: Mixture,
        stage: StageConfig,
        config: TrainConfig,
        *,
        patch_t: int = 1,
        local_frames: int = 0,
        images: bool = False,
    ) -> None:
        """`patch_t`, `local_frames`: latent frames per token and per attention span of the model; `images`:
        it takes an image condition. ConfigError where the stage asks for what samples or budget do not give.
        """
        self.mixture, self.stage = mixture, stage
        self._config, self._patch_t, self._images = config, patch_t, images
        self._key = (config.seed, stage.name)
        wanted, share = filtered(mixture, stage), config.validation.share
        self.is_held_out = held_out_rows(mixture, share=share) & wanted
        """bool [n], of the rows that the stage's filter lets through."""
        if share:
            check_split(mixture, share=share, wanted=wanted, stage=stage.name)
        self.rows = np.flatnonzero(wanted & ~self.is_held_out)
        """int64: those trained on."""
        catalogs = mixture.catalogs
        for each in catalogs:
            check_windows(each.card, stage, images=images)
        shapes = np.concatenate([each.shapes for each in catalogs])
        self._whole = shapes[:, 0]
        self.latent_frames = np.concatenate([window_latents(each, stage) for each in catalogs])
        """[n], of a window."""
        self._sides = shapes[:, 2:]
        self._cells = shapes[:, 2] // PATCH * (shapes[:, 3] // PATCH)
        # A clip is filled up to whole patches in time, see fill_patches.
        self._video_tokens = -(-self.latent_frames // patch_t) * self._cells
        geometry = mixture.card.geometry
        self._spans = num_spans(
            self.latent_frames,
            local_frames=local_frames,
            leading_frames=int(geometry.causal and not geometry.segment_frames),
            patch_t=patch_t,
        )
        self._prompts = np.concatenate([each.prompt_shapes[:, 0] for each in catalogs])
        self.tokens = self._video_tokens + self._spans * self._prompts
        """[n], of video and prompt, with the caption."""
        self._empty_tokens = self.tokens
        if config.data.caption_dropout:
            empty = np.repeat([each.empty_prompt_tokens for each in catalogs], np.diff(mixture.starts))
            self._empty_tokens = self._video_tokens + self._spans * empty
        self._check_budget()
        self._check_multiple()
        # Where windows may begin: at every latent frame, or at those of whole pieces.
        piece = geometry.latent_frames(geometry.segment_frames) if stage.window == "segments" else 1
        self._piece = piece
        self._orders = [self._order(number) for number in range(len(catalogs))]
        fingerprints = [each.card.fingerprint for each in catalogs]
        self._costs = self.tokens * (self.tokens // self._spans + LINEAR_COST)
        self.plan = Plan(
            self._epoch,
            costs=self._costs,
            key=(*fingerprints, stage.name, config.seed),
            capacity=budget_of(stage, config.data),
            slots=slots_of(stage, config.data),
            balance_packs=config.data.balance_packs,
        )

    @property
    def cuts(self) -> bool:
        """Whether any window is less than its sample."""
        return bool((self.latent_frames < self._whole)[self.rows].any())

    @property
    def latent_shapes(self) -> set[tuple[int, int, int]]:
        """T, H, W of the windows that are trained on."""
        shapes = np.column_stack([self.latent_frames, self._sides])[self.rows]
        return {(t, h, w) for t, h, w in np.unique(shapes, axis=0).tolist()}

    def step(self, step: int) -> Step:
        """The packs of a step of the stage, over all ranks."""
        return self.plan.step(step)

    def step_weights(self, packs: Step) -> StepWeights:
        rows = np.array([row for pack in packs for row in pack.rows])
        passes = np.array([turn for pack in packs for turn in pack.passes])
        video = float(self._video_tokens[rows].sum())
        if self._frame_weights is not None:
            video = sum(map(self._weighted_tokens, rows.tolist(), self._first(rows, passes).tolist()))
        return StepWeights(len(rows), video, int(self._tokens(rows, passes).sum()))

    def reads(self, pack: PackPlan) -> list[Read]:
        """What a pack of a step is made of."""
        rows, passes = np.array(pack.rows), np.array(pack.passes)
        empty, drop_image = self._empty(rows, passes), self._drop_image(rows, passes)
        fields = zip(
            pack.rows,
            pack.passes,
            self._first(rows, passes).tolist(),
            empty.tolist(),
            drop_image.tolist(),
            strict=True,
        )
        seed, stage = self._key
        return [
            self._read(row, f"{seed}/{stage}/{turn}", first, empty_prompt=empty, drop_image=drop)
            for row, turn, first, empty, drop in fields
        ]

    def validation_reads(self, limit: int) -> list[list[Read]]:
        """Packs of at most `limit` clips held out (of those trained on where none are), with their captions
        and the windows' prefix: the same at every step, however the stage draws its own."""
        among = np.flatnonzero(self.is_held_out) if self._config.validation.share else self.rows
        rows = validation_rows(self.mixture, among, limit=limit)
        packs = plan_packs(self.tokens[rows].tolist(), capacity=budget_of(self.stage, self._config.data))
        key = f"validation/{self._config.seed}"
        return [[self._read(row, key, 0) for row in rows[pack].tolist()] for pack in packs]

    def digest(self) -> str:
        """Equal digests mean equal steps: the same samples in the same packs, drawn alike."""
        data, rows, mixture = self._config.data, self.rows, self.mixture
        state = hashlib.sha256()
        drawn = [self._whole] if self.stage.window != "prefix" and self.cuts else []
        by_row = [mixture.row_hashes, self.latent_frames, self._video_tokens, self.tokens, self._empty_tokens]
        for values in (*by_row, self._costs, *drawn):
            state.update(values[rows].tobytes())
        counts = []
        for number, catalog in enumerate(mixture.catalogs):
            own = self._own_rows(number)
            counts.append(len(own))
            state.update(np.unique(catalog.shards[own], return_counts=True)[1].tobytes())
            if self._frame_weights is not None:
                of_own = np.repeat(np.isin(np.arange(len(catalog)), own), catalog.shapes[:, 0])
                state.update(self._frame_weights[number][0][of_own].tobytes())
        lot = data.captions == "lot" and len(np.unique(mixture.clip_hashes[rows])) < len(rows)
        rules = [
            [catalog.card.fingerprint for catalog in mixture.catalogs],
            [str(weight) if count else "" for weight, count in zip(mixture.weights, counts, strict=True)],
            [budget_of(self.stage, data), slots_of(self.stage, data), self.plan.window],
            [lot, data.caption_dropout, data.image_dropout if self._images else 0.0],
            [self._piece if self.stage.window != "prefix" and self.cuts else 0],
        ]
        return digest_of([PLAN_VERSION, *self._key, *rules, counts, state.hexdigest()])

    def describe(self) -> list[str]:
        """What the stage makes of the samples, in lines."""
        data, stage, tokens = self._config.data, self.stage, self.tokens[self.rows]
        packs, fill = self.plan.epoch_size()
        slots = slots_of(stage, data)
        used, there = len(self.rows), len(self.mixture)
        some = "" if used == there else f"{used} of {there} samples, "
        lines = [
            f"stage {stage.name}: {some}{tokens.min()} to {tokens.max()} tokens a sample, {packs} packs "
            f"({packs / slots:.1f} steps) an epoch, {fill:.1%} full; packs of like cost share a step, "
            f"among {self.plan.window}"
        ]
        if self._config.validation.share:
            lines.append(f"stage {stage.name}: {int(self.is_held_out.sum())} samples are held out")
        if stage.window == "slice" and self.cuts and self.mixture.card.geometry.temporal > 1:
            lines.append(
                f"stage {stage.name}: windows begin anywhere, and their latents are not what encoding them "
                "alone gives; `latentpress inspect --drift` says how near they are"
            )
        return lines

    def _order(self, number: int) -> DatasetOrder:
        mixture, own = self.mixture, self._own_rows(number)
        catalog = mixture.catalogs[number]
        return DatasetOrder(
            own + mixture.starts[number],
            shards=catalog.shards[own],
            weight=mixture.weights[number],
            key=key_of(catalog.card.fingerprint, number, *self._key),
            clips=catalog.clip_hashes[own] if self._config.data.captions == "lot" else None,
        )

    def _own_rows(self, number: int) -> np.ndarray:
        """The rows trained on of one dataset, as its catalog counts them."""
        first, last = self.mixture.starts[number : number + 2]
        return self.rows[(self.rows >= first) & (self.rows < last)] - first

    def _epoch(self, epoch: int) -> tuple[Visits, np.ndarray]:
        visits = mixed(
            [order.epoch(epoch) for order in self._orders], key=key_of(*self._key, epoch, "datasets")
        )
        return visits, self._tokens(*visits)

    def _tokens(self, rows: np.ndarray, passes: np.ndarray) -> np.ndarray:
        """Tokens of visits, [m]."""
        if not self._config.data.caption_dropout:
            return self.tokens[rows]
        return np.where(self._empty(rows, passes), self._empty_tokens[rows], self.tokens[rows])

    def _empty(self, rows: np.ndarray, passes: np.ndarray) -> np.ndarray:
        return self._drawn("caption", self._config.data.caption_dropout, rows, passes)

    def _drop_image(self, rows: np.ndarray, passes: np.ndarray) -> np.ndarray:
        return self._drawn("image", self._config.data.image_dropout if self._images else 0.0, rows, passes)

    def _drawn(self, what: str, share: float, rows: np.ndarray, passes: np.ndarray) -> np.ndarray:
        """bool [m]: whether a visit is among the `share` to which it happens."""
        if not share:
            return np.zeros(len(rows), bool)
        return self._shares(what, rows, passes) < share

    def _first(self, rows: np.ndarray, passes: np.ndarray) -> np.ndarray:
        """First latent frame of each visit's window, [m]."""
        if self.stage.window == "prefix":
            return np.zeros(len(rows), np.int64)
        places = (self._whole - self.latent_frames)[rows] // self._piece + 1
        return (self._shares("window", rows, passes) * places).astype(np.int64) * self._piece

    def _shares(self, what: str, rows: np.ndarray, passes: np.ndarray) -> np.ndarray:
        return keyed_shares(self.mixture.row_hashes[rows], turns=passes, key=key_of(*self._key, what))

    def _read(
        self, row: int, key: str, first: int, *, empty_prompt: bool = False, drop_image: bool = False
    ) -> Read:
        length = int(self.latent_frames[row])
        weights = self._weights(row, first)
        dataset, row = self.mixture.locate(row)
        catalog = self.mixture.catalogs[dataset]
        # A sample may be in two datasets, and the visits to both must not share their noise.
        twin = f"/{dataset}" if dataset else ""
        visit = Visit(
            row=row,
            first=first,
            latent_frames=length,
            key=f"{key}/{catalog.sample_id(row)}/{catalog.caption_digest(row)}{twin}",
            empty_prompt=empty_prompt,
            drop_image=drop_image,
            seconds=window_seconds(catalog, row, first=first, length=length),
            frame_weights=None if weights is None else tuple(weights.tolist()),
        )
        return dataset, visit

    @cached_property
    def _frame_weights(self) -> list[tuple[np.ndarray, np.ndarray]] | None:
        """(weights of latent frames, where each sample's begin) of each dataset; None where all are 1."""
        keyframe_lambda = self._config.loss.keyframe_lambda
        if keyframe_lambda == 1:
            return None
        return [
            (
                latent_frame_weights(
                    each.frame_weights(),
                    each.pts_offsets,
                    geometry=each.card.geometry,
                    keyframe_lambda=keyframe_lambda,
                ),
                np.concatenate([[0], np.cumsum(each.shapes[:, 0])]),
            )
            for each in self.mixture.catalogs
        ]

    def _weights(self, row: int, first: int) -> np.ndarray | None:
        """[T] of a window, or None where all are 1."""
        if self._frame_weights is None:
            return None
        length = self.latent_frames[row]
        dataset, row = self.mixture.locate(row)
        weights, offsets = self._frame_weights[dataset]
        return weights[offsets[row] + first :][:length]

    def _weighted_tokens(self, row: int, first: int) -> float:
        weights = self._weights(row, first)
        assert weights is not None
        # What fills a patch up repeats the first frame, and weighs what that does.
        fill = -len(weights) % self._patch_t
        whole = float(weights.sum(dtype=np.float64)) + fill * float(weights[0])
        return whole * int(self._cells[row]) / self._patch_t

    def _check_budget(self) -> None:
        budget = budget_of(self.stage, self._config.data)
        used = np.flatnonzero(self.is_held_out | np.isin(np.arange(len(self.mixture)), self.rows))
        most = np.maximum(self.tokens, self._empty_tokens)
        longest = int(used[most[used].argmax()])
        if most[longest] > budget:
            name = "data.budget_tokens" if self.stage.budget_tokens is None else "its budget_tokens"
            video, tokens = self._video_tokens[longest], most[longest]
            raise ConfigError(
                f"{name} = {budget}: sample {self.mixture.sample_id(longest)} alone needs {tokens} tokens "
                f"in stage {self.stage.name!r} ({video} video, {tokens - video} prompt); set {name} to "
                f"{tokens} or more, or the stage's max_s lower"
            )

    def _check_multiple(self) -> None:
        multiple = self.stage.token_multiple
        tokens = self.tokens[self.rows]
        if not (tokens % multiple).any():
            return
        row = int(self.rows[np.argmax(tokens % multiple > 0)])
        spans, prompt = int(self._spans[row]), int(self._prompts[row])
        kinds = np.unique(np.column_stack([self._video_tokens, self._spans])[self.rows] % multiple, axis=0)
        shorter, longer = (
            range(prompt - 1, max(0, prompt - 1 - multiple), -1),
            range(prompt + 1, prompt + multiple),
        )
        near = [
            length
            for way in (shorter, longer)
            if (length := next((n for n in way if not ((kinds @ [1, n]) % multiple).any()), None))
        ]
        raise ConfigError(
            f"stage {self.stage.name!r}: token_multiple = {multiple}, sample {self.mixture.sample_id(row)} "
            f"has {self.tokens[row]} tokens ({self._video_tokens[row]} video, {spans} x {prompt} prompt); "
            + (
                f"prompts of {' or '.join(map(str, near))} tokens (text_encoder.max_length, with padding = "
                "'full') suit all windows"
                if near
                else "no length of prompts suits all windows: other windows are needed"
            )
        )
