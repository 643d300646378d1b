"""The `latentpress` command: one function per subcommand, each a thin door to a module of its own.

Exit codes: 0 done, 1 unfinished or failed, 2 usage or config error, 3 finished but over the allowed
quarantine rate or past a failed gate. Heavy packages are imported by the subcommand that needs them.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from schemas.errors import EXIT_FAILED, ConfigError, LatentpressError, MissingExtraError
from schemas.store import location

OPTIONAL = (
    "av",
    "diffusers",
    "jinja2",
    "matplotlib",
    "PIL",
    "ray",
    "safetensors",
    "submitit",
    "torch",
    "transformers",
)
"""Packages that the extras `pipeline`, `train` and `slurm` bring, as far as each needs them."""

app = typer.Typer(
    name="latentpress",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="From a folder of mixed videos to verified latent shards, and a video model trained on them. "
    "A first walk: demo, validate, plan, preprocess, verify, inspect, train.",
)
bench = typer.Typer(no_args_is_help=True, help="Measure speed beside ceiling and peers.")
app.add_typer(bench, name="bench")

Set = Annotated[
    list[str],
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override one config key, such as units.rows=8; repeatable."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Stage = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="This stage alone, from its own `init` or model.init, in a subfolder of the run's output.",
    ),
]
Config = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="TOML file, such as configs/preprocess/demo.toml.")
]
Adopt = Annotated[
    bool,
    typer.Option(
        "--adopt",
        help="Go on with settings other than the dataset's, where that can be; leaves a record of it.",
    ),
]
Vae = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER",
        help="Where the dataset's video encoder is now, if it moved: folder or hub id, the same weights.",
    ),
]
DatasetArgument = Annotated[
    Path,
    typer.Argument(
        parser=location, metavar="DATASET", help="Folder written by preprocess, or s3://BUCKET/PREFIX."
    ),
]


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the clips go.")] = Path("data/demo"),
) -> None:
    """Make small captioned videos to try it all.

    Thirteen clips of many codecs, containers, rates and shapes; one is broken on purpose.
    """
    manifest = _job("demo").make_demo(folder)
    print(f"wrote {manifest}")


@app.command()
def scan(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of videos, searched recursively.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Manifest to write.")] = Path(
        "manifest.jsonl"
    ),
    json_: Json = False,
) -> None:
    """Make a manifest from a folder of videos.

    Captions come from a .txt file beside each video, or from metadata.jsonl, .csv or .parquet.
    """
    raise typer.Exit(_job("scan").scan(folder, output=output, as_json=json_))


@app.command()
def validate(
    manifest: Annotated[
        Path, typer.Argument(metavar="MANIFEST", help="Manifest (.jsonl, .csv, .parquet) or folder.")
    ],
    config: Annotated[
        Path | None,
        typer.Option("-c", "--config", help="Check against this preprocess config's limits and rules."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the rows that passed as a new manifest.")
    ] = None,
    decode: Annotated[
        bool, typer.Option("--decode", help="Decode every picture, not only the first; much slower.")
    ] = False,
    set_: Set = [],  # noqa: B006
    json_: Json = False,
) -> None:
    """Check every row of a manifest.

    File, streams, first picture, caption, duplicates and limits, without decoding the rest. Exit code 3
    where more rows are bad than the config's quarantine rate allows (any, without a config).
    """
    raise typer.Exit(
        _job("validate").validate(
            manifest, config=config, overrides=set_, output=output, as_json=json_, decode=decode
        )
    )


@app.command()
def plan(config: Config, set_: Set = [], adopt: Adopt = False, json_: Json = False) -> None:  # noqa: B006
    """Say what preprocess would do.

    What changed since the last run and what runs for it, clips per bucket, drops with reasons, tokens, disk,
    time and memory; writes nothing.
    """
    raise typer.Exit(_job("plan").plan(config, overrides=set_, adopt=adopt, as_json=json_))


@app.command()
def preprocess(
    config: Config,
    set_: Set = [],  # noqa: B006
    adopt: Adopt = False,
    json_: Json = False,
) -> None:
    """Turn videos into latent shards.

    Run it again to resume, to add rows to the manifest or to edit captions: only what is missing runs.
    Clips that cannot be used end in quarantine.parquet with a reason.
    """
    _one_thread_per_process()
    raise typer.Exit(_job("preprocess").run(config, overrides=set_, adopt=adopt, as_json=json_))


@app.command("import")
def import_(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="What the trainer calls data_root (cogvideo), precomputation_dir (finetrainers), its JSONL "
            "(ttt-video) or cache_directory (musubi).",
        ),
    ],
    output: Annotated[
        str,
        typer.Option("-o", "--output", metavar="DATASET", help="Folder, or s3://BUCKET/PREFIX, to write."),
    ],
    format_: Annotated[
        Literal["cogvideo", "finetrainers", "ttt-video", "musubi"],
        typer.Option("--format", help="The trainer that wrote the cache."),
    ],
    vae: Annotated[
        str,
        typer.Option(
            metavar="FOLDER",
            help="The VAE the latents are of, as diffusers saves it (or its hub id); no cache names it.",
        ),
    ],
    fps: Annotated[
        float,
        typer.Option(
            min=0.001,
            help="Frames per second the trainer took from a clip; no cache holds times. TTT-Video, Wan: 16.",
        ),
    ],
    text_encoder: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="The text encoder (or pipeline), to make the empty prompt where the cache has none.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="cogvideo: captions, line by line; default: SOURCE/prompts.txt.")
    ] = None,
    videos: Annotated[
        Path | None, typer.Option(help="cogvideo: their videos, line by line; default: SOURCE/videos.txt.")
    ] = None,
    leave_out: Annotated[
        list[str],
        typer.Option(
            metavar="KEY", help="Do without what the cache holds under this key, such as clip; repeatable."
        ),
    ] = [],  # noqa: B006
    json_: Json = False,
) -> None:
    """Take over latents another trainer cached.

    Latents and prompt embeddings become a dataset like any other, nothing is encoded again; scaled latents
    are unscaled. What cannot be known is refused, with what to give. Run it again to go on after an
    interrupt, or to add what the cache gained. docs/import.md tells what each format holds. Example:
    latentpress import data/train -o latents --format cogvideo --vae CogVideoX-5b/vae --fps 8
    """
    _one_thread_per_process()
    job = _job("import_")
    raise typer.Exit(
        job.run(
            job.ImportOptions(
                source=source,
                output=output,
                format=format_,
                vae=vae,
                fps=fps,
                text_encoder=text_encoder,
                prompts=prompts,
                videos=videos,
                leave_out=tuple(leave_out),
            ),
            as_json=json_,
        )
    )


@app.command()
def retry(
    dataset: DatasetArgument,
    reason: Annotated[
        list[str],
        typer.Option("--reason", metavar="CODE", help="Rows quarantined for this reason; repeatable."),
    ] = [],  # noqa: B006
    all_: Annotated[bool, typer.Option("--all", help="Rows quarantined for any reason.")] = False,
    json_: Json = False,
) -> None:
    """Have quarantined rows tried again.

    Such as those over a limit that was raised since. The next preprocess runs just these; what is
    committed stays.
    """
    raise typer.Exit(_job("retry").retry(dataset, reasons=reason, everything=all_, as_json=json_))


@app.command()
def verify(
    dataset: DatasetArgument,
    config: Annotated[
        Path | None, typer.Option("-c", "--config", help="Also hold the card against this preprocess config.")
    ] = None,
    set_: Set = [],  # noqa: B006
    samples: Annotated[
        int,
        typer.Option(
            "--sample",
            metavar="N",
            min=0,
            help="Also decode N samples again and hold them against their latents.",
        ),
    ] = 0,
    min_psnr: Annotated[
        float | None,
        typer.Option("--min-psnr", metavar="DB", help="Lowest mean PSNR of such a sample; 10 if not given."),
    ] = None,
    vae: Vae = None,
    json_: Json = False,
) -> None:
    """Check every byte of a dataset.

    Hashes, shapes, NaN and Inf, every row exactly once, tables against records. Repairs nothing, but
    prints the commands that would. Exit code 3 where a sample differs from its source.
    """
    raise typer.Exit(
        _job("verify").verify(
            dataset, config=config, overrides=set_, samples=samples, min_psnr=min_psnr, as_json=json_, vae=vae
        )
    )


@app.command()
def inspect(
    dataset: DatasetArgument,
    sample: Annotated[
        str | None,
        typer.Argument(metavar="SAMPLE", help="Start of a sample id, or a source name; default: first."),
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="PNG to write.")] = None,
    drift: Annotated[
        bool,
        typer.Option(
            "--drift",
            help="Measure instead how far windows of a long clip's latents lie from encoding them alone.",
        ),
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            "-c", "--config", help="Read the source under this preprocess config's limits and sources."
        ),
    ] = None,
    vae: Vae = None,
    json_: Json = False,
) -> None:
    """Draw a sample: source over decoded latents.

    A PNG with time stamps, the difference and PSNR.
    """
    if drift and output is not None:
        raise ConfigError("--drift draws nothing; leave -o out")
    if drift:
        raise typer.Exit(_job("drift").run(dataset, sample=sample, as_json=json_, config=config, vae=vae))
    raise typer.Exit(
        _job("inspect").run(dataset, sample=sample, output=output, as_json=json_, config=config, vae=vae)
    )


@app.command()
def gc(
    dataset: DatasetArgument,
    older_than: Annotated[
        float,
        typer.Option(
            "--older-than",
            metavar="HOURS",
            min=0,
            help="Leave what changed since; below a day only while no run is at work.",
        ),
    ] = 24.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be removed.")] = False,
    json_: Json = False,
) -> None:
    """Remove what killed runs left behind.

    Temp files, shards that no commit names, unfinished uploads; each with its size. Nothing else is
    touched.
    """
    raise typer.Exit(_job("gc").gc(dataset, older_than_h=older_than, dry_run=dry_run, as_json=json_))


@app.command()
def export(
    dataset: DatasetArgument,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="New folder to write.")],
    format_: Annotated[
        Literal["webdataset", "zarr"],
        typer.Option("--format", help="Tar shards for any loader, or Zarr v3 arrays in chunks over time."),
    ],
    shard_mb: Annotated[
        int, typer.Option(min=1, metavar="MB", help="webdataset: about the size of a shard.")
    ] = 1000,
    json_: Json = False,
) -> None:
    """Write a dataset for other loaders.

    Self-contained samples: latents, prompt embeddings, caption, times and the scaling rule, checked on the
    way. An export that is interrupted leaves no folder of that name.
    """
    raise typer.Exit(_job("export").export(dataset, output, form=format_, shard_mb=shard_mb, as_json=json_))


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

    Run it again to resume from the newest complete checkpoint; also works under torchrun.
    """
    if check and nproc > 1:
        raise ConfigError("--check runs in one process; leave --nproc out")
    if check:
        raise typer.Exit(_job("train").check(config, overrides=set_, stage=stage))
    raise typer.Exit(_job("train").train(config, overrides=set_, nproc=nproc, stage=stage))


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
        code = _job("ray_train").submit_ray(config, overrides=set_, stage=stage, address=ray, workers=workers)
        raise typer.Exit(code)
    job = _job("submit")
    options = job.SlurmOptions(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        cpus_per_task=cpus_per_task,
        time_min=time_min,
        partition=partition,
        account=account,
        sbatch=job.sbatch_options(sbatch),
    )
    raise typer.Exit(job.submit_slurm(config, overrides=set_, stage=stage, options=options))


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
    raise typer.Exit(_job("train").export_model(checkpoint, output, merge=merge))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Output folder of train, finished or not.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Page to write; RUN/report.html by default.")
    ] = None,
    json_: Json = False,
) -> None:
    """Draw a training run as one HTML page.

    Losses, gradient norm, speed, fill, waiting, memory and saves over the steps, sample sheets, settings and
    what happened. The page holds its pictures, so it can be sent as it is.
    """
    raise typer.Exit(_job("report_run").report_run(run, output=output, as_json=json_))


