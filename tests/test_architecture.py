"""The architecture as tests: import contracts, what an import may load, what an `__init__` may hold."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("schemas", "pipeline", "trainer", "jobs", "benchmarks")


def modules(*packages: str) -> Iterator[Path]:
    for package in packages:
        yield from sorted((REPOSITORY / package).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def python(code: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_the_map_of_the_trainer_names_every_module_once() -> None:
    text = ast.get_docstring(ast.parse((REPOSITORY / "trainer" / "__init__.py").read_text())) or ""
    rows = [row for row in text.splitlines() if row.startswith("    ")]
    named = [word for row in rows for word in row[16:].split()]
    assert sorted(named) == sorted(path.stem for path in modules("trainer") if path.stem != "__init__")


def test_the_import_contracts_hold() -> None:
    run = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports; raise SystemExit(lint_imports())"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stdout
    assert "3 kept, 0 broken" in run.stdout


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [("schemas", {"torch", "ray", "av", "transformers", "diffusers"}), ("trainer", {"ray", "av"})],
)
def test_importing_a_package_loads_nothing_heavier_than_its_contract(
    package: str, forbidden: set[str]
) -> None:
    names = [module_name(path) for path in modules(package)]
    assert names, f"no modules found in {package}"
    imports = "; ".join(f"import {name}" for name in names)
    loaded = set(python(f"import sys; {imports}; print(*sys.modules)").split())
    assert package in loaded
    assert not loaded & forbidden


@pytest.mark.parametrize("path", list(modules(*PACKAGES)), ids=module_name)
def test_every_module_says_what_it_is(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{path.name} has no module docstring"
    if path.name == "__init__.py":
        assert len(tree.body) == 1, f"{module_name(path)}/__init__.py holds more than its docstring"


def test_ray_stays_in_two_modules_of_the_pipeline_and_one_of_the_jobs() -> None:
    users = [
        module_name(path)
        for path in modules(*PACKAGES)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Import) and any(name.name.split(".")[0] == "ray" for name in node.names))
        or (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ray")
    ]
    parts = sorted(name.partition(".")[0] for name in set(users))
    assert parts == ["jobs", "pipeline", "pipeline"], f"ray is imported by {sorted(set(users))}"
