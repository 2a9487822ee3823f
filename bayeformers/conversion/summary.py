"""`summary(model)`: what was converted, what was not and why, how wide the posterior is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from ..nn.base import NamedVariational, is_bayesian, variational_tensors
from ..nn.kl import tensor_kl
from ..nn.shards import gathered
from ..processes.dtensors import reshard
from .record import conversion_of, conversion_record


@dataclass(frozen=True)
class TensorSummary:
    """One distinct Bayesian tensor.

    Attributes:
        name: its name in the model.
        kind: class of the layer that owns it first.
        shape: of the tensor.
        relative_scale: median of scale / |mean| over the means that are not zero; inf if all are.
        kl: its part of the KL, in nats.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    relative_scale: float
    kl: float


@dataclass(frozen=True)
class ModelSummary:
    """What :func:`summary` found; ``print`` shows a table.

    Attributes:
        tensors: every distinct Bayesian tensor.
        skipped: modules whose weights stay deterministic, and the reason; single tensors of converted modules.
        bayesian_parameters: number of random weights.
        total_parameters: number of weights without the scales.
        bayesian_matrix_parameters: of the random weights, those in tensors of 2 or more axes.
        total_matrix_parameters: of all weights, those in tensors of 2 or more axes.
    """

    tensors: list[TensorSummary]
    skipped: dict[str, str]
    bayesian_parameters: int
    total_parameters: int
    bayesian_matrix_parameters: int
    total_matrix_parameters: int

    @property
    def coverage(self) -> float:
        """Share of the weights that are random, in [0, 1]."""
        return self.bayesian_parameters / max(self.total_parameters, 1)

    @property
    def matrix_coverage(self) -> float:
        """:attr:`coverage` of the tensors of 2 or more axes alone: all but biases, gains and other vectors."""
        return self.bayesian_matrix_parameters / max(self.total_matrix_parameters, 1)

    @property
    def kl(self) -> float:
        """KL(q || p) of the model in nats."""
        return sum(tensor.kl for tensor in self.tensors)

    def __str__(self) -> str:
        width, kind = (max(map(len, column)) for column in zip(*((t.name, t.kind) for t in self.tensors), strict=True))
        lines = [f"{'tensor':<{width}}  {'layer':<{kind}} {'shape':<16} {'scale/|mean|':>12} {'KL (nats)':>12}"]
        for t in self.tensors:
            shape = "x".join(map(str, t.shape))
            lines.append(f"{t.name:<{width}}  {t.kind:<{kind}} {shape:<16} {t.relative_scale:>12.3g} {t.kl:>12.4g}")
        lines.append(
            f"Bayesian: {self.bayesian_parameters:,} of {self.total_parameters:,} parameters ({self.coverage:.1%}), "
            f"{self.bayesian_matrix_parameters:,} of {self.total_matrix_parameters:,} in matrices "
            f"({self.matrix_coverage:.1%}), KL {self.kl:.6g} nats"
        )
        for reason in sorted(set(self.skipped.values())):
            names = [name or "(the model itself)" for name, why in self.skipped.items() if why == reason]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"deterministic: {', '.join(names[:3])}{more}: {reason}")
        return "\n".join(lines)


def summary(model: nn.Module) -> ModelSummary:
    """Return the layers converted and skipped (why), coverage, scale / |mean| and KL of each tensor.

    Raises:
        ValueError: ``model`` is not Bayesian.

    >>> from bayeformers import to_bayesian
    >>> summary(to_bayesian(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)))).skipped
    {'1': 'a normalisation: `norms=True` converts it'}
    """
    record = conversion_record(model) if is_bayesian(model) else conversion_of(model)  # which says what is wrong
    with torch.no_grad():
        reshard(model)
        tensors = [_summarise(tensor) for tensor in variational_tensors(model)]
    random = [tensor.loc for tensor in variational_tensors(model)]
    scales = {id(tensor.rho) for tensor in variational_tensors(model)}
    weights = [parameter for parameter in model.parameters() if id(parameter) not in scales]
    counts = (_count(random), _count(weights), _count(random, matrices=True), _count(weights, matrices=True))
    return ModelSummary(tensors, {} if record is None else dict(record.skipped), *counts)


def _count(parameters: Iterable[nn.Parameter], *, matrices: bool = False) -> int:
    return sum(parameter.numel() for parameter in parameters if parameter.dim() > 1 or not matrices)


def _summarise(named: NamedVariational) -> TensorSummary:
    tensor = gathered(named)
    relative = (tensor.scale() / tensor.loc.abs())[tensor.loc != 0]
    median = float(relative.median()) if relative.numel() else float("inf")
    kind = type(named.module).__name__
    return TensorSummary(tensor.name, kind, tuple(tensor.loc.shape), median, float(tensor_kl(tensor)))
