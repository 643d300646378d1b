"""The model of a stage: its settings and the newest checkpoint in, a sharded model and its optimizer out.

Built on the meta device, changed there (adapters, what is trained), cut over the mesh, and only then given
memory and values: those of the checkpoint where the stage goes on, else what `curriculum.first_weights`
names, else the weights that the stage before ended with. The trade-off: a stage is always built anew, even
where the one before had the same model.
"""

from __future__ import annotations

import gc

import torch

from schemas.train_config import StageConfig, TrainConfig
from trainer.architecture import Architecture
from trainer.attention import Attention
from trainer.checkpoint import Saved, load_model, load_optimizer
from trainer.curriculum import first_weights
from trainer.lineage import load_weights
from trainer.lora import add_adapters
from trainer.model import PackedModel, build_model
from trainer.optim import make_optimizer, set_trainable
from trainer.parallel import World
from trainer.probe import choose_attention
from trainer.sharding import fill, parallelize
from trainer.stage_plan import counted
from trainer.weights import initial_values


def build(
    config: TrainConfig, stage: StageConfig, saved: Saved | None, *, architecture: Architecture, world: World
) -> tuple[PackedModel, torch.optim.AdamW]:
    """The model of `stage` and its optimizer, as they are before its next step.

    All ranks call it, `world` being under the stage's mesh; `saved` is None where the run begins. ConfigError
    where the settings or the weights do not fit the model.
    """
    forget_models()
    attention = attention_route(config, architecture, world)
    with torch.device("meta"):
        model = build_model(architecture, attention)
        if stage.lora:
            add_adapters(model, stage.lora)
    table = set_trainable(model, stage)
    heading = (
        f"stage {stage.name}: {counted(stage.steps, 'step')}; attention {attention.name}: {attention.reason}"
    )
    world.say("\n  ".join([heading, *table]))

    resumed = saved is not None and saved.meta["stage"] == stage.name
    source = None if resumed else first_weights(config, config.stages.index(stage))
    read = None
    if source is not None:
        if source.init == "random" and stage.lora and not stage.trainable:
            world.say("note: adapters alone are trained, beside weights that are random and stay so")
        read = initial_values(source.init, model, seed=config.seed, revision=source.revision, key=source.key)
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
        load_model(saved, model)
        load_optimizer(saved, model, optimizer)
    elif saved and source is None:  # with fresh moments: they are of what the stage before trained
        for line in load_weights(saved, model, seed=config.seed):
            world.say(f"  {line}")
    return model, optimizer


def attention_route(config: TrainConfig, architecture: Architecture, world: World) -> Attention:
    """The route for the heads of `architecture` that one rank computes, probed here."""
    return choose_attention(
        config.model.attention,
        device=world.device,
        dtype=getattr(torch, config.precision.param),
        heads=architecture.config["num_attention_heads"] // (world.shape.sp * world.shape.tp),
        head_dim=architecture.config["attention_head_dim"],
    )


def forget_models() -> None:
    """Free the memory of models that are no longer used: FSDP's modules hold one another, so that those of a
    stage that is over would stay beside the next one's."""
    gc.collect()
    torch.cuda.empty_cache()
