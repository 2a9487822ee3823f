"""Import paths of the layout before the rooms."""

import importlib
import subprocess
import sys

import pytest

import bayeformers
from bayeformers.moved import MOVED


@pytest.mark.parametrize("old", sorted(MOVED))
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
