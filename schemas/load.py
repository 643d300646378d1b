"""TOML file plus `--set a.b=c` overrides -> a checked config, its resolved TOML and its digest.

Overrides are the only other source of values: no environment variables, no second file.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from schemas.config import PreprocessConfig
from schemas.errors import ConfigError
from schemas.train_config import TrainConfig

Config = TypeVar("Config", bound=pydantic.BaseModel)

_COMMANDS: dict[str, type[pydantic.BaseModel]] = {"preprocess": PreprocessConfig, "train": TrainConfig}
"""Whose config it is."""
_CLOSE = 0.7
"""How alike a key is to the one that was meant, 0..1; less, and it is another word."""


def load_config(path: str | Path, model: type[Config], *, overrides: Sequence[str] = ()) -> Config:
    """Read `path`, apply `overrides` (each `dotted.key=value`) and check against `model`.

    Raises ConfigError naming the file and the dotted key, with what was expected and found.
    """
    path = Path(path)
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    for override in overrides:
        _apply(tree, override)
    return check_config(tree, model, where=str(path))


def check_config(tree: dict[str, Any], model: type[Config], *, where: str) -> Config:
    """Check a plain tree against `model`; ConfigError lists every bad key at once."""
    try:
        return model.model_validate(_floats(tree, model))
    except pydantic.ValidationError as error:
        problems = error.errors()
        told = _other_command(problems, model) or _describe(problems, model)
        raise ConfigError(f"{where}: {told}") from None


def resolved_toml(config: pydantic.BaseModel) -> str:
    """The whole config, defaults included, as TOML that `load_config` reads back unchanged."""
    import tomli_w  # only writers of runs need it: reading a dataset takes numpy, pyarrow and pydantic

    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def config_digest(config: pydantic.BaseModel) -> str:
    """sha256 hex of the resolved config in canonical JSON."""
    return digest_of(config.model_dump(mode="json"))


def digest_of(value: Any) -> str:
    """sha256 hex of any JSON value, independent of key order and spacing."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def sealed_json(value: dict[str, Any]) -> bytes:
    """`value` as JSON with a `digest` of itself, so that a reader knows every later change."""
    return json.dumps({**value, "digest": digest_of(value)}, sort_keys=True, indent=1).encode() + b"\n"


