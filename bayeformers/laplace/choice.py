"""How a prior precision was chosen, and when the choice says that the posterior should not be believed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .evidence import DEFAULT_BOUNDS, Precision

End = Literal["smallest", "largest"]

_METHODS = ("given", "marglik", "marglik_per_layer", "holdout")
_ENDS = ("smallest", "largest")


@dataclass(frozen=True, kw_only=True)
class PrecisionChoice:
    """How tau was found.

    Attributes:
        method: "given", the evidence ("marglik", "marglik_per_layer"), or held-out NLL ("holdout").
        at_grid_end: the end of the range that was searched where tau lies there (of any layer), else None: the true
            optimum lies beyond, or there is none.
    """

    method: Literal["given", "marglik", "marglik_per_layer", "holdout"] = "given"
    at_grid_end: End | None = None

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> PrecisionChoice:
        """What a file says.

        Raises:
            ValueError: it is none of these.
        """
        method, end = found.get("method"), found.get("at_grid_end")
        if method not in _METHODS or end not in (None, *_ENDS):
            raise ValueError(f"The file's choice of the prior precision must be one of {_METHODS}, got {found!r}.")
        return cls(method=method, at_grid_end=end)


def end_of(values: Sequence[float], low: float, high: float) -> End | None:
    """Which end of [low, high] one of the values has reached, if any; the smallest first."""
    if min(values) <= low:
        return "smallest"
    return "largest" if max(values) >= high else None


def by_evidence(precision: Precision, *, per_layer: bool) -> PrecisionChoice:
    """The choice that found the maximiser ``precision`` of the evidence within its bounds."""
    values = list(precision.values()) if isinstance(precision, Mapping) else [precision]
    end = end_of(values, *DEFAULT_BOUNDS)
    return PrecisionChoice(method="marglik_per_layer" if per_layer else "marglik", at_grid_end=end)