@bench.command("decode")
def bench_decode(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Video files, or folders of them.")],
    num_frames: Annotated[int, typer.Option(min=1, help="Frames taken evenly from each clip.")] = 49,
    height: Annotated[int, typer.Option(min=16, help="Pixels.")] = 480,
    width: Annotated[int, typer.Option(min=16, help="Pixels.")] = 720,
    reps: Annotated[int, typer.Option(min=1, help="Interleaved runs; medians are reported.")] = 5,
    limit_s: Annotated[float, typer.Option(help="Seconds one library may spend on one clip.")] = 60.0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write every number to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a bar chart to this PNG.")] = None,
) -> None:
    """CPU seconds of decoding, beside its peers.

    PyAV, decord, torchcodec and the bare-decode ceiling, on any videos.
    """
    raise typer.Exit(
        _job("bench").decode(
            paths,
            num_frames=num_frames,
            height=height,
            width=width,
            reps=reps,
            limit_s=limit_s,
            json_path=json_path,
            plot_path=plot,
        )
    )


@bench.command("preprocess")
def bench_preprocess(
    config: Config,
    set_: Set = [],  # noqa: B006
    reps: Annotated[int, typer.Option(min=1, help="Interleaved runs; medians are reported.")] = 5,
    json_: Json = False,
) -> None:
    """What the pipeline costs above its work.

    Clips/s of the local and Ray routes beside a plain multiprocessing loop.
    """
    _one_thread_per_process()
    raise typer.Exit(_job("bench").preprocess(config, overrides=set_, reps=reps, as_json=json_))


