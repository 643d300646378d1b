"""The no-op check: a config in; whether its weights pass whole through load, step, save and export, out.

One step at learning rate 0 is trained, saved, exported and read again: every parameter must be what it was at
its source, and the loss the same. This finds what is the field's worst trap, weights that a load which is not
strict leaves at their first values: training then looks sound, and samples are noise. Then two questions to
the model: is it better than predicting nothing, and do captions matter to it? It runs in one process, and for
its time needs room on disk for the weights twice and for the optimizer's moments.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from schemas.train_config import LrConfig, MeshConfig, TrainConfig
from trainer.architecture import architecture, data_shape
from trainer.batch import prepare
from trainer.checkpoint import find_checkpoint, locked
from trainer.curriculum import first_weights
from trainer.export import export
from trainer.loader import Loader, open_loader
from trainer.loop import train
from trainer.losses import batch_loss
from trainer.metrics import read_records
from trainer.mixture import Mixture
from trainer.model import PackedModel, build_model
from trainer.objective import Objective, make_objective
from trainer.parallel import World
from trainer.sharding import ReadSlice, fill, parallelize, predict
from trainer.stage_check import check_stages, run_architecture
from trainer.stage_model import attention_route, forget_models
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
    remedy: str
    """What to do where it has not."""


def check(config: TrainConfig, *, world: World) -> list[Finding]:
    """Check the first stage of `config`, in this one process, and the settings of all; what a run would make
    of it is left alone."""
    source = first_weights(config, 0)
    assert source is not None
    mixture = Mixture.of(config.mixture)
    data = data_shape(*mixture.catalogs)
    check_stages(config, run_architecture(config, data), data, step=0)
    with _scratch(Path(config.output)) as folder:
        # Train, save, export.
        once, exported = _one_step(config, output=folder / "run"), folder / "exported"
        in_training = _loss_in_training(once, world)
        forget_models()
        export(find_checkpoint(folder / "run"), exported, merge=True)

        # Read both the source and what was exported, as a run reads its first weights, and compare them.
        again = config.model.model_copy(update={"init": str(exported), "revision": ""})
        transformer = architecture(again, data)
        attention = attention_route(once, transformer, world)
        with torch.device("meta"):
            model = build_model(transformer, attention)
        given = initial_values(source.init, model, seed=config.seed, revision=source.revision, key=source.key)
        read = initial_values(str(exported), model, seed=config.seed)
        values = _values(model, given, read)

        # Ask the model that was exported.
        parallelize(model, world=world, precision=config.precision)
        fill(model, read, device=world.device)
        objective = make_objective(config.loss, transformer.schedule)
        with open_loader(once, mixture, architecture=transformer, world=world) as loader, torch.no_grad():
            loss, of_nothing = _first_losses(model, loader, objective, config=config, world=world)
            seen = validate(
                partial(predict, model, world=world),
                loader.held_out(once.stages[0].name, _CLIPS),
                reader=loader,
                step=0,
                stage=once.stages[0].name,
                objective=objective,
                layout=model.layout,
                timesteps=config.validation.timesteps,
                world=world,
            )
    random = source.init == "random"
    return [
        values,
        _same_loss(loss, in_training, gate=LOSS_GATE[config.precision.param]),
        _useful(loss, of_nothing, random=random),
        _captions(seen.loss, seen.shuffled_loss, random=random),
    ]


@contextlib.contextmanager
def _scratch(output: Path) -> Iterator[Path]:
    """A folder in a run's, held as by a run; what a check that was killed has left there goes."""
    with locked(output):
        for left in output.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(left)
        with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=output) as folder:
            yield Path(folder)


def _one_step(config: TrainConfig, *, output: Path) -> TrainConfig:
    """A run of one step of the first stage, at learning rate 0, on one rank."""
    still = config.stages[0].model_copy(update={"steps": 1, "lr": LrConfig(peak=0.0), "mesh": None})
    validation = config.validation.model_copy(update={"samples": 0, "clips": _CLIPS})
    changes = {"output": str(output), "stages": (still,), "validation": validation, "mesh": MeshConfig()}
    return config.model_copy(update=changes)


def _loss_in_training(once: TrainConfig, world: World) -> float:
    """The loss of a run's only step."""
    with contextlib.redirect_stdout(sys.stderr):  # what a run says of itself is not the answer
        train(once, world=world, is_check=True)
    [record] = read_records(Path(once.output) / "metrics.jsonl")
    return float(record["loss"])


def _first_losses(
    model: PackedModel, loader: Loader, objective: Objective, *, config: TrainConfig, world: World
) -> tuple[float, float]:
    """The loss of the first step: (of the model's predictions, of predicting 0)."""
    loss, of_nothing, weights = 0.0, 0.0, loader.step_weights(0)
    for pack in loader.packs(0):
        batch = prepare(pack, objective=objective, layout=model.layout).to(world.device)
        prediction = predict(model, batch.inputs, world=world)
        loss += float(batch_loss(prediction, batch, loss=config.loss, step=weights)[0])
        zeros = torch.zeros_like(prediction)
        of_nothing += float(batch_loss(zeros, batch, loss=config.loss, step=weights)[0])
    return loss, of_nothing


def _values(model: torch.nn.Module, given: ReadSlice, read: ReadSlice) -> Finding:
    """By value: AdamW makes +0.0 of -0.0 even where nothing is learned."""
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    differ = []
    for name, shape in shapes.items():
        slices = tuple(slice(0, size) for size in shape)
        if not torch.equal(given(name, slices), read(name, slices)):
            differ.append(name)
    found = f"{len(differ)} of {len(shapes)} differ" + _some(differ)
    question = "parameters after a step at learning rate 0, saved and exported"
    remedy = (
        "where model.init holds values that are not numbers, fetch it again; else train nothing with this "
        "version, for what it saves is not what it was given"
    )
    return Finding(question, found, not differ, remedy)


def _some(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > 3 else ""
    return f": {', '.join(names[:3])}{more}" if names else ""


def _same_loss(loss: float, in_training: float, *, gate: float) -> Finding:
    found = f"{loss:.6g}, in training {in_training:.6g}"
    same = abs(loss - in_training) <= gate * abs(in_training)
    question = "loss of the first step, from the exported weights"
    remedy = (
        "where parameters differ too, that is why; else check again with --set model.compile=false, "
        "model.attention=sdpa or precision.param=float32: what makes the losses the same was at fault"
    )
    return Finding(question, found, same, remedy)


def _useful(loss: float, of_nothing: float, *, random: bool) -> Finding:
    question = "loss of the first step, less than of predicting nothing"
    found = f"{loss:.6g}, of nothing {of_nothing:.6g}"
    remedy = (
        "weights that were trained do better where data and objective are those of their training: "
        "preprocess with the VAE and the text encoder of their pipeline, and see that loss.objective is as "
        "it was"
    )
    return Finding(question, found, None if random else loss < of_nothing, remedy)


def _captions(own: float, exchanged: float | None, *, random: bool) -> Finding:
    question = "loss with captions exchanged between clips"
    remedy = (
        "look at captions with `latentpress inspect`: are there different ones? If so, these weights do not "
        "hear them: preprocess with the text encoder of their pipeline"
    )
    if exchanged is None:
        return Finding(question, "only one clip", None, remedy)
    found = f"{exchanged:.6g}, with their own {own:.6g}"
    if random:
        return Finding(question, f"{found}; random weights predict 0 whatever they are told", None, remedy)
    return Finding(question, found, abs(exchanged - own) > CAPTION_GATE * own, remedy)
