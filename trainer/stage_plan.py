"""A stage's part of the plan: samples and a stage's settings in; windows, tokens, draws and steps out.

What a visit looks like (window, dropped caption, dropped image) is drawn from the hash of its sample and the
number of its pass, so any visit can be told without those before it, and token counts are exact before
anything is read. The trade-off: a window has the same number of latent frames wherever it begins, which where
times are uneven is not the same time.
"""

from __future__ import annotations

import hashlib
import math
from typing import Literal

import numpy as np

from schemas.errors import ConfigError
from schemas.load import digest_of
from schemas.train_config import StageConfig, TrainConfig
from trainer.curriculum import budget_of, slots_of
from trainer.frame_weights import FrameWeights
from trainer.held_out import check_split, held_out_rows, validation_rows
from trainer.mixture import DatasetOrder, Mixture, Visits, mixed
from trainer.order import key_of, keyed_shares
from trainer.packing import StepWeights, plan_packs
from trainer.plan import LINEAR_COST, PLAN_VERSION, PackPlan, Plan, Step
from trainer.reader import check_windows
from trainer.stage_filter import filtered
from trainer.stage_tokens import StageTokens
from trainer.stage_windows import window_latents, window_seconds
from trainer.visit import Visit

Read = tuple[int, Visit]
"""A visit, and the dataset it goes to."""

_VALIDATION = "validation"
"""Begins the keys of validation's visits in every run, so that all use the same noise."""


class StagePlan:
    """One stage: which samples it uses and how much of each, and its steps."""

    def __init__(
        self,
        mixture: Mixture,
        stage: StageConfig,
        config: TrainConfig,
        *,
        weights: FrameWeights,
        patch_t: int = 1,
        local_frames: int = 0,
        images: bool = False,
        text: Literal["joint", "cross"] = "joint",
    ) -> None:
        """`weights`: of the same mixture. `patch_t`, `local_frames`: latent frames per token and per
        attention span of the model; `images`: it takes an image condition; `text`: "cross" where it keeps
        prompts out of its stream. ConfigError where the stage asks for what samples or budget do not give.
        """
        self.mixture, self.stage = mixture, stage
        self._config, self._weights, self._patch_t, self._images = config, weights, patch_t, images
        self._key = (config.seed, stage.name)
        wanted, self._notes = filtered(mixture, stage)
        share = config.validation.share
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
        self.tokens = StageTokens(
            mixture,
            self.latent_frames,
            data=config.data,
            patch_t=patch_t,
            local_frames=local_frames,
            text=text,
        )
        self._used = np.flatnonzero(wanted)  # also those held out, which looks take
        self.tokens.check_budget(stage, self._used)
        self.tokens.check_multiple(stage, self._used)
        # Where windows may begin: at every latent frame, or at those of whole pieces.
        geometry = mixture.card.geometry
        piece = geometry.latent_frames(geometry.segment_frames) if stage.window == "segments" else 1
        self._piece = piece
        self._orders = [self._order(number) for number in range(len(catalogs))]
        if (visits := sum(order.visits for order in self._orders)) < 1:
            raise ConfigError(
                f"stage {stage.name!r}: with their weights, an epoch of all datasets has {float(visits):g} "
                f"visits, expected 1 or more; multiply all weights by {math.ceil(1 / visits)}"
            )
        fingerprints = [each.card.fingerprint for each in catalogs]
        whole = self.tokens.whole
        self._costs = whole * (whole // self.tokens.spans + LINEAR_COST)
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
        """T, H, W of the windows that are trained on, or held out for looks."""
        shapes = np.column_stack([self.latent_frames, self._sides])[self._used]
        return {(t, h, w) for t, h, w in np.unique(shapes, axis=0).tolist()}

    def step(self, step: int) -> Step:
        """The packs of a step of the stage, over all ranks."""
        return self.plan.step(step)

    def step_weights(self, packs: Step) -> StepWeights:
        rows = np.array([row for pack in packs for row in pack.rows])
        passes = np.array([turn for pack in packs for turn in pack.passes])
        video = float(self.tokens.video[rows].sum())
        if not self._weights.all_one:
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
        packs = plan_packs(
            self.tokens.whole[rows].tolist(), capacity=budget_of(self.stage, self._config.data)
        )
        return [[self._read(row, _VALIDATION, 0) for row in rows[pack].tolist()] for pack in packs]

    def digest(self) -> str:
        """Equal digests mean equal steps: the same samples in the same packs, drawn alike."""
        data, rows, mixture, tokens = self._config.data, self.rows, self.mixture, self.tokens
        state = hashlib.sha256()
        drawn = [self._whole] if self.stage.window != "prefix" and self.cuts else []
        by_row = [mixture.row_hashes, self.latent_frames, tokens.video, tokens.whole, tokens.uncaptioned]
        for values in (*by_row, self._costs, *drawn):
            state.update(values[rows].tobytes())
        counts = []
        for number, catalog in enumerate(mixture.catalogs):
            own = self._own_rows(number)
            counts.append(len(own))
            state.update(np.unique(catalog.shards[own], return_counts=True)[1].tobytes())
            state.update(self._weights.tobytes(number, own))
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
        data, stage, tokens = self._config.data, self.stage, self.tokens.whole[self.rows]
        packs, fill = self.plan.epoch_size()
        slots = slots_of(stage, data)
        used, there = len(self.rows), len(self.mixture)
        some = "" if used == there else f"{used} of {there} samples, "
        lines = [
            f"stage {stage.name}: {some}{tokens.min()} to {tokens.max()} tokens a sample, "
            f"{counted(packs, 'pack')} ({packs / slots:.1f} steps) an epoch, {fill:.1%} full; packs of like "
            f"cost share a step, among {self.plan.window}",
            *(f"stage {stage.name}: {note}" for note in self._notes),
        ]
        if self._config.validation.share:
            lines.append(f"stage {stage.name}: {counted(int(self.is_held_out.sum()), 'sample')} held out")
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
            return self.tokens.whole[rows]
        dropped = self._empty(rows, passes)
        return np.where(dropped, self.tokens.uncaptioned[rows], self.tokens.whole[rows])

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
        weights = self._weights.of(row, first=first, length=length)
        dataset, row = self.mixture.locate(row)
        catalog = self.mixture.catalogs[dataset]
        # A sample may be in two datasets, and the visits to both must not share their noise; it is validated
        # once, with noise that depends on no order of datasets.
        twin = f"/{dataset}" if dataset and key != _VALIDATION else ""
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

    def _weighted_tokens(self, row: int, first: int) -> float:
        weights = self._weights.of(row, first=first, length=int(self.latent_frames[row]))
        assert weights is not None
        # What fills a patch up repeats the first frame, and weighs what that does.
        fill = -len(weights) % self._patch_t
        whole = float(weights.sum(dtype=np.float64)) + fill * float(weights[0])
        return whole * int(self.tokens.cells[row]) / self._patch_t


def counted(number: int, noun: str) -> str:
    """A number of things, in words."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