def open_sealed_json(data: bytes) -> dict[str, Any]:
    """The value of `sealed_json`; ValueError where it is not JSON or does not match its digest."""
    value = json.loads(data)
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {type(value).__name__}")
    said = value.pop("digest", None)
    found = digest_of(value)
    if found != said:
        raise ValueError(f"its content hashes to {found[:12]}, it says {str(said)[:12]}")
    return value


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set {override!r}: expected key=value with a dotted key, such as units.rows=8")
    node: Any = tree
    for depth, part in enumerate(parts[:-1]):
        node = _descend(node, part, parts[:depth], override)
    value = _value(text)
    last = parts[-1]
    if isinstance(node, list):
        node[_position(node, last, parts[:-1], override)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigError(f"--set {override!r}: {'.'.join(parts[:-1])} is a plain value, it has no keys")


def _descend(node: Any, part: str, parents: Sequence[str], override: str) -> Any:
    if isinstance(node, list):
        return node[_position(node, part, parents, override)]
    if isinstance(node, dict):
        return node.setdefault(part, {})
    raise ConfigError(f"--set {override!r}: {'.'.join(parents)} is a plain value, it has no keys")


def _position(items: list[Any], part: str, parents: Sequence[str], override: str) -> int:
    where = ".".join(parents)
    if not part.isdecimal():
        raise ConfigError(f"--set {override!r}: {where} is a list; name an item by position, {where}.0")
    if int(part) >= len(items):
        raise ConfigError(
            f"--set {override!r}: {where} has no item {part}, counted from 0; add items in the file"
        )
    return int(part)


def _value(text: str) -> Any:
    """A TOML value where the text is one, else the text itself: paths need no quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _floats(value: Any, annotation: Any) -> Any:
    """Whole numbers where a float is meant: `max_s = 3` reads as 3.0 although the models are strict."""
    if isinstance(value, dict):
        fields = _fields(annotation)
        return {k: _floats(v, fields[k].annotation) if k in fields else v for k, v in value.items()}
    if isinstance(value, list):
        item = next(iter(typing.get_args(annotation)), None)
        return [_floats(v, item) for v in value]
    if type(value) is int and _mentions_float(annotation):
        return float(value)
    return value


def _fields(annotation: Any) -> dict[str, pydantic.fields.FieldInfo]:
    """Of a model, also of one that may be left out."""
    for part in typing.get_args(annotation) if _is_union(annotation) else (annotation,):
        if isinstance(part, type) and issubclass(part, pydantic.BaseModel):
            return part.model_fields
    return {}


def _mentions_float(annotation: Any) -> bool:
    if annotation is float:
        return True
    if typing.get_origin(annotation) is typing.Annotated or _is_union(annotation):
        return any(_mentions_float(part) for part in typing.get_args(annotation))
    return False


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _other_command(problems: Sequence[Any], model: type[pydantic.BaseModel]) -> str | None:
    """What to say of a config that lacks what `model` needs and has keys of another command's instead."""
    top = [problem for problem in problems if len(problem["loc"]) == 1]
    lacks = [problem["loc"][0] for problem in top if problem["type"] == "missing"]
    unknown = [problem["loc"][0] for problem in top if problem["type"] == "extra_forbidden"]
    own = next((command for command, each in _COMMANDS.items() if each is model), None)
    for command, other in _COMMANDS.items():
        theirs = [key for key in unknown if key in other.model_fields]
        if own and lacks and len(theirs) > 1:
            return (
                f"expected a config of `latentpress {own}`, with {', '.join(lacks)}; found one of "
                f"`latentpress {command}`, with {', '.join(theirs)}"
            )
    return None


def _describe(problems: Sequence[Any], model: type[pydantic.BaseModel]) -> str:
    """Every problem, and once for each section what keys it has."""
    lines: list[str] = []
    known_keys: dict[tuple[str, ...], str] = {}
    for problem in problems:
        key, parents = ".".join(map(str, problem["loc"])), problem["loc"][:-1]
        if problem["type"] == "extra_forbidden":
            known = _known_keys(model, parents)
            close = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=_CLOSE)
            lines.append(f"unknown key {key!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
            if not close:
                known_keys.setdefault(
                    tuple(known), f"of {'.'.join(map(str, parents))}" if parents else "here"
                )
        elif problem["type"] == "missing":
            lines.append(f"{key} is missing; set it in the file or with --set {key}=...")
        elif not _is_echo(problem, problems):
            lines.append(_refused(key, problem))
    lines += [f"known keys {where}: {', '.join(known)}" for known, where in known_keys.items()]
    return "; ".join(lines)


def _is_echo(problem: Any, problems: Sequence[Any]) -> bool:
    """Whether a list seems too short only since an item of it was refused, which is told on its own."""
    depth = len(problem["loc"])
    inside = [each for each in problems if len(each["loc"]) > depth and each["loc"][:depth] == problem["loc"]]
    return problem["type"] == "too_short" and bool(inside)


def _refused(key: str, problem: Any) -> str:
    """What is wrong with the value of a key; whole sections are not shown, they would bury it."""
    value = problem["input"]
    is_section = isinstance(value, dict)
    if is_section or (isinstance(value, list) and any(isinstance(item, dict) for item in value)):
        shown = f"{key}: " if key else ""
    else:
        shown = f"{key} = {value!r}: "
    if problem["type"] == "literal_error":
        return f"{shown}this version takes {problem['ctx']['expected']}"
    message = problem["msg"].removeprefix("Value error, ")
    found = ", found a section" if is_section and problem["type"] != "value_error" else ""
    return f"{shown}{message[:1].lower()}{message[1:]}{found}"


def _known_keys(model: type[pydantic.BaseModel], loc: Sequence[str | int]) -> list[str]:
    annotation: Any = model
    for part in loc:
        if isinstance(part, int):
            annotation = next(iter(typing.get_args(annotation)), None)
        else:
            annotation = _fields(annotation)[part].annotation
    return list(_fields(annotation))
