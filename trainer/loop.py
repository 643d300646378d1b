"""The training story, whole: a config in; checkpoints, metrics and a loss curve out.

Every rank runs `train`. A step is a pure function of its number, so nothing but weights and AdamW's
moments carries over, and resuming, the next stage and the first start are one path: build the model,
load what the newest checkpoint has, go on from its step.
"""

from __future__ import annotations

import math
import signal
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from schemas.adoption import adoption_notes
from schemas.errors import RunError
from schemas.load import resolved_toml
from schemas.train_config import StageConfig, TrainConfig
from trainer import checkpoint
from trainer.attention import Attention, choose_attention
from trainer.catalog import Catalog
from trainer.checkpoint import Saved
from trainer.collate import collate, fill_patches, patchify
from trainer.curriculum import lr_at, stage_at, total_steps
from trainer.loader import Loader, StepWeights
from trainer.metrics import Metrics, StepRecord
from trainer.model import PackedCogVideoX
from trainer.objective import VObjective, clip_errors, clip_weights
from trainer.optim import make_optimizer, set_lr, set_trainable
from trainer.packing import Pack
from trainer.parallel import World, clip_grad_norm, fill, shard
from trainer.resume import already_finished, resume_notes, resume_point, run_meta, saved_architecture
from trainer.weights import Architecture, architecture, data_shape, initial_values

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What schedulers send before they take the machine away."""


@dataclass(frozen=True)
class Run:
    """What stays the same over all stages."""

    config: TrainConfig
    world: World
    loader: Loader
    plan: Architecture
    attention: Attention
    objective: VObjective
    metrics: Metrics | None
    """On rank 0."""
    received: list[signal.Signals]
    """Stop signals so far."""


def train(config: TrainConfig, *, world: World) -> None:
    """Train to the end of the last stage, or until a stop signal; the same call resumes."""
    output, total = Path(config.output), total_steps(config.stages)
    catalog = Catalog(Path(config.dataset))
    with ExitStack() as held:
        saved = world.on_main(lambda: start(config, catalog, held))
        if world.on_main(lambda: already_finished(config, saved)):
            return
        step = saved.step if saved else 0
        plan = saved_architecture(saved) if saved else architecture(config.model, data_shape(catalog))
        loader = held.enter_context(
            Loader(
                catalog,
                config=config,
                patch_t=plan.config["patch_size_t"] or 1,
                rank=world.rank,
                world_size=world.size,
            )
        )
        attention = choose_attention(
            config.model.attention,
            device=world.device,
            dtype=getattr(torch, config.precision.param),
            heads=plan.config["num_attention_heads"],
            head_dim=plan.config["attention_head_dim"],
        )
        world.say(loader.describe())
        world.say(f"attention {attention.name}: {attention.reason}")
        if catalog.card.padding == "trim":
            world.say(
                "text_encoder.padding of the dataset is 'trim': this model will not take prompts padded as "
                "the stock pipeline pads them"
            )
        for note in adoption_notes(catalog.dataset):
            world.say(note)
        if saved:
            digest = loader.plan_digest(saved.meta["stage"])
            world.say("\n".join(resume_notes(config, saved, plan_digest=digest)))
        metrics = None
        if world.is_main:
            recorder = Metrics(output, first_step=step, total_steps=total, normalize=config.loss.normalize)
            metrics = held.enter_context(recorder)
        received = held.enter_context(stop_signals())
        run = Run(config, world, loader, plan, attention, VObjective(plan.schedule), metrics, received)
        while step < total:
            saved = train_stage(run, step, saved)
            step = saved.step
            if saved.meta["stopped"]:
                break
    if step < total and saved:
        world.say(f"stopped by a signal: {saved.path} is whole; requeue me, the same command resumes")
    elif saved:
        world.say(f"finished: {step} steps; weights in {saved.path}, loss curve in {output / 'loss.png'}")


def start(config: TrainConfig, catalog: Catalog, held: ExitStack) -> Saved | None:
    """Hold the output; where to go on. The config goes beside what it makes once it is accepted."""
    output = Path(config.output)
    held.enter_context(checkpoint.locked(output))
    saved = resume_point(config, catalog.card)
    if saved is None or saved.step < total_steps(config.stages):
        try:
            (output / "config.toml").write_text(resolved_toml(config), encoding="utf-8")
        except OSError as error:
            raise RunError(f"{output / 'config.toml'} cannot be written: {error.strerror}") from error
    return saved


def train_stage(run: Run, step: int, saved: Saved | None) -> Saved:
    """From global `step` to the end of its stage, or to a stop signal; returns the checkpoint of its end."""
    config, world = run.config, run.world
    stage, done = stage_at(step, config.stages)
    meta = run_meta(config, stage, loader=run.loader, architecture=run.plan, world=world)
    model, optimizer = build(run, stage, saved)
    durations: deque[float] = deque(maxlen=20)
    for step_in_stage in range(done, stage.steps):
        started = time.perf_counter()

        # Fetch this rank's packs; a thread has read them while the last step ran.
        packs, sizes = run.loader.packs(step), run.loader.step_weights(step)
        waited = time.perf_counter() - started

        # Forward and backward, pack by pack; their losses are shares of the whole step's, so they add up.
        loss, bad_clips = 0.0, []
        for pack in packs:
            pack_loss, errors = forward(run, model, pack, sizes)
            pack_loss.backward()
            loss += pack_loss.item()
            bad_clips += [pack.segments[i].sample_id for i in errors.isfinite().logical_not().nonzero()]

        # Clip. The norm is that of the summed gradients, so every rank takes the same decision.
        norm = clip_grad_norm(model.parameters(), max_norm=config.optim.max_grad_norm)
        if not math.isfinite(norm):
            raise RunError(
                f"step {step}: the gradient norm is {norm}; clips with a loss that is not finite: "
                f"{', '.join(world.gather(bad_clips)) or 'none'}; checkpoints are from before, so lower the "
                "stage's lr, or look at these clips with `latentpress inspect`"
            )

        # Step, with the learning rate of this step's number.
        lr = lr_at(step_in_stage, stage.lr, steps=stage.steps)
        set_lr(optimizer, lr)
        optimizer.step()
        optimizer.zero_grad()
        step += 1

        # The one collective of a step's end: what is logged, and whether any rank was told to stop.
        loss, told = world.sum([loss, len(run.received)])
        durations.append(time.perf_counter() - started)
        if run.metrics:
            record = StepRecord(
                step=step,
                stage=stage.name,
                loss=loss,
                grad_norm=norm,
                lr=lr,
                tokens=sizes.num_tokens,
                tokens_per_s=sizes.num_tokens / durations[-1],
                fill=sizes.num_tokens / (config.data.slots * config.data.budget_tokens),
                data_wait=waited / durations[-1],
                seconds=durations[-1],
                eta_s=(total_steps(config.stages) - step) * sum(durations) / len(durations),
            )
            run.metrics.log(record)

        # Save at intervals, at the end of the stage, and when told to stop.
        ending = told > 0 or step_in_stage + 1 == stage.steps
        if ending or step % config.checkpoint.every == 0:
            saved = checkpoint.save(
                Path(config.output),
                step=step,
                model=model,
                optimizer=optimizer,
                meta={"stopped": told > 0, **meta},
                world=world,
                keep=config.checkpoint.keep,
            )
        if ending:
            break
    assert saved is not None  # a stage has at least one step, and its last one is saved
    return saved


def build(run: Run, stage: StageConfig, saved: Saved | None) -> tuple[PackedCogVideoX, torch.optim.AdamW]:
    """A sharded model and its optimizer as they are before the next step of `stage`."""
    config = run.config
    with torch.device("meta"):
        model = PackedCogVideoX.build(run.plan.config, attention=run.attention.function)
    table = set_trainable(model, stage.trainable)
    run.world.say("\n  ".join([f"stage {stage.name}: {stage.steps} steps", *table]))
    read = None if saved else initial_values(config.model.init, model, seed=config.seed)
    shard(model, blocks=model.transformer_blocks, world=run.world, precision=config.precision)
    fill(model, read, device=run.world.device)
    optimizer = make_optimizer(model, config.optim)
    if saved:
        checkpoint.load_model(saved, model)
        if saved.meta["stage"] == stage.name:  # a new stage starts with fresh moments
            checkpoint.load_optimizer(saved, model, optimizer)
    return model, optimizer


def forward(
    run: Run, model: PackedCogVideoX, pack: Pack, sizes: StepWeights
) -> tuple[torch.Tensor, torch.Tensor]:
    """(this pack's share of the step's loss, error of each clip).

    Noise and timesteps come from the clips' keys, so they are the same on any rank and in any pack.
    """
    objective, device = run.objective, run.world.device
    layout: Any = model.config
    noisy, targets, timesteps = [], [], []
    for segment in pack.segments:
        clean = fill_patches(segment.latents, patch_t=layout.patch_size_t)
        timestep = objective.draw_timestep(segment.key)
        clip, target = objective.noised(clean, key=segment.key, timestep=timestep)
        noisy.append(clip)
        targets.append(patchify(target, patch=layout.patch_size, patch_t=layout.patch_size_t or 1))
        timesteps.append(timestep)
    prompts = [segment.prompt_embeds for segment in pack.segments]
    inputs = collate(noisy, prompts, timesteps, config=layout).to(device)
    errors = clip_errors(model(inputs), torch.cat(targets).to(device), lengths=inputs.video_lengths)
    weights = clip_weights(
        inputs.video_lengths,
        normalize=run.config.loss.normalize,
        step_clips=sizes.num_clips,
        step_tokens=sizes.num_video_tokens,
    )
    return (errors * weights.to(device)).sum(), errors.detach()


@contextmanager
def stop_signals() -> Iterator[list[signal.Signals]]:
    """Collects stop signals while training; the loop finishes its step, saves and returns."""
    received: list[signal.Signals] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))

    before: dict[signal.Signals, Any] = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
