"""Tests of compatibility names: each place of use warns anew in every test, and warnings are no errors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bayeformers.compat import deprecation


@pytest.fixture(autouse=True)
def _forget_warned_places() -> Iterator[None]:
    before = set(deprecation._warned)
    deprecation._warned.clear()
    yield
    deprecation._warned.clear()
    deprecation._warned.update(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/compat" in item.path.as_posix():
            item.add_marker(pytest.mark.filterwarnings("ignore::DeprecationWarning"))
