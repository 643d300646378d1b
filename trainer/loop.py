"""The training story, whole: a config in; checkpoints, metrics, samples and a loss curve out.

Every rank runs `train`. A step is a pure function of its number, so nothing but weights and AdamW's
moments carries over, and resuming, the next stage and the first start are one path: build the model,
load what the newest checkpoint has, go on from its step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from schemas.adoption import adoption_notes
from schemas.errors import DatasetError, RunError
from schemas.train_config import TrainConfig
from trainer.architecture import Architecture, data_shape
from trainer.batch import Batch
from trainer.checkpoint import Saved, check_files, locked
from trainer.curriculum import stage_at, total_steps
from trainer.feed import StepData, feed
from trainer.layout import check_clips
from trainer.loader import Loader, open_loader
from trainer.look import Looks, is_owed
from trainer.losses import batch_loss
from trainer.metrics import Metrics, SaveRecord
from trainer.mixture import Mixture
from trainer.model import PackedModel
from trainer.objective import Objective, make_objective
from trainer.optim import set_lr
from trainer.packing import StepWeights
from trainer.parallel import World
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
from trainer.sharding import clip_grad_norm, predict, reduce_over_replicas
from trainer.stage_check import check_stages, run_architecture
from trainer.stage_model import build
from trainer.stage_plan import counted
from trainer.step_log import StepLog
from trainer.stopping import Stopping, stopping


@dataclass(frozen=True)
class Run:
    """What stays the same over all stages."""

    config: TrainConfig
    world: World
    loader: Loader
    architecture: Architecture
    objective: Objective
    metrics: Metrics | None
    """On rank 0."""
    saver: Saver
    stop: Stopping
    looks: Looks


def train(
    config: TrainConfig, *, world: World, pictures: Pictures | None = None, is_check: bool = False
) -> None:
    """Train to the end of the last stage, or until a stop signal; the same call resumes.

    `pictures` shows the samples of validation; without it none are drawn. `is_check`: the output is about to
    go, so nothing is said of what lies there. KeyboardInterrupt after a Ctrl-C: at once before the first step
    and at the second one, else once all is saved.
    """
    output, total = Path(config.output), total_steps(config.stages)
    mixture = Mixture.of(config.mixture)
    with ExitStack() as held:
        stop = held.enter_context(stopping(config.checkpoint))
        saved = world.on_main(lambda: start(config, mixture, held))
        if world.on_main(lambda: already_finished(config, saved)):
            return
        step = saved.step if saved else 0

        # The transformer, and all stages to come held against it: nothing is read or built before.
        data = data_shape(*mixture.catalogs)
        architecture = saved_architecture(saved) if saved else run_architecture(config, data)
        world.on_main(lambda: check_stages(config, architecture, data, step=step))
        objective = make_objective(config.loss, architecture.schedule)
        architecture = replace(architecture, schedule=objective.schedule)  # with the objective, for export

        # The data, and the plan of who trains on what, the same on every rank.
        loader = held.enter_context(open_loader(config, mixture, architecture=architecture, world=world))
        same_plan(loader, world)
        check_clips(loader.latent_shapes(), architecture.layout)
        tell(mixture, loader, world)
        notes: list[str] = []
        if saved:
            digest = loader.plan_digest(saved.meta["stage"])
            notes = resume_notes(config, saved, plan_digest=digest)
            world.say("\n".join(notes))
            check_files(saved)

        # What is written: records, checkpoints, looks at held-out clips.
        metrics = None
        if world.is_main:
            recorder = Metrics(
                output,
                first_step=step,
                total_steps=total,
                normalize=config.loss.normalize,
                changes=notes[1:],
            )
            metrics = held.enter_context(recorder)
        keep, background = config.checkpoint.keep, config.checkpoint.background
        saver = held.enter_context(Saver(output, world=world, keep=keep, background=background))
        prompt = None
        if config.validation.samples and pictures:
            prompt = guidance_prompt(mixture.catalogs[0].dataset, guidance=config.validation.guidance)
        looks = Looks(config, loader, objective, metrics, pictures, prompt)
        run = Run(config, world, loader, architecture, objective, metrics, saver, stop, looks)

        stopped = False
        if saved and world.on_main(lambda: is_owed(config, step)):
            look_again(run, saved)
            stopped = told_to_stop(run)
        while step < total and not stopped:
            saved = train_stage(run, step, saved)
            step = saved.step
            stopped = saved.meta["stopped"] or told_to_stop(run)
    if saved and not is_finished(config, saved):
        world.say(
            f"stopped {stop.reason}, saved after step {step} in {saved.path}; run the same command again to "
            "go on (requeue me)"
        )
    elif saved and not is_check:
        world.say(
            f"finished: {counted(step, 'step')}; weights in {saved.path}, loss curve in {output / 'loss.png'}"
        )
    if stop.interrupted:
        raise KeyboardInterrupt


def start(config: TrainConfig, mixture: Mixture, held: ExitStack) -> Saved | None:
    """Hold the output; where to go on."""
    held.enter_context(locked(Path(config.output)))
    return resume_point(config, [catalog.card for catalog in mixture.catalogs])


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
    model, _ = build(run.config, stage, saved, architecture=run.architecture, world=world)
    run.looks.take(model, step=saved.step, stage=stage.name, world=world)


def told_to_stop(run: Run) -> bool:
    """Whether any rank is, all ranks together: asked after what takes its time, a save or a look."""
    return run.world.sum([run.stop.told])[0] > 0


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
        architecture=run.architecture,
        ranks=world.size,
    )
    model, optimizer = build(config, stage, saved, architecture=run.architecture, world=world)
    world.on_main(lambda: keep_config(config))  # not before: a config that is refused replaces none
    log = StepLog(config, stage, model, loader=run.loader, metrics=run.metrics, world=world)
    steps = feed(
        run.loader,
        steps=range(step, step + stage.steps - done),
        architecture=run.architecture,
        objective=run.objective,
        world=world,
        ahead=config.data.prefetch > 0,
    )
    run.stop.begin(tell=world.is_main)
    for step_in_stage in range(done, stage.steps):
        started = time.perf_counter()

        # Fetch this rank's packs, noised; threads have made them while the last step ran.
        data = next(steps)
        waited_s = time.perf_counter() - started

        loss, errors = forward_backward(model, data.batches, weights=data.weights, config=config, world=world)

        # Clip. The norm is that of the summed gradients, so every rank takes the same decision.
        grad_norm = clip_grad_norm(model.parameters(), max_norm=config.optim.max_grad_norm)
        clip_errors = errors.tolist()
        if not math.isfinite(grad_norm):
            raise not_finite(step, grad_norm, data, clip_errors, world=world)

        # Step, with the learning rate of this step's number.
        lr = set_lr(optimizer, stage.lr, step_in_stage=step_in_stage, steps=stage.steps)
        optimizer.step()
        optimizer.zero_grad()
        step += 1

        # Log: the one collective of a step's end, which also tells all ranks whether any is to stop.
        run.stop.took(time.perf_counter() - started)
        stopped = log.add(
            step,
            data,
            loss=loss,
            clip_errors=clip_errors,
            grad_norm=grad_norm,
            lr=lr,
            started=started,
            waited_s=waited_s,
            told=run.stop.told,
        )

        # Save and look at intervals and at the end of the stage; save when told to stop, and before a look,
        # which takes long enough to be killed in. A look that does not come to its end is taken on resume.
        last, look = step_in_stage + 1 == stage.steps, run.looks.due(step)
        if last or stopped or look or step % config.checkpoint.every == 0:
            started = time.perf_counter()
            run.saver.save(step, model=model, optimizer=optimizer, meta={"stopped": stopped, **meta})
            if run.metrics:
                blocked_s, background = time.perf_counter() - started, config.checkpoint.background
                run.metrics.add(SaveRecord(step, stage.name, blocked_s, background))
            stopped = stopped or told_to_stop(run)
            if look and not stopped:
                run.looks.take(model, step=step, stage=stage.name, world=world)
                stopped = told_to_stop(run)
            if stopped:  # the checkpoint is there
                break
    return run.saver.wait()  # a stage has at least one step, and its last one is saved


def forward_backward(
    model: PackedModel, batches: Sequence[Batch], *, weights: StepWeights, config: TrainConfig, world: World
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of this rank's packs, one after the other; (their share [] of the step's loss, the error of
    each clip [clips]), on the device.

    The losses of packs are shares of the whole step's, so gradients add up. Nothing here waits for the
    device.
    """
    shares, errors = [], []
    for batch in batches:
        prediction = predict(model, batch.inputs, world=world)
        share, of_clips = batch_loss(prediction, batch.to(world.device), loss=config.loss, step=weights)
        share = share / world.shape.sp  # peers that share the pack all have its whole loss
        reduce_over_replicas(model, last=batch is batches[-1], precision=config.precision)
        share.backward()
        shares.append(share.detach())
        errors.append(of_clips)
    return torch.stack(shares).sum(), torch.cat(errors)


def not_finite(
    step: int, grad_norm: float, data: StepData, clip_errors: Sequence[float], *, world: World
) -> RunError:
    """What to say of a step whose gradients cannot be used, the same on all ranks, which call it together."""
    found = zip(data.segments, clip_errors, strict=True)
    bad = [clip.sample_id for clip, error in found if not math.isfinite(error)]
    return RunError(
        f"step {step}: the gradient norm is {grad_norm}; clips with a loss that is not finite: "
        f"{', '.join(world.gather(bad)) or 'none'}; checkpoints are from before, so lower the stage's lr, or "
        "look at these clips with `latentpress inspect`"
    )
