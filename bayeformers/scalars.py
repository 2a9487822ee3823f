"""Numbers as callers give them: Python's or NumPy's, and never a bool."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any, TypeGuard

__all__ = ["check_draw", "is_finite", "is_real", "is_whole", "plain"]


def is_whole(value: object) -> TypeGuard[int]:
    """Whether an integer: Python's or NumPy's; True and 1.0 are none.

    >>> import numpy as np
    >>> [is_whole(value) for value in (3, np.int64(3), True, 3.0, "3")]
    [True, True, False, False, False]
    """
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_real(value: object) -> TypeGuard[float]:
    """Whether a number, NaN and infinities included.

    >>> import numpy as np
    >>> [is_real(value) for value in (3, np.float32(0.5), float("nan"), True, np.True_, "3", 1j)]
    [True, True, True, False, False, False, False]
    """
    return isinstance(value, Real) and not isinstance(value, bool)


def is_finite(value: object) -> TypeGuard[float]:
    """Whether a number that is finite.

    >>> is_finite(2), is_finite(float("inf"))
    (True, False)
    """
    return is_real(value) and math.isfinite(value)


def check_draw(index: int, seed: int, num_draws: int | None = None) -> None:
    """Whole numbers >= 0, and an ``index`` that exists.

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
