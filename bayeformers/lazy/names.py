"""Module attributes that are imported when first asked for (PEP 562)."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["names_on_demand"]


def names_on_demand(
    package: str, homes: Mapping[str, Sequence[str]], other: Callable[[str], Any]
) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a package: its public names, then its modules, then what ``other`` knows.

    Args:
        package: its name.
        homes: module within the package -> the names that the package has of it; a module itself is no entry.
        other: asked for any other name; AttributeError if it knows none.
    """
    home = {name: module for module, names in homes.items() for name in names}

    def find(name: str) -> Any:
        if name in home:
            value = getattr(importlib.import_module(f"{package}.{home[name]}"), name)
            setattr(sys.modules[package], name, value)  # the next look-up does not come here
            return value
        try:
            return other(name)
        except AttributeError:
            if name.startswith("_") or importlib.util.find_spec(f"{package}.{name}") is None:
                raise
        return importlib.import_module(f"{package}.{name}")

    return find
