"""Module names by PEFT's patterns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

Patterns = str | Sequence[str]


def matching(names: Iterable[str], patterns: Patterns, argument: str) -> set[str]:
    """PEFT's rule: a string is one regular expression matched in full, a list holds name suffixes."""
    names = list(names)
    if isinstance(patterns, str):
        try:
            found = {name for name in names if re.fullmatch(patterns, name)}
        except re.error as error:
            raise ValueError(f"`{argument}` is no valid regular expression: {patterns!r} ({error}).") from None
        if not found:
            raise ValueError(f"`{argument}`={patterns!r} matches no module. {_examples(names)}")
        return found
    if not isinstance(patterns, Sequence) or not all(isinstance(p, str) for p in patterns):
        raise TypeError(f"`{argument}` must be a string or a list of strings, got {patterns!r}.")
    by_pattern = {p: {name for name in names if name == p or name.endswith(f".{p}")} for p in patterns}
    if missing := [p for p, found in by_pattern.items() if not found]:
        raise ValueError(f"`{argument}` names {missing}, which match no module. {_examples(names)}")
    return set().union(*by_pattern.values())


def matches(name: str, pattern: str, argument: str) -> bool:
    """Whether ``pattern`` is a suffix of the module's name, or a regular expression that matches it in full."""
    if not isinstance(pattern, str):
        raise TypeError(f"`{argument}` must have strings as module patterns, got {pattern!r}.")
    if name == pattern or name.endswith(f".{pattern}"):
        return True
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ValueError(f"`{argument}` has no valid regular expression: {pattern!r} ({error}).") from None


def subtrees(names: Iterable[str], roots: set[str]) -> set[str]:
    """``roots`` and all inside them: who excludes a container means its layers."""
    return {name for name in names if any(name == root or name.startswith(f"{root}.") for root in roots)}


def _examples(names: Sequence[str]) -> str:
    leaves = [name for name in names if name]
    return f"Modules are named like {', '.join(map(repr, leaves[-3:]))}." if leaves else "The model has no submodules."
