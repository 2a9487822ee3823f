"""Import paths of the layout before the rooms."""

import importlib
import subprocess
import sys

import pytest

import bayeformers
from bayeformers.moved import FUNCTIONS, MOVED


def test_an_old_module_does_not_hide_a_function_of_its_name() -> None:
    for old in FUNCTIONS:
        room, _, name = f"bayeformers.{old}".rpartition(".")
        function = getattr(importlib.import_module(room), name)
        with pytest.warns(DeprecationWarning, match=f"has moved: import from `bayeformers.{MOVED[old]}`"):
            assert getattr(importlib.import_module(f"bayeformers.{old}"), name) is function
        assert callable(getattr(importlib.import_module(room), name))


def test_every_function_with_an_old_module_of_its_name_is_known() -> None:
    rooms = {
        old: importlib.import_module(f"bayeformers.{old}".rpartition(".")[0]) for old in MOVED if old.count(".") < 2
    }
    names = {old for old, room in rooms.items() if callable(vars(room).get(old.rpartition(".")[2]))}
    assert names == set(FUNCTIONS)


@pytest.mark.parametrize("old", sorted(set(MOVED) - set(FUNCTIONS)))
def test_an_old_path_gives_the_new_modules_names_and_a_warning(old: str) -> None:
    sys.modules.pop(f"bayeformers.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"has moved: import from `bayeformers.{MOVED[old]}`"):
        module = importlib.import_module(f"bayeformers.{old}")
    assert module is importlib.import_module(f"bayeformers.{MOVED[old]}")


def test_an_old_module_is_an_attribute_too() -> None:
    """In a process that has not imported it."""
    code = "import bayeformers; print(bayeformers.calibration.calibrate_delta is bayeformers.calibrate_delta)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "True", done.stderr
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        bayeformers.nothing  # noqa: B018
