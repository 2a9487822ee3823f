"""The house: what each module may import, what importing the package needs, and that public names are documented."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import bayeformers

PACKAGE = Path(bayeformers.__file__).parent
DOCS = PACKAGE.parent / "docs"

EVERYTHING_ABOVE = ("*",)
EVERYWHERE = ("scalars", "forward")  # what a number is, and what a forward takes: every room may ask

# room -> the rooms that it may import from, besides itself. A module belongs to its most specific room;
# a row names only rooms of earlier rows, so imports run one way.
ROOMS: dict[str, tuple[str, ...]] = {
    "scalars": (),
    "forward": (),
    "distributions": (),
    "digests": (),
    "patterns": (),
    "generators": (),
    "snapshot": (),
    "random_state": ("snapshot",),
    "nn": ("distributions", "generators", "random_state"),
    "config": ("distributions", "generators"),
    "registry": ("nn",),
    "ties": (),
    "selection": ("nn", "config", "registry", "patterns", "ties"),
    "dropout": (),
    "rollback": (),
    "continual": ("nn", "distributions"),
    "surgery": ("nn", "ties"),
    "plain_weights": (),
    "wrappers": ("nn",),
    "renaming": ("nn",),
    "conversion": (
        "nn",
        "distributions",
        "config",
        "continual",
        "selection",
        "surgery",
        "ties",
        "dropout",
        "patterns",
        "plain_weights",
        "renaming",
        "rollback",
        "wrappers",
    ),  # fmt: skip
    "objective": ("nn", "distributions"),
    "summary": ("nn", "conversion", "objective"),
    "pruning": ("nn", "distributions", "rollback"),
    "metrics": (),
    "losses": ("metrics",),
    "predictive": ("metrics", "losses.gaussian"),
    "views": (),
    "shared_prefix": ("snapshot",),
    "monte_carlo": ("predictive", "shared_prefix", "snapshot", "random_state"),
    "jacobians": ("views",),
    "posteriors.covariance": (),
    "posteriors.blocks": ("generators", "jacobians", "posteriors.covariance"),
    "posteriors.linearized": ("jacobians", "posteriors.blocks", "posteriors.covariance", "predictive", "views"),
    "posteriors.logits": ("predictive", "losses.gaussian"),
    "posteriors.methods": ("posteriors.blocks", "posteriors.linearized"),
    "posteriors.base": (
        "jacobians",
        "monte_carlo",
        "predictive",
        "snapshot",
        "posteriors.blocks",
        "posteriors.linearized",
        "posteriors.logits",
        "posteriors.methods",
        "random_state",
        "views",
    ),  # fmt: skip
    "posteriors": ("predictive", "views"),
    "posteriors.variational": ("posteriors.base", "nn", "views"),
    "laplace": (
        "digests",
        "generators",
        "jacobians",
        "patterns",
        "predictive",
        "posteriors.base",
        "posteriors.blocks",
        "posteriors.covariance",
        "posteriors.linearized",
        "posteriors.logits",
        "posteriors.methods",
        "random_state",
        "views",
    ),  # fmt: skip
    "saving": ("conversion", "digests", "laplace", "nn", "wrappers"),
    "architectures": (),
    "accounting": ("digests", "nn", "plain_weights", "saving"),
    "fresh": ("conversion", "nn", "surgery"),
    "checkpoint": ("accounting", "architectures", "conversion", "config", "fresh", "laplace", "nn", "saving"),
    "calibration": ("posteriors", "predictive", "views", "conversion", "nn", "distributions"),
    "tasks": ("metrics",),
    "models": (),
    "training": EVERYTHING_ABOVE,
    "reports": ("metrics",),
    "experiments": EVERYTHING_ABOVE,
    "compat": EVERYTHING_ABOVE,
    "quantization": EVERYTHING_ABOVE,
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
    assert room is not None, f"{name}.py lies in no room of the table"
    allowed = (room, *EVERYWHERE, *allowed_rooms(room))
    # a folder's `__init__.py` collects the folder's names, those of its inner rooms included
    if MODULES[name].name == "__init__.py":
        allowed = (*allowed, name)
    wrong = [target for target in imported(name, MODULES[name]) if not any(within(target, other) for other in allowed)]
    assert not wrong, f"{name} imports {wrong}; it may import {allowed}"


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


def public_names() -> list[tuple[str, str]]:
    """(module, name) of each name that the package and its public folders offer."""
    offered = [
        "bayeformers", "bayeformers.distributions", "bayeformers.nn", "bayeformers.metrics", "bayeformers.laplace",
        "bayeformers.losses", "bayeformers.models", "bayeformers.quantization",
    ]  # fmt: skip
    return [(module, name) for module in offered for name in importlib.import_module(module).__all__]


def documented_words() -> set[str]:
    """All identifiers that stand in code, fenced or inline, on a page of docs/."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in sorted(DOCS.glob("*.md")))
    code = re.findall(r"^```.*?^```", text, flags=re.DOTALL | re.MULTILINE) + re.findall(r"`[^`\n]+`", text)
    return set(re.findall(r"\w+", "\n".join(code)))


@pytest.mark.parametrize(("module", "name"), public_names())
def test_public_name_is_documented(module: str, name: str) -> None:
    assert name in documented_words(), f"{module}.{name} stands on no page of docs/"


@pytest.mark.parametrize(("module", "name"), public_names())
def test_public_name_has_a_docstring(module: str, name: str) -> None:
    thing = getattr(importlib.import_module(module), name)
    if not (inspect.isclass(thing) or inspect.isroutine(thing) or inspect.ismodule(thing)):
        return  # a constant or an alias of a type: nowhere to put one
    doc = thing.__doc__ or ""
    # a dataclass without a docstring is given its own signature as one
    assert doc.strip(), f"{module}.{name} has no docstring"
    assert not doc.startswith(f"{name}("), f"{module}.{name} has no docstring"
