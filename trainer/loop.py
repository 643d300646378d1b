"""The training story, whole: a config in; checkpoints, metrics, samples and a loss curve out.

Every rank runs `train`. A step is a pure function of its number, so nothing but weights and AdamW's
moments carries over, and resuming, the next stage and the first start are one path: build the model,
load what the newest checkpoint has, go on from its step.
"""

from __future__ import annotations

import gc
import math
import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from schemas.adoption import adoption_notes
from schemas.errors import ConfigError, DatasetError, RunError
from schemas.train_config import StageConfig, TrainConfig
from trainer import checkpoint
from trainer.architecture import Architecture, data_shape
from trainer.attention import Attention
from trainer.checkpoint import Saved
from trainer.curriculum import budget_of, slots_of, stage_at, total_steps
from trainer.feed import feed
from trainer.flops import device_peak
from trainer.layout import check_clips
from trainer.lineage import load_weights
from trainer.loader import Loader
from trainer.look import Looks, is_owed
from trainer.lora import add_adapters
from trainer.losses import batch_loss
from trainer.metrics import Metrics, SaveRecord, StepRecord, duration_sums, loss_by_duration, memory_gb
from trainer.mixture import Mixture
from trainer.model import PackedModel, build_model
from trainer.objective import Objective, make_objective
from trainer.optim import make_optimizer, set_lr, set_trainable
from trainer.parallel import MeshShape, World
from trainer.probe import choose_attention
from trainer.resume import (
    already_finished,
    is_finished,
    keep_config,
    resume_notes,
    resume_point,
    run_meta,
    saved_architecture,
)
from trainer.sample import Pictures, guidance_prompt
from trainer.saver import Saver
from trainer.sharding import clip_grad_norm, fill, parallelize, predict, reduce_over_replicas
from trainer.stage_check import check_stages, run_architecture
from trainer.stopping import Stopping, stopping
from trainer.weights import initial_values


@dataclass(frozen=True)
class Run:
    """What stays the same over all stages."""

    config: TrainConfig
    world: World
    loader: Loader
    plan: Architecture
    objective: Objective
    metrics: Metrics | None
    """On rank 0."""
    saver: Saver
    stop: Stopping
    looks: Looks


def train(config: TrainConfig, *, world: World, pictures: Pictures | None = None) -> None:
    """Train to the end of the last stage, or until a stop signal; the same call resumes.

    `pictures` shows the samples of validation; without it none are drawn.
    """
    output, total = Path(config.output), total_steps(config.stages)
    mixture = Mixture.of(config.mixture)
    with ExitStack() as held:
        stop = held.enter_context(stopping(config.checkpoint))
        saved = world.on_main(lambda: start(config, mixture, held))
        if world.on_main(lambda: already_finished(config, saved)):
            return
        step = saved.step if saved else 0
        data = data_shape(*mixture.catalogs)
        plan = saved_architecture(saved) if saved else run_architecture(config, data)
        world.on_main(lambda: check_stages(config, plan, data, step=step))
        objective = make_objective(config.loss, plan.schedule)
        plan = replace(plan, schedule=objective.schedule)  # with the objective in it, for export
        loader = held.enter_context(open_loader(config, mixture, plan=plan, world=world))
        same_plan(loader, world)
        check_clips(loader.latent_shapes(), plan.layout)
        tell(mixture, loader, world)
        if saved:
            digest = loader.plan_digest(saved.meta["stage"])
            world.say("\n".join(resume_notes(config, saved, plan_digest=digest)))
        metrics = None
        if world.is_main:
            recorder = Metrics(output, first_step=step, total_steps=total, normalize=config.loss.normalize)
            metrics = held.enter_context(recorder)
        keep, background = config.checkpoint.keep, config.checkpoint.background
        saver = held.enter_context(Saver(output, world=world, keep=keep, background=background))
        prompt = None
        if config.validation.samples and pictures:
            prompt = guidance_prompt(mixture.catalogs[0].dataset, guidance=config.validation.guidance)
        looks = Looks(config, loader, objective, metrics, pictures, prompt)
        run = Run(config, world, loader, plan, objective, metrics, saver, stop, looks)
        if saved and world.on_main(lambda: is_owed(config, step)):
            look_again(run, saved)
        stopped = False
        while step < total and not stopped:
            saved = train_stage(run, step, saved)
            step = saved.step
            # A look takes its time: whoever was told to stop meanwhile begins no further stage.
            stopped = saved.meta["stopped"] or world.sum([run.stop.told])[0] > 0
    if saved and not is_finished(config, saved):
        world.say(f"stopped {stop.reason}: {saved.path} is whole; requeue me, the same command resumes")
    elif saved:
        world.say(f"finished: {step} steps; weights in {saved.path}, loss curve in {output / 'loss.png'}")


def start(config: TrainConfig, mixture: Mixture, held: ExitStack) -> Saved | None:
    """Hold the output; where to go on."""
    held.enter_context(checkpoint.locked(Path(config.output)))
    return resume_point(config, [catalog.card for catalog in mixture.catalogs])