@bench.command("encode")
def bench_encode(
    config: Config,
    set_: Set = [],  # noqa: B006
    dtypes: Annotated[
        str, typer.Option(help="Types the models run in, such as bfloat16,float32; the config's by default.")
    ] = "",
    random: Annotated[
        str,
        typer.Option(
            metavar="FAMILY",
            help="Encoders of published shapes with random weights in place of the config's: cogvideox, "
            "wan2.1, wan2.2, hunyuanvideo, ltx or mochi. They are saved to a temporary folder first.",
        ),
    ] = "",
    text: Annotated[bool, typer.Option(help="Measure the text encoder too.")] = True,
    tiling: Annotated[bool, typer.Option(help="Measure the video encoder in tiles too.")] = True,
    compile_: Annotated[bool, typer.Option("--compile", help="Measure torch.compile too.")] = False,
    end_to_end: Annotated[
        bool, typer.Option(help="Run preprocess on the config's manifest beside the encoder alone.")
    ] = True,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the manifest in that run.")] = 64,
    batches: Annotated[int, typer.Option(min=1, help="Batches in one timed run.")] = 3,
    reps: Annotated[int, typer.Option(min=1, help="Interleaved runs; medians are reported.")] = 5,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write every number to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a bar chart to this PNG.")] = None,
) -> None:
    """Clips/s, frames/s and memory of the encoders.

    Each bucket and type of a config, fed from memory: the ceiling of preprocessing; and the share of it that
    a real run on the manifest of the config reaches.
    """
    raise typer.Exit(
        _job("bench_encode").encode(
            config,
            overrides=set_,
            dtypes=dtypes,
            random=random,
            text=text,
            tiling=tiling,
            compile=compile_,
            with_run=end_to_end,
            rows=rows,
            batches=batches,
            reps=reps,
            json_path=json_path,
            plot_path=plot,
        )
    )


