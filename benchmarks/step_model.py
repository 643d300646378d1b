"""A model in training, its weights random, and made-up clips for it: settings in, steps to be timed out.

A step is made of the trainer's own parts: forward, backward, gradient clip, AdamW. Batches are noised,
collated and pinned beforehand, as the trainer does while the step before runs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from benchmarks.attention import deterministic_algorithms
from benchmarks.models import architecture_of
from benchmarks.step_ways import SPATIAL, Clip, StepSettings
from schemas.bucket import PATCH
from schemas.load import check_config
from schemas.train_config import TrainConfig
from trainer.architecture import Architecture
from trainer.batch import Batch, prepare
from trainer.catalog import Catalog
from trainer.loop import forward_backward
from trainer.model import build_model
from trainer.objective import make_objective
from trainer.optim import make_optimizer, set_lr
from trainer.order import keyed_generator
from trainer.packing import Pack, Segment, StepWeights
from trainer.parallel import World
from trainer.sharding import clip_grad_norm, fill, parallelize
from trainer.stage_model import attention_route


class Bench:
    """A model in training, and made-up clips for it."""

    def __init__(self, settings: StepSettings, world: World) -> None:
        self.settings, self.world = settings, world
        self.architecture, self.config = _setup(settings, ranks=world.dp_size)
        with deterministic_algorithms(True):  # some kernels are told when they are chosen
            self._exact = attention_route(self.config, self.architecture, world)
        self.attention = attention_route(self.config, self.architecture, world)
        with torch.device("meta"):
            self.model = build_model(self.architecture, self.attention)
        parallelize(
            self.model,
            world=world,
            precision=self.config.precision,
            recompute=settings.recompute,
            compile=settings.compile,
        )
        fill(self.model, self._random, device=world.device)
        self.optimizer = make_optimizer(self.model, self.config.optim, self.config.stages[0].lr)
        self.objective = make_objective(self.config.loss, self.architecture.schedule)
        self._made: dict[Clip, Segment] = {}

    def pack(self, clips: Sequence[Clip]) -> Pack:
        """Random latents; a clip of one length is the same in every pack."""
        return Pack(tuple(self._made.setdefault(clip, self._segment(clip)) for clip in clips))

    def batches(self, packs: Sequence[Pack]) -> list[Batch]:
        """What the trainer's feed makes of packs."""
        made = [prepare(pack, objective=self.objective, layout=self.model.layout) for pack in packs]
        return [batch.pinned() for batch in made] if self.world.device.type == "cuda" else made

    def step(self, batches: Sequence[Batch], *, exact: bool = False) -> float:
        """One optimizer step, as the training loop takes it; seconds until the device is done."""
        self.model.attention = (self._exact if exact else self.attention).function
        weights = StepWeights(sum(len(batch.lengths) for batch in batches), 1.0, 1)
        self.world.barrier()
        began = time.perf_counter()
        with deterministic_algorithms(exact):
            forward_backward(self.model, batches, weights=weights, config=self.config, world=self.world)
            clip_grad_norm(self.model.parameters(), max_norm=self.config.optim.max_grad_norm)
            set_lr(self.optimizer, self.config.stages[0].lr, step_in_stage=0, steps=1)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.world.device.type == "cuda":
                torch.cuda.synchronize()
        return time.perf_counter() - began

    def _random(self, name: str, slices: tuple[slice, ...]) -> torch.Tensor:
        """Values on the device at once: drawing billions on the host, as training does, takes minutes."""
        return torch.randn([part.stop - part.start for part in slices], device=self.world.device) * 0.02

    def _segment(self, clip: Clip) -> Segment:
        seconds, padded = clip
        model, settings = self.architecture.config, self.settings
        key = f"{seconds:g} s"
        generator = keyed_generator("bench train", key)
        size = (settings.height // SPATIAL, settings.width // SPATIAL)
        shape = (settings.frames(padded), model["out_channels"], *size)
        prompt = (settings.prompt_tokens, model["text_embed_dim"])
        return Segment(
            sample_id=key,
            key=key,
            latents=torch.randn(shape, generator=generator),
            prompt_embeds=torch.randn(prompt, generator=generator),
            seconds=seconds,
        )


def _setup(settings: StepSettings, *, ranks: int) -> tuple[Architecture, TrainConfig]:
    """The model, of the dataset's channels and prompts where there is one, and how it is trained."""
    architecture = architecture_of(settings.model)
    changed = {} if settings.layers is None else {"num_layers": settings.layers}
    budget = 1
    if settings.dataset:
        catalog = Catalog(settings.dataset)
        frames, channels, height, width = catalog.shapes.T
        prompts, prompt_width = catalog.prompt_shapes.T
        changed |= {"in_channels": int(channels[0]), "out_channels": int(channels[0])}
        changed |= {"text_embed_dim": int(prompt_width[0]), "max_text_seq_length": int(prompts.max())}
        tokens = frames * (height // PATCH) * (width // PATCH) + prompts
        budget = settings.budget * int(tokens.max())
    config = {
        "dataset": settings.dataset or "none",
        "output": "none",
        "model": {"attention": settings.attention},
        "precision": {"param": settings.dtype},
        "data": {"budget_tokens": budget, "slots": settings.packs * ranks},
        "stages": [
            {"name": "bench", "steps": settings.loader_steps, "lr": {"peak": 1e-5, "kind": "constant"}}
        ],
    }
    checked = check_config(config, TrainConfig, where="benchmarks.step_model")
    return replace(architecture, config=architecture.config | changed), checked
