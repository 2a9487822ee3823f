"""The house: what each module may import, and what importing the package needs."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import bayeformers

PACKAGE = Path(bayeformers.__file__).parent

EVERYTHING_ABOVE = ("*",)
# numbers and choices, what a forward takes, PEFT's patterns, files of tensors, a launch's processes, old import paths
# and tensors that they hold in parts
FOUNDATION = ("checks", "forward", "patterns", "storage", "processes", "moved")

# room -> the rooms that it may import from, besides itself and the foundation. A room is a folder or a file of the
# package's root; a row names only rooms of earlier rows, so imports run one way.
ROOMS: dict[str, tuple[str, ...]] = {
    "processes": (),
    "lazy": (),
    "distributions": (),
    "metrics": (),
    "sampling": (),
    "optim": ("sampling",),
    "nn": ("distributions", "sampling"),
    "sharding": ("nn", "distributions"),  # FSDP2 keeps the scales of layers: conversion adds them, training moves them
    "conversion": ("nn", "distributions", "sampling", "sharding"),
    "likelihoods": (),
    "losses": ("likelihoods", "metrics"),
    "predictive": ("likelihoods", "metrics"),
    "linearized": ("likelihoods", "predictive", "sampling"),
    "posteriors": ("linearized", "likelihoods", "metrics", "predictive", "sampling"),
    "posteriors.variational": ("posteriors", "nn", "sampling"),
    "guarantees": ("posteriors", "predictive", "likelihoods", "metrics"),
    "generation": ("posteriors", "posteriors.variational", "sampling"),
    "laplace": ("posteriors", "linearized", "likelihoods", "sampling"),
    "ood": ("posteriors", "laplace", "likelihoods", "predictive", "metrics"),
    "heads": ("laplace", "posteriors", "linearized", "likelihoods", "predictive", "sampling", "nn"),
    "checkpoint": ("conversion", "sharding", "nn", "heads", "laplace", "posteriors", "guarantees"),
    "delta": ("conversion", "distributions", "likelihoods", "linearized", "nn", "posteriors", "predictive", "sampling"),
    "adapters": (
        "delta",
        "laplace",
        "posteriors",
        "conversion",
        "distributions",
        "linearized",
        "likelihoods",
        "nn",
        "predictive",
        "sampling",
    ),
    "acquisition": ("laplace", "posteriors", "likelihoods", "predictive", "metrics"),
    "models": (),
    "tasks": ("metrics", "predictive"),
    "pipelines": (
        "checkpoint",
        "posteriors",
        "linearized",
        "likelihoods",
        "predictive",
        "generation",
        "guarantees",
        "conversion",
        "nn",
        "sampling",
        "tasks",
    ),
    "reports": ("metrics", "predictive", "tasks"),
    "cards": (
        "conversion",
        "guarantees",
        "heads",
        "laplace",
        "likelihoods",
        "linearized",
        "metrics",
        "nn",
        "posteriors",
    ),
    "training": EVERYTHING_ABOVE,
    "experiments": EVERYTHING_ABOVE,
    "quantization": EVERYTHING_ABOVE,
    "compat": EVERYTHING_ABOVE,
}

OPTIONAL = ("datasets", "evaluate", "matplotlib", "peft")


def modules() -> dict[str, Path]:
    """Dotted name within the package -> file; a folder's `__init__.py` carries the folder's name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


def room_of(name: str) -> str | None:
    return max((room for room in ROOMS if within(name, room)), key=len, default=None)


def imported(name: str, path: Path) -> Iterator[str]:
    """The package's modules that a file imports anywhere in it, as dotted names within the package ("": its root)."""
    package = ["bayeformers", *name.split(".")] if name else ["bayeformers"]
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # `from bayeformers.nn import draws` may import a module as well as a name
            targets = [
                f"{base}.{alias.name}" if f"{base}.{alias.name}".partition(".")[2] in MODULES else base
                for alias in node.names
            ]
        else:
            continue
        for target in targets:
            if within(target, "bayeformers"):
                yield target.partition(".")[2]


def allowed_rooms(room: str) -> tuple[str, ...]:
    if ROOMS[room] == EVERYTHING_ABOVE:
        rows = list(ROOMS)
        return tuple(rows[: rows.index(room)])
    return ROOMS[room]


def test_rooms_name_only_earlier_rooms() -> None:
    seen: set[str] = set()
    for room, others in ROOMS.items():
        later = {other for other in others if other != "*" and not any(within(other, known) for known in seen)}
        assert not later, f"{room} <- {later}: imports run one way"
        seen.add(room)


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_module_imports_only_what_its_room_allows(name: str) -> None:
    room = room_of(name)
    if room is None:
        assert name in FOUNDATION, f"{name}.py lies in no room of the table"
        outside = [target for target in imported(name, MODULES[name]) if target not in FOUNDATION]
        assert not outside, f"{name} imports {outside}; the foundation imports nothing of the package"
        return
    allowed = (room, *FOUNDATION, *allowed_rooms(room))
    # a folder's `__init__.py` collects the folder's names, those of its inner rooms included
    if MODULES[name].name == "__init__.py":
        allowed = (*allowed, name)
    wrong = [target for target in imported(name, MODULES[name]) if not any(within(target, other) for other in allowed)]
    assert not wrong, f"{name} imports {wrong}; it may import {allowed}"


def test_no_circles_of_imports() -> None:
    """Those inside a room and those within functions count too."""
    later = {name: set(imported(name, path)) - {name} for name, path in MODULES.items()}
    while free := [name for name, others in later.items() if not others & later.keys()]:
        for name in free:
            del later[name]
    on_a_path = {name: sorted(others & later.keys()) for name, others in later.items()}
    circles = {name: others for name, others in on_a_path.items() if any(name in _reached(later, o) for o in others)}
    assert not circles, f"these import each other: {circles}"


def _reached(later: dict[str, set[str]], start: str) -> set[str]:
    seen, ahead = set(), [start]
    while ahead:
        name = ahead.pop()
        if name not in seen:
            seen.add(name)
            ahead += later.get(name, ())
    return seen


def test_few_files_beside_the_rooms() -> None:
    assert len([name for name in MODULES if name and "." not in name and MODULES[name].name != "__init__.py"]) <= 7


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=PACKAGE.parent)


def test_importing_the_package_leaves_matplotlib_and_evaluate_alone() -> None:
    done = run_python("import sys, bayeformers; print({'matplotlib', 'evaluate'} & set(sys.modules))")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "set()"


def test_importing_the_package_needs_no_optional_library() -> None:
    """As on a machine without them: the import system finds nothing under their names."""
    done = run_python(
        f"""
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def find_all_but(name, *rest):
    return None if name.partition(".")[0] in {OPTIONAL} else find(name, *rest)
PathFinder.find_spec = staticmethod(find_all_but)
import bayeformers
for name in bayeformers.__all__:
    getattr(bayeformers, name)
"""
    )
    assert done.returncode == 0, done.stderr
