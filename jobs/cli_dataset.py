"""`latentpress` on videos and datasets: from a first clip to latents that are verified and exported."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from jobs.options import Config, Json, Set, job, one_thread_per_process
from schemas.errors import ConfigError
from schemas.store import location

app = typer.Typer()

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
    manifest = job("demo").make_demo(folder)
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
    raise typer.Exit(job("scan").scan(folder, output=output, as_json=json_))


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
        job("validate").validate(
            manifest, config=config, overrides=set_, output=output, as_json=json_, decode=decode
        )
    )


@app.command()
def plan(config: Config, set_: Set = [], adopt: Adopt = False, json_: Json = False) -> None:  # noqa: B006
    """Say what preprocess would do.

    What changed since the last run and what runs for it, clips per bucket, drops with reasons, tokens, disk,
    time and memory; writes nothing.
    """
    raise typer.Exit(job("plan").plan(config, overrides=set_, adopt=adopt, as_json=json_))


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
    one_thread_per_process()
    raise typer.Exit(job("preprocess").run(config, overrides=set_, adopt=adopt, as_json=json_))


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
    one_thread_per_process()
    module = job("import_")
    raise typer.Exit(
        module.run(
            module.ImportOptions(
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
    raise typer.Exit(job("retry").retry(dataset, reasons=reason, everything=all_, as_json=json_))


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
        job("verify").verify(
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
        raise typer.Exit(job("drift").run(dataset, sample=sample, as_json=json_, config=config, vae=vae))
    raise typer.Exit(
        job("inspect").run(dataset, sample=sample, output=output, as_json=json_, config=config, vae=vae)
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
    raise typer.Exit(job("gc").gc(dataset, older_than_h=older_than, dry_run=dry_run, as_json=json_))


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
    raise typer.Exit(job("export").export(dataset, output, form=format_, shard_mb=shard_mb, as_json=json_))