@bench.command("loader")
def bench_loader(
    dataset: Annotated[
        Path | None,
        typer.Argument(metavar="[DATASET]", help="Latent dataset in bfloat16; without one it is made up."),
    ] = None,
    clips: Annotated[int, typer.Option(min=1, help="Clips of a dataset that is made up.")] = 66,
    workers: Annotated[
        int, typer.Option(min=0, help="Threads of ours, processes of the others, beside 0 of them.")
    ] = 2,
    reps: Annotated[int, typer.Option(min=1, help="Interleaved epochs; medians are reported.")] = 5,
    peers: Annotated[
        bool,
        typer.Option(
            "--peers", help="First install the peers, each into an environment in the user's cache."
        ),
    ] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write every number to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a bar chart to this PNG.")] = None,
) -> None:
    """How fast training data is read, beside its peers.

    A bare read of the same bytes, webdataset, litdata and mosaicml-streaming.
    """
    _one_thread_per_process()
    raise typer.Exit(
        _job("bench_loader").loader(
            dataset,
            clips=clips,
            workers=workers,
            reps=reps,
            peers=peers,
            json_path=json_path,
            plot_path=plot,
        )
    )


@bench.command("packing")
def bench_packing(
    clips: Annotated[int, typer.Option(min=1, help="Clips of each kind of lengths.")] = 20_000,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks that share a step.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the lengths.")] = 0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write every number to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a bar chart to this PNG.")] = None,
) -> None:
    """How full packs are and how busy ranks.

    The trainer's plan beside first-come packs, a sorted epoch, padded batches, batch 1 and buckets; it is
    arithmetic alone.
    """
    raise typer.Exit(
        _job("bench_packing").packing(clips, ranks=ranks, seed=seed, json_path=json_path, plot_path=plot)
    )


