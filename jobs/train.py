"""`latentpress train` and `export-model`: a config in, a trained run out.

One rank trains in this process, more are started by `jobs.launcher`. Under an outer torchrun (RANK is set)
this process is one of its ranks and starts none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from jobs.launcher import launch, train_as
from schemas.card import read_card
from schemas.errors import EXIT_DONE, EXIT_GATE, ConfigError, RunError
from schemas.load import load_config
from schemas.store import location
from schemas.train_config import MeshConfig, TrainConfig


def train(
    config_path: str | Path, *, overrides: Sequence[str] = (), nproc: int = 1, stage: str | None = None
) -> int:
    """Train, or resume, the run of a config on `nproc` local ranks; returns the exit code.

    With `stage` that stage alone, from its own `init` or `model.init`, in a subfolder of the run's output.
    RunError after a Ctrl-C, saved or not.
    """
    config = run_config(config_path, overrides=overrides, stage=stage)
    if "RANK" in os.environ or to_do(config, ranks=nproc):
        with saying_what_is_saved(config):
            if "RANK" in os.environ or nproc == 1:
                train_here(config)
            else:
                launch(config, nproc)
    return EXIT_DONE


@contextmanager
def saying_what_is_saved(config: TrainConfig) -> Iterator[None]:
    """A run that Ctrl-C has ended becomes a RunError that says where it goes on."""
    from trainer.checkpoint import checkpoints_folder, newest
    from trainer.resume import is_finished

    try:
        yield
    except KeyboardInterrupt as interrupt:
        saved = newest(checkpoints_folder(Path(config.output)))
        if saved is None:
            text = "nothing is saved: run again to start anew"
        elif is_finished(config, saved):
            text = f"{saved.path} has all {saved.step} steps"
        else:
            text = f"{saved.path} is whole: run again to go on after step {saved.step}"
        raise RunError(f"interrupted; {text}") from interrupt


def run_config(config_path: str | Path, *, overrides: Sequence[str], stage: str | None) -> TrainConfig:
    """The config of a run, or of one stage of it as a run of its own."""
    config = load_config(config_path, TrainConfig, overrides=overrides)
    if stage is None:
        return config
    chosen = [each for each in config.stages if each.name == stage]
    if not chosen:
        names = ", ".join(each.name for each in config.stages)
        raise ConfigError(f"--stage {stage}: expected one of the stages of {config_path}: {names}")
    return config.model_copy(update={"stages": tuple(chosen), "output": str(Path(config.output) / stage)})


def to_do(config: TrainConfig, *, ranks: int) -> bool:
    """Whether steps, or a look after the last, are left, and says so where not.

    ConfigError where `ranks` do not make the mesh of the stage that is next, or the output is another run's:
    before any rank starts, or waits in a queue.
    """
    from trainer.curriculum import stage_at, total_steps
    from trainer.parallel import MeshShape
    from trainer.resume import already_finished, resume_point

    cards = [read_card(location(dataset.path)) for dataset in config.mixture]
    saved = resume_point(config, cards)
    if already_finished(config, saved):
        return False
    step = min(saved.step if saved else 0, total_steps(config.stages) - 1)
    stage, _ = stage_at(step, config.stages)
    MeshShape.of(stage.mesh or config.mesh, size=ranks)
    return True


def check(config_path: str | Path, *, overrides: Sequence[str], stage: str | None) -> int:
    """Print what `trainer.check` finds of a config; returns the exit code."""
    from jobs.console import console, table
    from trainer import parallel
    from trainer.check import check as run

    config = run_config(config_path, overrides=overrides, stage=stage)
    member, deterministic = parallel.Member.alone(), config.precision.deterministic
    with parallel.join(member, MeshConfig(), deterministic=deterministic) as world:
        findings = run(config, world=world)
    rows = table("check", "found", "")
    for finding in findings:
        outcome = {True: "ok", False: "FAILED", None: "cannot be told"}[finding.passed]
        rows.add_row(finding.question, finding.found, outcome)
    console.print(rows)
    failed = [finding for finding in findings if finding.passed is False]
    for finding in failed:
        console.print(f"{finding.question}: {finding.remedy}")
    return EXIT_GATE if failed else EXIT_DONE


def export_model(checkpoint: str | Path, output: str | Path, *, merge: bool = False) -> int:
    """Write a checkpoint's weights (or a run's newest) to a new folder in the diffusers layout."""
    from trainer.checkpoint import find_checkpoint
    from trainer.export import export

    saved = find_checkpoint(Path(checkpoint))
    notes = export(saved, Path(output), merge=merge)
    print("\n  ".join([f"{saved.path} (step {saved.step}) -> {output}", *notes]))
    return EXIT_DONE


def train_here(config: TrainConfig) -> None:
    """This process as one rank: alone, or as the environment says."""
    from trainer.parallel import Member

    member = Member.from_environment() if "RANK" in os.environ else Member.alone()
    train_as(member, config, ended=lambda: None)
