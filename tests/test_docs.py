"""Every Python block of the documentation runs, and every link leads somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
BLOCK = re.compile(r"^```(?P<info>[^\n]*)\n(?P<code>.*?)^```", flags=re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:)(?P<target>[^)#\s]+)(#[^)]*)?\)")


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One namespace per page, from top to bottom; blocks marked `python no-run` need what is the reader's."""
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    namespace: dict[str, object] = {"__name__": "__docs__"}
    for block in BLOCK.finditer(text):
        if block["info"].strip() != "python":
            continue
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


def test_index_lists_every_page() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    listed = {link["target"] for link in LINK.finditer(index)}
    assert listed >= {page.name for page in (ROOT / "docs").glob("*.md") if page.name != "index.md"}
