"""Import paths of the layout before 0.2."""

import importlib
import sys

import pytest

from bayeformers.moved import MOVED


@pytest.mark.parametrize("old", sorted(MOVED))
def test_an_old_path_gives_the_new_modules_names_and_a_warning(old: str) -> None:
    sys.modules.pop(f"bayeformers.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"has moved: import from `bayeformers.{MOVED[old]}`"):
        module = importlib.import_module(f"bayeformers.{old}")
    assert module is importlib.import_module(f"bayeformers.{MOVED[old]}")
