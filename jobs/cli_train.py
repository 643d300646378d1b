"""`latentpress` on training runs: train, submit, export-model, and report, which also takes a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.options import Json, Set, job
from schemas.errors import ConfigError
from schemas.store import location

app = typer.Typer()

Stage = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="This stage alone, from its own `init` or model.init, in a subfolder of the run's output.",
    ),
]


@app.command()
def train(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="TOML file, such as configs/train/demo.toml.")
    ],
    nproc: Annotated[int, typer.Option(min=1, help="Processes on this machine, one per GPU.")] = 1,
    stage: Stage = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Train nothing: a step at learning rate 0, saved, exported and read again, must change "
            "nothing, and captions must matter. Exit code 3 where it does or they do not.",
        ),
    ] = False,
    set_: Set = [],  # noqa: B006
) -> None:
    """Train a video model on a dataset.

    Ctrl-C saves and stops it. Run it again to resume from the newest complete checkpoint; also works under
    torchrun.
    """
    if check and nproc > 1:
        raise ConfigError("--check runs in one process; leave --nproc out")
    if check:
        raise typer.Exit(job("train").check(config, overrides=set_, stage=stage))
    raise typer.Exit(job("train").train(config, overrides=set_, nproc=nproc, stage=stage))


@app.command()
def submit(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="TOML file, such as configs/train/demo.toml.")
    ],
    slurm: Annotated[
        bool, typer.Option("--slurm", help="As a Slurm job that is queued again until the run is done.")
    ] = False,
    nodes: Annotated[int, typer.Option(min=1, help="--slurm: machines.")] = 1,
    gpus_per_node: Annotated[
        int, typer.Option(min=0, help="--slurm: GPUs of each, one process a GPU; 0: one process, on CPUs.")
    ] = 1,
    cpus_per_task: Annotated[int, typer.Option(min=1, help="--slurm: cores of each process.")] = 8,
    time_min: Annotated[
        int,
        typer.Option(
            "--time", metavar="MINUTES", min=1, help="--slurm: longest time of one job, not of the run."
        ),
    ] = 240,
    partition: Annotated[str | None, typer.Option(help="--slurm: partition.")] = None,
    account: Annotated[str | None, typer.Option(help="--slurm: account.")] = None,
    sbatch: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=VALUE", help="--slurm: another option of sbatch, as qos=high; repeatable."
        ),
    ] = [],  # noqa: B006
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="On the Ray cluster at this address, or `auto`; waits for its end."
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="--ray: processes, one per GPU.")] = 1,
    stage: Stage = None,
    set_: Set = [],  # noqa: B006
) -> None:
    """Train on a cluster: by Slurm or by Ray.

    The same run as `train` makes: what one has begun the other resumes. Example:
    latentpress submit configs/train/curriculum.toml --slurm --nodes 4 --gpus-per-node 8 --time 480
    """
    if slurm == (ray is not None):
        raise ConfigError("expected --slurm or --ray ADDRESS, found " + ("both" if slurm else "none"))
    if ray is not None:
        code = job("ray_train").submit_ray(config, overrides=set_, stage=stage, address=ray, workers=workers)
        raise typer.Exit(code)
    module = job("submit")
    options = module.SlurmOptions(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        cpus_per_task=cpus_per_task,
        time_min=time_min,
        partition=partition,
        account=account,
        sbatch=module.sbatch_options(sbatch),
    )
    raise typer.Exit(module.submit_slurm(config, overrides=set_, stage=stage, options=options))


@app.command("export-model")
def export_model(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A step-N folder, or a run (its newest is taken).")
    ],
    output: Annotated[
        Path, typer.Argument(metavar="OUTPUT", help="Folder to write in the diffusers layout.")
    ],
    merge: Annotated[
        bool, typer.Option("--merge", help="Add LoRA adapters into the matrices they stand beside.")
    ] = False,
) -> None:
    """Write a checkpoint's weights for diffusers.

    Adapters become pytorch_lora_weights.safetensors, which a pipeline's load_lora_weights opens.
    """
    raise typer.Exit(job("train").export_model(checkpoint, output, merge=merge))


@app.command()
def report(
    path: Annotated[
        Path,
        typer.Argument(
            parser=location,
            metavar="PATH",
            help="Dataset (folder or s3://BUCKET/PREFIX), or output folder of train, finished or not.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            parser=location,
            metavar="FILE",
            help="Page to write, s3://BUCKET/KEY too; PATH/report.html by default.",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="Of a dataset: samples to decode and draw; 12 by default."),
    ] = None,
    vae: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Of a dataset: where its video encoder is now, if it moved; the same weights.",
        ),
    ] = None,
    json_: Json = False,
) -> None:
    """Draw a dataset or a training run as one HTML page.

    Of a dataset: what its numbers mean, histograms, samples beside their sources, quarantine with what to do,
    throughput. Of a run: losses, speed, memory and saves over the steps, sample sheets, settings. The page
    holds its pictures, so it can be sent as it is.
    """
    if (path / "card.json").exists():
        module = job("report_dataset")
        samples = module.SAMPLES if samples is None else samples
        raise typer.Exit(module.report_dataset(path, output=output, samples=samples, vae=vae, as_json=json_))
    if not (path / "metrics.jsonl").exists():
        raise ConfigError(
            f"{path}: expected a dataset (which has a card.json) or the output folder of `latentpress train` "
            "(which has a metrics.jsonl from its first step on); found neither"
        )
    if samples is not None or vae is not None:
        raise ConfigError(f"{path} is a training run; --samples and --vae are for datasets")
    raise typer.Exit(job("report_run").report_run(path, output=output, as_json=json_))
