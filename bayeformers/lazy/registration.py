"""The package's image classifiers enter transformers' Auto classes as soon as these are loaded, and not before.

Importing the package promises that `AutoConfig` and `AutoModelForImageClassification` know them; to load transformers'
models for that would be most of the import's time.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["register_models"]

_LIBRARY, _AUTO = "transformers.", "transformers.models.auto.configuration_auto"


class _AfterLoading(MetaPathFinder):
    """Finds transformers' modules as Python does; registers the models when the Auto classes and these are loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(_LIBRARY):
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((found for found in others if found is not None), None)
        if spec is not None and spec.loader is not None and hasattr(spec.loader, "exec_module"):
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                self.register_if_ready(fullname)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec

    def register_if_ready(self, loaded: str | None = None) -> None:
        """Register, unless a module of transformers but the one just ``loaded`` is half loaded: that one comes here."""
        if self not in sys.meta_path or _AUTO not in sys.modules:
            return
        names = [name for name in list(sys.modules) if name.startswith(_LIBRARY) and name != loaded]
        specs = (getattr(sys.modules.get(name), "__spec__", None) for name in names)
        if not any(getattr(spec, "_initializing", False) for spec in specs):
            sys.meta_path.remove(self)
            importlib.import_module("bayeformers.models")


def register_models() -> None:
    """Register the package's models with the Auto classes: now if these are loaded, else when they are."""
    if not any(isinstance(finder, _AfterLoading) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterLoading())
    for finder in [finder for finder in sys.meta_path if isinstance(finder, _AfterLoading)]:
        finder.register_if_ready()
