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
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType

import torch
from torch import nn

from schemas.config import StageConfig, TrainConfig
from schemas.errors import RunError
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
from trainer.resume import resume_point, run_meta, saved_architecture
from trainer.weights import Architecture, architecture, data_shape, initial_values

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What schedulers send before they take the machine away."""


def train(config: TrainConfig, *, world: World) -> None:
    """Train to the end of the last stage, or until a stop signal; the same call resumes."""
    output, dataset, total = Path(config.output), Path(config.dataset), total_steps(config.stages)
    with Loader(dataset, config=config, rank=world.rank, world_size=world.size) as loader:
        saved: Saved | None = world.from_main(resume_point(config, loader.card) if world.is_main else None)
        step = saved.step if saved else 0
        plan = saved_architecture(saved) if saved else architecture(config.model, data_shape(Catalog(dataset)))
        attention = choose_attention(
            config.model.attention,
            device=world.device,
            dtype=getattr(torch, config.precision.param),
            heads=plan.config["num_attention_heads"],
            head_dim=plan.config["attention_head_dim"],
        )
        objective = VObjective(plan.schedule)
        meta = run_meta(config, card=loader.card, plan_digest=loader.plan_digest(), architecture=plan, world=world)
        if world.is_main:
            print(f"{loader.describe()}\nattention {attention.name}: {attention.reason}", flush=True)
            if saved:
                print(f"resuming after step {step} of {saved.path}", flush=True)
                if saved.meta["plan_digest"] != meta["plan_digest"]:
                    print("the samples or stages have changed since; the order of samples is a new one", flush=True)
        recorder = Metrics(output, first_step=step, total_steps=total) if world.is_main else nullcontext()
        with recorder as metrics, stop_signals() as received:
            durations: deque[float] = deque(maxlen=20)
            stopping = False
            while step < total and not stopping:
                # One stage: a fresh model with the newest weights; moments only where they are this stage's.
                stage, step_in_stage = stage_at(step, config.stages)
                model, optimizer = build(config, stage, plan, attention=attention, saved=saved, world=world)
                for step_in_stage in range(step_in_stage, stage.steps):
                    started = time.perf_counter()

                    # Fetch this rank's packs; a thread has read them while the last step ran.
                    packs, sizes = loader.packs(step), loader.step_weights(step)
                    waited = time.perf_counter() - started

                    # Forward and backward, pack by pack: losses are shares of the whole step's, so they add up.
                    loss, culprits = 0.0, []
                    for pack in packs:
                        pack_loss, errors = forward(model, pack, sizes, objective=objective, config=config, world=world)
                        pack_loss.backward()
                        loss += pack_loss.item()
                        culprits += [s.sample_id for s, ok in zip(pack.segments, errors.isfinite(), strict=True) if not ok]

                    # Clip. The norm is that of the summed gradients, so every rank takes the same decision.
                    norm = clip_grad_norm(model.parameters(), max_norm=config.optim.max_grad_norm)
                    if not math.isfinite(norm):
                        raise RunError(
                            f"step {step} has a gradient norm of {norm}; clips with a loss that is not finite on "
                            f"rank {world.rank}: {', '.join(culprits) or 'none'}; weights were not changed, lower "
                            "the stage's lr or look at these clips with `latentpress inspect`"
                        )

                    # Step, with the learning rate of this step's number.
                    lr = lr_at(step_in_stage, stage.lr, steps=stage.steps)
                    set_lr(optimizer, lr)
                    optimizer.step()
                    optimizer.zero_grad()
                    step += 1

                    # The one collective of the step's end: what is logged, and whether any rank was told to stop.
                    tokens = sum(pack.num_tokens for pack in packs)
                    loss, tokens, told = world.sum([loss, tokens, len(received)])
                    stopping = told > 0
                    durations.append(time.perf_counter() - started)
                    if metrics:
                        metrics.log(
                            StepRecord(
                                step=step,
                                stage=stage.name,
                                loss=loss,
                                grad_norm=norm,
                                lr=lr,
                                tokens=int(tokens),
                                tokens_per_s=tokens / durations[-1],
                                fill=tokens / (config.data.slots * config.data.budget_tokens),
                                data_wait=waited / durations[-1],
                                seconds=durations[-1],
                                eta_s=(total - step) * sum(durations) / len(durations),
                            )
                        )

                    # Save: at intervals, at the end of a stage, and when told to stop.
                    last = step_in_stage + 1 == stage.steps
                    if last or stopping or step % config.checkpoint.every == 0:
                        saved = checkpoint.save(
                            output,
                            step=step,
                            model=model,
                            optimizer=optimizer,
                            meta={"stage": stage.name, **meta},
                            world=world,
                            keep=config.checkpoint.keep,
                        )
                    if stopping:
                        break
        if world.is_main and saved:
            if step == total:
                print(f"finished: {step} steps, weights in {saved.path}, curve in {output / 'loss.png'}", flush=True)
            else:
                print(f"{received[0].name}: saved {saved.path}; requeue me, the same command resumes", flush=True)


def build(
    config: TrainConfig, stage: StageConfig, plan: Architecture, *, attention: Attention, saved: Saved | None, world: World
) -> tuple[PackedCogVideoX, torch.optim.AdamW]:
    """A sharded model and its optimizer as they are before the next step of `stage`."""
    with torch.device("meta"):
        model = PackedCogVideoX.build(plan.config, attention=attention.function)
    table = set_trainable(model, stage.trainable)
    if world.is_main:
        print("\n".join([f"stage {stage.name}: {stage.steps} steps", *(f"  {row}" for row in table)]), flush=True)
    read = None if saved else initial_values(config.model.init, model, seed=config.seed)
    shard(model, blocks=model.transformer_blocks, world=world, precision=config.precision)
    fill(model, read, device=world.device)
    optimizer = make_optimizer(model, config.optim)
    if saved:
        checkpoint.load_model(saved, model)
        if saved.meta["stage"] == stage.name:
            checkpoint.load_optimizer(saved, model, optimizer)
    return model, optimizer


def forward(
    model: nn.Module, pack: Pack, sizes: StepWeights, *, objective: VObjective, config: TrainConfig, world: World
) -> tuple[torch.Tensor, torch.Tensor]:
    """(this pack's share of the step's loss, error of each clip); noise and timesteps come from the clips' keys."""
    layout = model.config
    noisy, targets, timesteps = [], [], []
    for segment in pack.segments:
        clean = fill_patches(segment.latents, patch_t=layout.patch_size_t)
        timesteps.append(objective.draw_timestep(segment.key))
        clip, target = objective.noised(clean, key=segment.key, timestep=timesteps[-1])
        noisy.append(clip)
        targets.append(patchify(target, patch=layout.patch_size, patch_t=layout.patch_size_t or 1))
    prompts = [segment.prompt_embeds for segment in pack.segments]
    inputs = collate(noisy, prompts, timesteps, config=layout).to(world.device)
    prediction = model(inputs)
    errors = clip_errors(prediction, torch.cat(targets).to(world.device), lengths=inputs.video_lengths)
    weights = clip_weights(
        [segment.num_video_tokens for segment in pack.segments],
        normalize=config.loss.normalize,
        step_clips=sizes.num_clips,
        step_tokens=sizes.num_video_tokens,
    )
    return (errors * weights.to(world.device)).sum(), errors.detach()


@contextmanager
def stop_signals() -> Iterator[list[signal.Signals]]:
    """Collects stop signals while training; the loop finishes its step, saves and returns."""
    received: list[signal.Signals] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))

    before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
