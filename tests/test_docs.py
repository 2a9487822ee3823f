"""Every Python block of the documentation runs, every link leads somewhere, and every public name has an entry."""

import importlib
import inspect
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

from bayeformers.likelihoods import registry

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md", *sorted(DOCS.rglob("*.md"))]
OPTIONAL = {"docs/guides/trainers.md": ("datasets", "peft", "trl")}  # what a page's blocks import besides
MAX_WORDS = 1800  # of a page that is not a table of results
BLOCK = re.compile(r"^```(?P<info>[^\n]*)\n(?P<code>.*?)^```", flags=re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:)(?P<target>[^)#\s]+)(#[^)]*)?\)")
# mkdocstrings makes an entry of the docstring of this path
ENTRY = re.compile(r"^::: (?P<path>[\w.]+)$", flags=re.MULTILINE)


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def python_blocks(page: Path) -> list[re.Match[str]]:
    """Those that run; blocks marked `python no-run` need what is the reader's."""
    blocks = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [block for block in blocks if block["info"].strip() == "python"]


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=page_name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One namespace per page, from top to bottom."""
    for library in OPTIONAL.get(page_name(page), ()):
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    for table in ("_BY_NAME", "_BY_FAMILY"):  # a page may register a likelihood of its own
        monkeypatch.setattr(registry, table, dict(getattr(registry, table)))
    text = page.read_text(encoding="utf-8")
    namespace: dict[str, object] = {"__name__": "__docs__"}
    for block in python_blocks(page):
        # blank lines in front give a traceback the page's own line numbers
        lines_before = text.count("\n", 0, block.start("code"))
        exec(compile("\n" * lines_before + block["code"], page_name(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_blocks_say_what_they_are(page: Path) -> None:
    infos = {block["info"].strip() for block in BLOCK.finditer(page.read_text(encoding="utf-8"))}
    assert infos <= {"python", "python no-run", "bash", "text", "json"}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_to_files(page: Path) -> None:
    targets = [link["target"] for link in LINK.finditer(page.read_text(encoding="utf-8"))]
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_one_import_path(page: Path) -> None:
    """Pages import by `from bayeformers import ...`; only those for users of older packages name `compat`."""
    code = "\n".join(block["code"] for block in python_blocks(page))
    others = re.findall(r"^\s*(?:from bayeformers\.\S+|import bayeformers.*)", code, flags=re.MULTILINE)
    assert [line for line in others if "from bayeformers.compat." not in line] == []


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_page_is_short(page: Path) -> None:
    if DOCS / "results" not in page.parents:
        assert len(page.read_text(encoding="utf-8").split()) <= MAX_WORDS


def test_the_site_lists_every_page() -> None:
    settings = yaml.safe_load((ROOT / "scripts" / "mkdocs.yml").read_text(encoding="utf-8"))

    def pages(entry: object) -> list[str]:
        if isinstance(entry, dict):
            return pages(list(entry.values()))
        return [page for part in entry for page in pages(part)] if isinstance(entry, list) else [str(entry)]

    listed = pages(settings["nav"])
    assert sorted(listed) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


def test_the_site_builds_without_a_broken_link(tmp_path: Path) -> None:
    """Strict: an anchor that is not there, a page in no group or an entry of no object fails."""
    command = f"-m mkdocs build --strict --quiet --config-file scripts/mkdocs.yml --site-dir {tmp_path}"
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "index.html").is_file()


ROOMS = (
    "acquisition", "adapters", "cards", "distributions", "experiments", "generation", "guarantees", "heads", "laplace",
    "losses", "metrics", "models", "nn", "pipelines", "posteriors", "quantization", "reports", "tasks", "training",
)  # fmt: skip


def public_names() -> list[tuple[str, str]]:
    """(module, name) of each name that the package and its public folders offer."""
    offered = ["bayeformers", *(f"bayeformers.{room}" for room in ROOMS)]
    return [(module, name) for module in offered for name in importlib.import_module(module).__all__]


def resolved(path: str) -> object:
    """What a dotted path stands for, as the builder reads it: a submodule hides a function of its name."""
    file = ROOT.joinpath(*path.split("."))
    if file.is_dir() or file.with_suffix(".py").exists():
        return importlib.import_module(path)
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@cache
def entries() -> dict[str, object]:
    text = "\n".join(page.read_text(encoding="utf-8") for page in sorted((DOCS / "reference").glob("*.md")))
    return {entry["path"]: resolved(entry["path"]) for entry in ENTRY.finditer(text)}


@pytest.mark.parametrize(("module", "name"), public_names())
def test_public_name_has_an_entry(module: str, name: str) -> None:
    """In the reference: under its own path, under another of the same object, or with its whole module."""
    thing = getattr(importlib.import_module(module), name)
    # equal numbers are one object and say nothing
    known = [] if isinstance(thing, (int, float, tuple)) else [entry for entry in entries().values() if entry is thing]
    listed = entries().get(f"{module}.{name}") is thing or module in entries()
    room = inspect.ismodule(thing) and any(path.startswith(f"{module}.{name}.") for path in entries())
    assert listed or known or room, f"docs/reference has no entry of {module}.{name}"


@pytest.mark.parametrize(("module", "name"), public_names())
def test_public_name_has_a_docstring(module: str, name: str) -> None:
    thing = getattr(importlib.import_module(module), name)
    if not (inspect.isclass(thing) or inspect.isroutine(thing) or inspect.ismodule(thing)):
        return  # a constant or an alias of a type: nowhere to put one
    doc = thing.__doc__ or ""
    # a dataclass without a docstring is given its own signature as one
    assert doc.strip(), f"{module}.{name} has no docstring"
    assert not doc.startswith(f"{name}("), f"{module}.{name} has no docstring"