def open_loader(config: TrainConfig, mixture: Mixture, *, plan: Architecture, world: World) -> Loader:
    """This rank's loader for a model of `plan`."""
    return Loader(
        mixture,
        config=config,
        patch_t=plan.layout.patch_t,
        images=plan.layout.image,
        local_frames=plan.layout.local_frames,
        text=plan.layout.text,
        shares={stage.name: share(stage, config, world) for stage in config.stages},
    )


def same_plan(loader: Loader, world: World) -> None:
    """DatasetError on every rank where one has another plan than the first: then their steps do not match."""
    mine = loader.digest()
    if world.sum([mine != world.on_main(lambda: mine)])[0]:
        raise DatasetError(
            "expected the same plan on every rank, found others than the first rank's: an index was written "
            "while the ranks started; start again, not while `latentpress preprocess` is about to end"
        )


def tell(mixture: Mixture, loader: Loader, world: World) -> None:
    """What there is to train on, and what to know of it."""
    world.say(loader.describe())
    for catalog in {str(each.dataset): each for each in mixture.catalogs}.values():  # one may be there twice
        if catalog.card.padding == "trim":
            world.say(
                f"text_encoder.padding of {catalog.dataset} is 'trim': this model will not take prompts "
                "padded as the stock pipeline pads them"
            )
        for note in adoption_notes(catalog.dataset):
            world.say(note)


def look_again(run: Run, saved: Saved) -> None:
    """Take the look that a stop or a kill came before, at the model as it was then."""
    stage, _ = stage_at(saved.step - 1, run.config.stages)
    world = run.world.under(stage.mesh or run.config.mesh)
    model, _ = build(run, stage, world, saved)
    run.looks.take(model, step=saved.step, stage=stage.name, world=world)


def train_stage(run: Run, step: int, saved: Saved | None) -> Saved:
    """From global `step` to the end of its stage, or to a stop; returns the checkpoint of its end."""
    config = run.config
    stage, done = stage_at(step, config.stages)
    world = run.world.under(stage.mesh or config.mesh)
    meta = run_meta(
        config,
        stage,
        cards=[catalog.card for catalog in run.loader.mixture.catalogs],
        plan_digest=run.loader.plan_digest(stage.name),
        architecture=run.plan,
        ranks=world.size,
    )
    model, optimizer = build(run, stage, world, saved)
    world.on_main(lambda: keep_config(config))  # not before: a config that is refused replaces none
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    trained = sum(count for count, is_trained in counts if is_trained) / sum(count for count, _ in counts)
    peak = device_peak(world.device, getattr(torch, config.precision.param))
    room = slots_of(stage, config.data) * budget_of(stage, config.data)
    durations: deque[float] = deque(maxlen=20)
    unreadable, counted = 0, 0.0
    steps = feed(
        run.loader,
        steps=range(step, step + stage.steps - done),
        plan=run.plan,
        objective=run.objective,
        world=world,
        ahead=config.data.prefetch > 0,
    )
    for step_in_stage in range(done, stage.steps):
        started = time.perf_counter()

        # Fetch this rank's packs, noised; threads have made them while the last step ran.
        data = next(steps)
        waited = time.perf_counter() - started

        # Forward and backward, pack by pack; their losses are shares of the whole step's, so they add up.
        # Nothing here waits for the device.
        shares, by_clip = [], []
        for batch in data.batches:
            prediction = predict(model, batch.inputs, world=world)
            share, errors = batch_loss(
                prediction, batch.to(world.device), loss=config.loss, step=data.weights
            )
            share = share / world.shape.sp  # peers that share the pack all have its whole loss
            reduce_over_replicas(model, last=batch is data.batches[-1], precision=config.precision)
            share.backward()
            shares.append(share.detach())
            by_clip.append(errors)

        # Clip. The norm is that of the summed gradients, so every rank takes the same decision.
        norm = clip_grad_norm(model.parameters(), max_norm=config.optim.max_grad_norm)
        clip_errors = torch.cat(by_clip).tolist()
        if not math.isfinite(norm):
            found = zip(data.segments, clip_errors, strict=True)
            bad = [clip.sample_id for clip, error in found if not math.isfinite(error)]
            raise RunError(
                f"step {step}: the gradient norm is {norm}; clips with a loss that is not finite: "
                f"{', '.join(world.gather(bad)) or 'none'}; checkpoints are from before, so lower the "
                "stage's lr, or look at these clips with `latentpress inspect`"
            )

        # Step, with the learning rate of this step's number.
        lr = set_lr(optimizer, stage.lr, step_in_stage=step_in_stage, steps=stage.steps)
        optimizer.step()
        optimizer.zero_grad()
        step += 1

        # The one collective of a step's end: what is logged, and whether any rank is to stop.
        found = zip(data.segments, clip_errors, strict=True)
        read = [(clip.seconds, error) for clip, error in found if clip.weight > 0]
        by_duration = duration_sums([seconds for seconds, _ in read], [error for _, error in read])
        flops = data.flops.training(trained=trained) / world.shape.sp
        lost = len(run.loader.unreadable.samples)
        run.stop.took(time.perf_counter() - started)
        loss, told, flops, lost_by_rank, *by_duration = world.sum(
            [float(torch.stack(shares).sum()), run.stop.told, flops, lost, *by_duration]
        )
        if lost_by_rank > counted:  # some rank found more: those of all ranks together, each once
            counted = lost_by_rank
            unreadable = run.loader.unreadable.together(world.gather(run.loader.unreadable.found()))
        durations.append(time.perf_counter() - started)
        if run.metrics:
            record = StepRecord(
                step=step,
                stage=stage.name,
                loss=loss,
                grad_norm=norm,
                lr=lr,
                tokens=data.weights.num_tokens,
                tokens_per_s=data.weights.num_tokens / durations[-1],
                fill=data.weights.num_tokens / room,
                data_wait=waited / durations[-1],
                seconds=durations[-1],
                eta_s=(total_steps(config.stages) - step) * sum(durations) / len(durations),
                mfu=flops / durations[-1] / (peak * world.size) if peak else None,
                memory_gb=memory_gb(world.device),
                loss_by_duration=loss_by_duration(by_duration),
                unreadable=unreadable,
            )
            run.metrics.log(record)

        # Save and look at intervals and at the end of the stage; save when told to stop, and before a look,
        # which takes long enough to be killed in. A look that does not come to its end is taken on resume.
        last, stopped, look = step_in_stage + 1 == stage.steps, told > 0, run.looks.due(step)
        if last or stopped or look or step % config.checkpoint.every == 0:
            started = time.perf_counter()
            run.saver.save(step, model=model, optimizer=optimizer, meta={"stopped": stopped, **meta})
            if run.metrics:
                blocked, background = time.perf_counter() - started, config.checkpoint.background
                run.metrics.add(SaveRecord(step, stage.name, blocked, background))
        if stopped:
            break
        if look:
            run.looks.take(model, step=step, stage=stage.name, world=world)
    return run.saver.wait()  # a stage has at least one step, and its last one is saved


