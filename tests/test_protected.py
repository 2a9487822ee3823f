"""Every property that an older package got wrong is protected, by a test that shows the wrong formula fail."""

import ast
from pathlib import Path

import pytest

from tests.protected import PROPERTIES, TESTS, index

INDEX = index()


@pytest.mark.parametrize("name", PROPERTIES)
def test_a_property_has_its_tests(name: str) -> None:
    assert INDEX.get(name), f"no test has @pytest.mark.protects({name!r})"


def test_every_mark_names_a_property() -> None:
    assert not INDEX.keys() - set(PROPERTIES)


def test_every_test_of_a_defect_is_marked() -> None:
    marked = {test for tests in INDEX.values() for test in tests}
    files = sorted(TESTS.rglob("test_defects*.py"))
    tests = {f"{file.relative_to(TESTS)}::{name}" for file in files for name in functions_in(file)}
    assert tests and tests <= marked, tests - marked


def functions_in(file: Path) -> list[str]:
    body = ast.parse(file.read_text("utf-8")).body
    return [node.name for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
