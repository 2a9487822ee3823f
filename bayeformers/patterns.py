"""Module names by PEFT's patterns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

Patterns = str | Sequence[str]


def matching(names: Iterable[str], patterns: Patterns, argument: str) -> set[str]:
    """Return the names that match, by PEFT's rule.

    Args:
        names: of all modules of a model.
        patterns: one regular expression matched in full, or a list of name suffixes.
        argument: the name of the user's argument, for the message.

    Raises:
        TypeError: ``patterns`` is neither a string nor a list of strings.
        ValueError: it is no valid regular expression, or a pattern matches nothing.
    """
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
    """Return whether a pattern is a suffix of a module's name, or a regular expression that matches it in full.

    Args:
        name: of the module in its model.
        pattern: a name suffix, or a regular expression.
        argument: the name of the user's argument, for the message.

    Raises:
        TypeError: ``pattern`` is no string.
        ValueError: it is no suffix, nor a valid regular expression.
    """
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
