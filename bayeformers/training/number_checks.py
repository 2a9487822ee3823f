"""Checks of single arguments: each names the argument, the value got and what is allowed."""

import math
from typing import Any

from ..scalars import is_finite, is_whole

__all__ = ["check_choice", "check_count", "check_number"]


def check_count(name: str, value: Any, minimum: int) -> None:
    """Errors: ValueError for anything but a whole number >= ``minimum``."""
    if not is_whole(value) or value < minimum:
        raise ValueError(f"`{name}` must be a whole number >= {minimum}, got {value!r}.")


def check_number(name: str, value: Any, minimum: float, maximum: float = math.inf, *, strict: bool = False) -> None:
    """Errors: ValueError for anything but a finite number in [minimum, maximum], above ``minimum`` if ``strict``."""
    if not is_finite(value) or not minimum <= value <= maximum or (strict and value == minimum):
        allowed = f"> {minimum:g}" if strict else f">= {minimum:g}"
        allowed += f" and <= {maximum:g}" if math.isfinite(maximum) else ""
        raise ValueError(f"`{name}` must be a finite number {allowed}, got {value!r}.")


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Errors: ValueError unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {allowed}, got {value!r}.")
