"""First and second moments of the weights along a training, as SWAG needs them (Maddox et al. 2019, algorithm 1)."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..checks import check_count
from .streamed import InMemory, Tensors

MEAN, VARIANCE, DEVIATION = "mean", "variance", "deviations"


@dataclass(frozen=True)
class Moments:
    """What a SWAG posterior is made of.

    Attributes:
        tensors: "mean/NAME", "variance/NAME" and "deviations/K/NAME" of every Parameter NAME and column K.
        num_snapshots: how many weights they are of.
        num_columns: of the matrix of deviations, the last ones that there were.
    """

    tensors: Tensors
    num_snapshots: int
    num_columns: int

    @property
    def names(self) -> list[str]:
        """The Parameters that they are of."""
        return [name.removeprefix(f"{MEAN}/") for name in self.tensors.shapes if name.startswith(f"{MEAN}/")]


class RunningMoments:
    """Moments of weights that are seen one after the other, on the CPU, in float32 or wider.

    By Welford's recursion, m_n = m_{n-1} + (w_n - m_{n-1}) / n and s_n = s_{n-1} + (w_n - m_{n-1})(w_n - m_n), the
    mean and n times the variance. The difference of the paper's running means of w^2 and w would lose a variance below
    1e-7 w^2, where a fine-tuning's often is. The columns w_n - m_n are the paper's.

    Args:
        rank: how many columns are kept, the last ones; 0: none, for a diagonal covariance.

    Raises:
        ValueError: ``rank`` is no whole number >= 0, or 1, of which there is no covariance.

    >>> moments, layer = RunningMoments(rank=2), nn.Linear(1, 1, bias=False)
    >>> for value in (1.0, 2.0, 6.0):
    ...     moments.add({"weight": torch.full((1, 1), value)})
    >>> [next(moments.moments().tensors.chunks(f"{name}/weight")).item() for name in ("mean", "deviations/1")]
    [3.0, 3.0]
    """

    def __init__(self, rank: int = 20) -> None:
        check_count("rank", rank, 0)
        if rank == 1:
            raise ValueError("`rank` must be 0 (a diagonal covariance) or >= 2, got 1.")
        self.rank, self.num_snapshots = rank, 0
        self._mean: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}
        self._columns: deque[dict[str, Tensor]] = deque(maxlen=rank)

    @torch.no_grad()
    def add(self, weights: Mapping[str, Tensor]) -> None:
        """Take in one set of weights by name, the same names and shapes every time.

        Raises:
            ValueError: other names, or values that are not finite.
        """
        if self.num_snapshots and weights.keys() != self._mean.keys():
            changed = sorted(weights.keys() ^ self._mean.keys())
            raise ValueError(f"Other weights train than in the first snapshot: {changed[:3]} ({len(changed)}).")
        values = {name: value.detach().to("cpu", _wide(value.dtype), copy=True) for name, value in weights.items()}
        broken = [name for name, value in values.items() if not bool(torch.isfinite(value).all())]
        if broken:
            raise ValueError(f"The weights have NaN or infinite values in {broken[:3]} ({len(broken)})")
        self.num_snapshots += 1
        column = {}
        for name, value in values.items():
            mean = self._mean.setdefault(name, torch.zeros_like(value))
            before = value - mean
            mean.add_(before / self.num_snapshots)
            column[name] = value - mean
            self._squares.setdefault(name, torch.zeros_like(value)).addcmul_(before, column[name])
        self._columns.append(column)

    def moments(self) -> Moments:
        """A copy of the moments as they are now; ValueError before the first snapshot."""
        if not self.num_snapshots:
            raise ValueError("There are no moments yet: no snapshot of the weights was taken.")
        tensors = {f"{MEAN}/{name}": value.clone() for name, value in self._mean.items()}
        tensors |= {f"{VARIANCE}/{name}": value / self.num_snapshots for name, value in self._squares.items()}
        return Moments(InMemory(tensors | self._named_columns()), self.num_snapshots, len(self._columns))

    def _named_columns(self) -> dict[str, Tensor]:
        columns = enumerate(self._columns)
        return {f"{DEVIATION}/{k}/{name}": value for k, column in columns for name, value in column.items()}

    def state(self) -> dict[str, Tensor]:
        """All that goes on: for a checkpoint, along with `num_snapshots`."""
        tensors = {f"{MEAN}/{name}": value for name, value in self._mean.items()}
        return tensors | {f"squares/{name}": value for name, value in self._squares.items()} | self._named_columns()

    def restore(self, state: Mapping[str, Tensor], num_snapshots: int) -> None:
        """Go on from what `state` gave."""
        parts: dict[str, dict[str, Tensor]] = {MEAN: {}, "squares": {}}
        for name, value in state.items():
            part, _, rest = name.partition("/")
            if part == DEVIATION:
                column, _, rest = rest.partition("/")
                part = f"{int(column):06d}"
            parts.setdefault(part, {})[rest] = value.clone()
        self.num_snapshots = num_snapshots
        self._mean, self._squares = parts.pop(MEAN), parts.pop("squares")
        self._columns = deque((parts[key] for key in sorted(parts)), maxlen=self.rank)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The Parameters of a model that train, each under its first name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
