"""One small exception tree; each class knows the exit code its command ends with.

    LatentpressError                 exit 1   base: anything a person should read as one sentence
    ├── ConfigError                  exit 2   a config file, an override or a command line is wrong
    │   └── MissingExtraError        exit 2   an optional dependency is not installed
    ├── ManifestError                exit 2   the manifest, or rows of it, cannot be used
    ├── StaleDatasetError            exit 2   the dataset was made with other settings (field by field)
    ├── DatasetError                 exit 1   the dataset on disk is damaged or incomplete
    ├── RunError                     exit 1   the run stopped and says why; running again resumes
    └── ClipError                    -        one clip failed; becomes one quarantine row

A message says what was expected, what was found and what to do.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Sequence

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_GATE = 3
"""Finished, but over the allowed quarantine rate or past a failed gate."""


class LatentpressError(Exception):
    """Base of every error this project raises on purpose."""

    exit_code = EXIT_FAILED

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...], dict[str, object]]:
        # Exception's own way is to call the class with the message, which is not what all of them take.
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class ConfigError(LatentpressError):
    """A config key or value is wrong; the message names its dotted path."""

    exit_code = EXIT_USAGE


class MissingExtraError(ConfigError):
    """An optional dependency is missing; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"this needs the package {package!r}, which is not installed: pip install 'latentpress[{extra}]'"
        )


class ManifestError(LatentpressError):
    """The manifest cannot be used; `problems` lists one line per bad row."""

    exit_code = EXIT_USAGE

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        self.problems = tuple(problems)
        shown = [f"  {line}" for line in self.problems[:20]]
        if len(self.problems) > len(shown):
            shown.append(f"  ... and {len(self.problems) - len(shown)} more")
        super().__init__("\n".join([message, *shown]))


class StaleDatasetError(LatentpressError):
    """A dataset's card differs from what the config asks for; `differences` maps field -> (card, config)."""

    exit_code = EXIT_USAGE

    def __init__(self, message: str, differences: dict[str, tuple[object, object]] | None = None) -> None:
        self.differences = differences or {}
        super().__init__(message)


class DatasetError(LatentpressError):
    """Files of a dataset are missing, torn or contradict each other; names the file and sample."""


class RunError(LatentpressError):
    """A run cannot go on; what is committed stays, and the same command resumes."""


class ClipError(LatentpressError):
    """One clip cannot become a sample: a content failure, recorded as one quarantine row.

    `stage` is where it failed (`decode`, `encode`), `reason` a short stable code, the message a
    sentence for a person, `attempts` how often it was tried.
    """

    def __init__(self, reason: str, message: str, *, stage: str = "decode", attempts: int = 1) -> None:
        self.stage = stage
        self.attempts = attempts
        self.reason = reason
        self.message = message
        super().__init__(message)
