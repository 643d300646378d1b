"""`latentpress bench`: what is measured, one function per benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.record import RESULTS
from jobs.options import Config, Json, Set, job, one_thread_per_process

app = typer.Typer(no_args_is_help=True, help="Measure speed beside ceiling and peers.")

Record = Annotated[
    bool,
    typer.Option(
        help="In a repository, add the numbers to benchmarks/results; without where only trying it out."
    ),
]


@app.command("decode")
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
        job("bench").decode(
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


@app.command("preprocess")
def bench_preprocess(
    config: Config,
    set_: Set = [],  # noqa: B006
    reps: Annotated[int, typer.Option(min=1, help="Interleaved runs; medians are reported.")] = 5,
    json_: Json = False,
) -> None:
    """What the pipeline costs above its work.

    Clips/s of the local and Ray routes beside a plain multiprocessing loop.
    """
    one_thread_per_process()
    raise typer.Exit(job("bench").preprocess(config, overrides=set_, reps=reps, as_json=json_))


@app.command("encode")
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
        job("bench_encode").encode(
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


@app.command("loader")
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
    record: Record = True,
) -> None:
    """How fast training data is read, beside its peers.

    A bare read of the same bytes, webdataset, litdata and mosaicml-streaming.
    """
    one_thread_per_process()
    raise typer.Exit(
        job("bench_loader").loader(
            dataset,
            clips=clips,
            workers=workers,
            reps=reps,
            peers=peers,
            json_path=json_path,
            plot_path=plot,
            results=RESULTS if record else None,
        )
    )


@app.command("packing")
def bench_packing(
    clips: Annotated[int, typer.Option(help="Clips of each kind of lengths; 512 a rank at least.")] = 20_000,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks that share a step.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the lengths.")] = 0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write every number to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a bar chart to this PNG.")] = None,
    record: Record = True,
) -> None:
    """How full packs are and how busy ranks.

    The trainer's plan beside first-come packs, a sorted epoch, padded batches, batch 1 and buckets; it is
    arithmetic alone.
    """
    raise typer.Exit(
        job("bench_packing").packing(
            clips,
            ranks=ranks,
            seed=seed,
            json_path=json_path,
            plot_path=plot,
            results=RESULTS if record else None,
        )
    )


@app.command("train")
def bench_train(
    model: Annotated[
        str, typer.Option(help="tiny, cogvideox-2b, cogvideox-5b or dit, with random weights.")
    ] = "tiny",
    durations: Annotated[
        str | None,
        typer.Option(
            help="Seconds of the clips, in equal shares; at 8 frames/s; 3 on a GPU and 3,9,18,30,63 on CPUs "
            "if not given."
        ),
    ] = None,
    height: Annotated[
        int | None, typer.Option(min=16, help="Pixels; 480 on a GPU and 48 on CPUs if not given.")
    ] = None,
    width: Annotated[int | None, typer.Option(min=16, help="Pixels; 720 and 64.")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Of each clip; 226 and 16.")] = None,
    budget: Annotated[int, typer.Option(min=1, help="Tokens of a pack, in longest clips.")] = 2,
    packs: Annotated[
        int | None, typer.Option(min=1, help="Packs per rank and step, about; 2 on a GPU, 4 on CPUs.")
    ] = None,
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
    reps: Annotated[
        int | None,
        typer.Option(min=1, help="Interleaved runs; medians are reported; 3 on a GPU, 5 on CPUs."),
    ] = None,
    nproc: Annotated[int, typer.Option(min=1, help="Processes on this machine, one per GPU.")] = 1,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write every number to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a bar chart to this PNG.")] = None,
    record: Record = True,
) -> None:
    """Tokens/s of training steps.

    Packed beside padded to the longest and a clip at a time, deterministic kernels, what saves cost, and with
    --dataset how long steps wait for data. Also works under torchrun.
    """
    module = job("bench_train")
    settings = module.settings(
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
    results = RESULTS if record else None
    raise typer.Exit(
        module.train(settings, nproc=nproc, json_path=json_path, plot_path=plot, results=results)
    )