@bench.command("train")
def bench_train(
    model: Annotated[
        str, typer.Option(help="tiny, cogvideox-2b, cogvideox-5b or dit, with random weights.")
    ] = "tiny",
    durations: Annotated[
        str, typer.Option(help="Seconds of the clips, in equal shares; at 8 frames/s.")
    ] = "3,9,18,30,63",
    height: Annotated[
        int | None, typer.Option(min=16, help="Pixels; 480 on a GPU and 48 on CPUs if not given.")
    ] = None,
    width: Annotated[int | None, typer.Option(min=16, help="Pixels; 720 and 64.")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Of each clip; 226 and 16.")] = None,
    budget: Annotated[int, typer.Option(min=1, help="Tokens of a pack, in longest clips.")] = 2,
    packs: Annotated[int, typer.Option(min=1, help="Packs per rank and step, about.")] = 4,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16; bfloat16 on a GPU if not given.")
    ] = None,
    attention: Annotated[str, typer.Option(help="As model.attention.")] = "auto",
    recompute: Annotated[str, typer.Option(help="As model.recompute.")] = "none",
    compile_: Annotated[bool, typer.Option("--compile", help="Compile every block.")] = False,
    layers: Annotated[int | None, typer.Option(min=1, help="Blocks, in place of the model's own.")] = None,
    dataset: Annotated[
        str, typer.Option(metavar="DATASET", help="Also measure waiting for the data of this dataset.")
    ] = "",
    reps: Annotated[int, typer.Option(min=1, help="Interleaved runs; medians are reported.")] = 5,
    nproc: Annotated[int, typer.Option(min=1, help="Processes on this machine, one per GPU.")] = 1,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write every number to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a bar chart to this PNG.")] = None,
) -> None:
    """Tokens/s of training steps.

    Packed beside padded to the longest and a clip at a time, deterministic kernels, what saves cost, and with
    --dataset how long steps wait for data. Also works under torchrun.
    """
    job = _job("bench_train")
    settings = job.settings(
        model=model,
        durations=durations,
        height=height,
        width=width,
        prompt_tokens=prompt_tokens,
        budget=budget,
        packs=packs,
        dtype=dtype,
        attention=attention,
        recompute=recompute,
        compile=compile_,
        layers=layers,
        dataset=dataset,
        reps=reps,
    )
    raise typer.Exit(job.train(settings, nproc=nproc, json_path=json_path, plot_path=plot))


def _one_thread_per_process() -> None:
    """Before numpy is imported: workers and decoder children fill the cores, BLAS threads only fight them."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def _job(name: str) -> Any:
    """The module behind a subcommand."""
    return importlib.import_module(f"jobs.{name}")


_TYPER_INTERRUPTED = 130
"""What Typer makes of Ctrl-C, without a word."""


def main() -> None:
    """Entry point: expected errors become one message and their exit code, without a traceback."""
    try:
        app()
    except ModuleNotFoundError as error:  # heavy packages are imported where they are needed
        package = (error.name or "").partition(".")[0]
        if package not in OPTIONAL:
            raise
        training = sys.argv[1] in ("train", "export-model", "report", "submit")
        extra = {"submitit": "slurm", "ray": "pipeline"}.get(package, "train" if training else "pipeline")
        missing = MissingExtraError(package, extra)
        print(f"latentpress: {missing}", file=sys.stderr)
        sys.exit(missing.exit_code)
    except LatentpressError as error:
        print(f"latentpress: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        print(f"latentpress: {error}", file=sys.stderr)
        sys.exit(EXIT_FAILED)
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("aiobotocore", "aiohttp", "botocore"):
            raise
        print(f"latentpress: the object store cannot be read: {error}", file=sys.stderr)
        sys.exit(EXIT_FAILED)
    except SystemExit as stop:
        if stop.code != _TYPER_INTERRUPTED:
            raise
        print(
            "\nlatentpress: interrupted; preprocess, import and train go on where they were when run again",
            file=sys.stderr,
        )
        sys.exit(EXIT_FAILED)


if __name__ == "__main__":
    main()