def build(
    run: Run, stage: StageConfig, world: World, saved: Saved | None
) -> tuple[PackedModel, torch.optim.AdamW]:
    """A sharded model and its optimizer as they are before the next step of `stage`."""
    gc.collect()  # FSDP's modules hold one another: those of the stage before would stay beside this one's
    torch.cuda.empty_cache()
    config, plan = run.config, run.plan
    attention = attention_route(config, plan, world)
    with torch.device("meta"):
        model = build_model(plan, attention)
        if stage.lora:
            add_adapters(model, stage.lora)
    table = set_trainable(model, stage)
    heading = f"stage {stage.name}: {stage.steps} steps; attention {attention.name}: {attention.reason}"
    world.say("\n  ".join([heading, *table]))
    # A new stage goes on with the weights of the one before, unless it names its own, and with fresh moments.
    resumed = saved is not None and saved.meta["stage"] == stage.name
    init = "" if resumed else stage.init or ("" if saved else config.model.init)
    revision = "" if stage.init else config.model.revision
    if init == "random" and stage.lora and not stage.trainable:
        world.say("note: adapters alone are trained, beside weights that are random and stay so")
    read = initial_values(init, model, seed=config.seed, revision=revision) if init else None
    parallelize(
        model,
        world=world,
        precision=config.precision,
        recompute=config.model.recompute,
        compile=config.model.compile,
    )
    fill(model, read, device=world.device)
    optimizer = make_optimizer(model, config.optim, stage.lr)
    if saved and resumed:
        checkpoint.load_model(saved, model)
        checkpoint.load_optimizer(saved, model, optimizer)
    elif saved and not init:
        for line in load_weights(saved, model, seed=config.seed):
            world.say(f"  {line}")
    return model, optimizer


def attention_route(config: TrainConfig, plan: Architecture, world: World) -> Attention:
    """The route for the heads of `plan` that one rank computes, probed here."""
    return choose_attention(
        config.model.attention,
        device=world.device,
        dtype=getattr(torch, config.precision.param),
        heads=plan.config["num_attention_heads"] // (world.shape.sp * world.shape.tp),
        head_dim=plan.config["attention_head_dim"],
    )


def share(stage: StageConfig, config: TrainConfig, world: World) -> tuple[int, int]:
    """Data-parallel rank and size under a stage's mesh; rank 0 of its own where these do not make it."""
    mesh = stage.mesh or config.mesh
    try:
        shape = MeshShape.of(mesh, size=world.size)
    except ConfigError:
        return 0, mesh.dp_replicate * mesh.dp_shard
    return world.rank // (shape.sp * shape.tp), shape.dp_replicate * shape.dp_shard
