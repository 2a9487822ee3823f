"""One `DeprecationWarning` per place of use, whatever the warning filters are."""

from __future__ import annotations

import sys
import warnings

_warned: set[tuple[str, str, int]] = set()
_HERE = __name__.rpartition(".")[0]


def deprecated(old: str, new: str) -> None:
    """Warn that ``old`` is written ``new`` now, once per line of the caller's code.

    A training loop calls the same line thousands of times; Python's own filters repeat the warning under "always".

    Args:
        old: the name as the older package had it.
        new: what to write instead.

    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     for _ in range(3):
    ...         deprecated("old_package.f", "`bayeformers.f(model)`")
    >>> [str(warning.message) for warning in caught]
    ['`old_package.f` is a compatibility name; write `bayeformers.f(model)`.']
    """
    name, path, line = _place_of_use()
    if (old, path, line) in _warned:
        return
    _warned.add((old, path, line))
    message = f"`{old}` is a compatibility name; write {new}."
    warnings.warn_explicit(message, DeprecationWarning, path, line, module=name)


def _place_of_use() -> tuple[str, str, int]:
    """Module, file and line of the innermost frame outside the compatibility packages."""
    frame = sys._getframe(1)
    while frame.f_back is not None and f"{frame.f_globals.get('__name__')}.".startswith(f"{_HERE}."):
        frame = frame.f_back
    return str(frame.f_globals.get("__name__")), frame.f_code.co_filename, frame.f_lineno
