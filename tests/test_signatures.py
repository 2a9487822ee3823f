"""Public functions take at most twelve arguments; options of a method are one dataclass."""

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import bayeformers

MOST = 12
AS_TORCH_HAS_THEM = ("MultiheadAttention.__init__", "LSTM.__init__")


def public_functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    """(qualified name, function) of the functions, methods and written constructors that have no leading underscore."""
    for info in pkgutil.walk_packages(bayeformers.__path__, "bayeformers."):
        module = importlib.import_module(info.name)
        for name, thing in vars(module).items():
            if name.startswith("_") or getattr(thing, "__module__", None) != module.__name__:
                continue
            members = dict(vars(thing)) if inspect.isclass(thing) else {"": thing}
            if dataclasses.is_dataclass(thing):
                members.pop("__init__", None)  # made from the fields
            for member, function in members.items():
                function = inspect.unwrap(getattr(function, "__func__", function))
                if inspect.isfunction(function) and (member == "__init__" or not member.startswith("_")):
                    yield f"{module.__name__}.{function.__qualname__}", function


def test_no_function_has_more_than_twelve_parameters() -> None:
    counts = {
        name: len([each for each in inspect.signature(function).parameters if each not in ("self", "cls")])
        for name, function in public_functions()
    }
    assert len(counts) > 500
    many = {name: count for name, count in counts.items() if count > MOST and not name.endswith(AS_TORCH_HAS_THEM)}
    assert not many
