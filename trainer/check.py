"""The no-op check: a config in; whether its weights pass whole through load, step, save and export, out.

One step at learning rate 0 is trained, saved, exported and read again: every parameter must be what it was at
its source, and the loss the same. This finds what is the field's worst trap, weights that a load which is not
strict leaves at their first values: training then looks sound, and samples are noise. Then two questions to
the model: is it better than predicting nothing, and do captions matter to it? It runs in one process, and for
its time needs room on disk for the weights twice and for the optimizer's moments.
"""

from __future__ import annotations

import contextlib
import gc
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from schemas.train_config import LrConfig, MeshConfig, TrainConfig
from trainer.architecture import architecture, data_shape
from trainer.batch import prepare
from trainer.checkpoint import find_checkpoint, locked
from trainer.export import export
from trainer.loop import attention_route, open_loader, train
from trainer.losses import batch_loss
from trainer.metrics import read_records
from trainer.mixture import Mixture
from trainer.model import build_model
from trainer.objective import make_objective
from trainer.parallel import World
from trainer.sharding import ReadSlice, fill, parallelize, predict
from trainer.stage_check import check_stages, run_architecture
from trainer.validate import validate
from trainer.weights import initial_values

LOSS_GATE = {"float32": 1e-5, "bfloat16": 1e-2}
"""Largest relative difference of the first loss before and after, by `precision.param`."""
CAPTION_GATE = 1e-6
"""Least relative difference of the loss with captions exchanged."""
_CLIPS = 8
_TEMPORARY = ".tmp-check-"


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    question: str
    found: str
    passed: bool | None
    """None where it cannot be told."""


def check(config: TrainConfig, *, world: World) -> list[Finding]:
    """Check the first stage of `config`, in this one process, and the settings of all; what a run would make
    of it is left alone."""
    stage = config.stages[0]
    init = stage.init or config.model.init
    revision = "" if stage.init else config.model.revision
    mixture = Mixture.of(config.mixture)
    data = data_shape(*mixture.catalogs)
    check_stages(config, run_architecture(config, data), data, step=0)
    still = stage.model_copy(update={"steps": 1, "lr": LrConfig(peak=0.0), "mesh": None})
    output = Path(config.output)
    with locked(output), contextlib.ExitStack() as held:
        for left in output.glob(f"{_TEMPORARY}*"):  # by a check that was killed
            shutil.rmtree(left)
        folder = held.enter_context(tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=output))
        run, exported = Path(folder) / "run", Path(folder) / "exported"
        validation = config.validation.model_copy(update={"samples": 0, "clips": _CLIPS})
        changes = {"output": str(run), "stages": (still,), "validation": validation, "mesh": MeshConfig()}
        once = config.model_copy(update=changes)
        with contextlib.redirect_stdout(sys.stderr):  # what a run says of itself is not the answer
            train(once, world=world)
        gc.collect()  # as between stages: the model that was trained would stay beside the one to come
        torch.cuda.empty_cache()
        export(find_checkpoint(run), exported, merge=True)
        before = next(r["loss"] for r in read_records(run / "metrics.jsonl") if r["step"] == 1)

        model_config = config.model.model_copy(update={"init": str(exported), "revision": ""})
        plan = architecture(model_config, data)
        attention = attention_route(once, plan, world)
        with torch.device("meta"):
            model = build_model(plan, attention)
        read = initial_values(str(exported), model, seed=config.seed)
        source = initial_values(init, model, seed=config.seed, revision=revision)
        findings = [_same_values(model, source, read)]
        parallelize(model, world=world, precision=config.precision)
        fill(model, read, device=world.device)
        objective = make_objective(config.loss, plan.schedule)
        with open_loader(once, mixture, plan=plan, world=world) as loader, torch.no_grad():
            after, nothing, weights = 0.0, 0.0, loader.step_weights(0)
            for pack in loader.packs(0):
                batch = prepare(pack, objective=objective, layout=model.layout).to(world.device)
                prediction = predict(model, batch.inputs, world=world)
                after += float(batch_loss(prediction, batch, loss=config.loss, step=weights)[0])
                zeros = torch.zeros_like(prediction)
                nothing += float(batch_loss(zeros, batch, loss=config.loss, step=weights)[0])
            gate = LOSS_GATE[config.precision.param]
            same = abs(after - before) <= gate * abs(before)
            findings += [
                Finding(
                    "loss of the first step, from the exported weights",
                    f"{after:.6g}, in training {before:.6g}",
                    same,
                ),
                Finding(
                    "loss of the first step, less than of predicting nothing",
                    f"{after:.6g}, of nothing {nothing:.6g}",
                    None if init == "random" else after < nothing,
                ),
            ]
            seen = validate(
                partial(predict, model, world=world),
                loader.held_out(stage.name, _CLIPS),
                reader=loader,
                step=0,
                stage=stage.name,
                objective=objective,
                layout=model.layout,
                timesteps=config.validation.timesteps,
                world=world,
            )
            findings.append(_captions(seen.loss, seen.shuffled_loss, random=init == "random"))
    return findings


def _same_values(model: torch.nn.Module, source: ReadSlice, read: ReadSlice) -> Finding:
    """By value: AdamW makes +0.0 of -0.0 even where nothing is learned."""
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    differ = []
    for name, shape in shapes.items():
        slices = tuple(slice(0, size) for size in shape)
        if not torch.equal(source(name, slices), read(name, slices)):
            differ.append(name)
    found = f"{len(differ)} of {len(shapes)} differ" + _some(differ)
    return Finding("parameters after a step at learning rate 0, saved and exported", found, not differ)


def _some(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > 3 else ""
    return f": {', '.join(names[:3])}{more}" if names else ""


def _captions(own: float, exchanged: float | None, *, random: bool) -> Finding:
    question = "loss with captions exchanged between clips"
    if exchanged is None:
        return Finding(question, "only one clip", None)
    found = f"{exchanged:.6g}, with their own {own:.6g}"
    if random:
        return Finding(question, f"{found}; random weights predict 0 whatever they are told", None)
    return Finding(question, found, abs(exchanged - own) > CAPTION_GATE * own)
