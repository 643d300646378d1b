"""The `latentpress` command: what its subcommands are, in the order of help, and how it ends.

Each is one function in `jobs.cli_dataset`, `cli_train` or `cli_bench`, a thin door to a module of its own.
Exit codes: 0 done, 1 unfinished or failed, 2 usage or config error, 3 finished but over the allowed
quarantine rate or past a failed gate. Heavy packages are imported by the subcommand that needs them.
"""

from __future__ import annotations

import sys

import typer

from jobs import cli_bench, cli_dataset, cli_train
from schemas.errors import EXIT_FAILED, LatentpressError, MissingExtraError

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
    "A first walk: demo, validate, plan, preprocess, verify, inspect, report, train.",
)
app.add_typer(cli_dataset.app)
app.add_typer(cli_train.app)
app.add_typer(cli_bench.app, name="bench")


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
        of_one = {"submitit": "slurm", "av": "pipeline", "PIL": "pipeline", "ray": "pipeline"}
        extra = of_one.get(package, "train" if training else "pipeline")
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
            "\nlatentpress: interrupted; preprocess and import go on where they were when run again, "
            "train after its newest checkpoint",
            file=sys.stderr,
        )
        sys.exit(EXIT_FAILED)


if __name__ == "__main__":
    main()
