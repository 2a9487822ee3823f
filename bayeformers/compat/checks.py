"""Checks of values that the older packages took as they were."""

from __future__ import annotations

import math


def check_number(name: str, value: object) -> float:
    """Return a finite number.

    Raises:
        TypeError: an argument is of a wrong kind.
        ValueError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a number, got {value!r}.")
    if not math.isfinite(value):
        raise ValueError(f"`{name}` must be finite, got {value!r}.")
    return float(value)


def check_positive(name: str, value: object) -> float:
    """Return a finite number > 0.

    Raises:
        TypeError: an argument is of a wrong kind.
        ValueError: it is none.
    """
    number = check_number(name, value)
    if not number > 0:
        raise ValueError(f"`{name}` must be > 0, got {value!r}.")
    return number


def check_bool(name: str, value: object) -> bool:
    """Return ``value`` if it is True or False.

    Raises:
        TypeError: it is neither.
    """
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, got {value!r}.")
    return value
