"""Numbers as callers give them: Python's or NumPy's, and never a bool."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any, TypeGuard

__all__ = ["check_choice", "check_count", "check_draw", "check_number", "is_finite", "is_real", "is_whole", "plain"]


def is_whole(value: object) -> TypeGuard[int]:
    """Return whether an integer: Python's or NumPy's; True and 1.0 are none.

    >>> import numpy as np
    >>> [is_whole(value) for value in (3, np.int64(3), True, 3.0, "3")]
    [True, True, False, False, False]
    """
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_real(value: object) -> TypeGuard[float]:
    """Return whether a number, NaN and infinities included.

    >>> import numpy as np
    >>> [is_real(value) for value in (3, np.float32(0.5), float("nan"), True, np.True_, "3", 1j)]
    [True, True, True, False, False, False, False]
    """
    return isinstance(value, Real) and not isinstance(value, bool)


def is_finite(value: object) -> TypeGuard[float]:
    """Return whether a number that is finite.

    >>> is_finite(2), is_finite(float("inf"))
    (True, False)
    """
    return is_real(value) and math.isfinite(value)


def check_draw(index: int, seed: int, num_draws: int | None = None) -> None:
    """Check that a draw's index and seed are whole numbers >= 0, and that there is such a draw.

    Args:
        index: number of the draw, from 0.
        seed: of the sequence of draws.
        num_draws: how many draws there are; None: no end of them.

    Raises:
        TypeError: not a whole number.
        ValueError: one is negative, or ``index`` not below ``num_draws``.
    """
    for name, value in (("index", index), ("seed", seed)):
        if not is_whole(value):
            raise TypeError(f"`{name}` must be a whole number, got {value!r}.")
    if index < 0 or (num_draws is not None and index >= num_draws):
        raise ValueError(f"`index` must be in 0..{'' if num_draws is None else num_draws - 1}, got {index}.")
    if seed < 0:
        raise ValueError(f"`seed` must be a whole number >= 0, got {seed}.")


def plain(value: Any) -> Any:
    """A number as Python's own, which JSON has; anything else as it is."""
    if is_whole(value):
        return int(value)
    return float(value) if is_real(value) else value


def check_count(name: str, value: Any, minimum: int) -> None:
    """Raise ValueError for anything but a whole number >= ``minimum``.

    Args:
        name: the argument's name, for the message.
        value: what the caller gave for it.
        minimum: the least number that is allowed.

    Raises:
        ValueError: it is no whole number, or below the least.
    """
    if not is_whole(value) or value < minimum:
        raise ValueError(f"`{name}` must be a whole number >= {minimum}, got {value!r}.")


def check_number(name: str, value: Any, minimum: float, maximum: float = math.inf, *, strict: bool = False) -> None:
    """Raise ValueError for anything but a finite number in a closed interval, or one that is open below.

    Args:
        name: the argument's name, for the message.
        value: what the caller gave for it.
        minimum: the lower end of the interval.
        maximum: the upper end, which is allowed.
        strict: whether the number must be above the lower end.

    Raises:
        ValueError: it is no finite number, or outside of the interval.
    """
    if not is_finite(value) or not minimum <= value <= maximum or (strict and value == minimum):
        allowed = f"> {minimum:g}" if strict else f">= {minimum:g}"
        allowed += f" and <= {maximum:g}" if math.isfinite(maximum) else ""
        raise ValueError(f"`{name}` must be a finite number {allowed}, got {value!r}.")


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``.

    Args:
        name: the argument's name, for the message.
        value: what the caller gave for it.
        allowed: all values that the argument can have.

    Raises:
        ValueError: it is none of them.
    """
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {allowed}, got {value!r}.")
