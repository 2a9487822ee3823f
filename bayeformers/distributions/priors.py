"""Priors over weights: what a user names (`...Prior`, JSON) and the density that it becomes for one tensor.

A new prior is one subclass of :class:`Prior`; without a `register_kl` for its density the KL falls back to one draw.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from .diagonal_normal import MIN_SCALE, DiagonalNormal

_PRIORS: dict[str, type[Prior]] = {}
_INITIALIZER_RANGE = 0.02  # the usual initial standard deviation of a transformer's weights


class PriorDistribution(Protocol):
    """The prior density of one tensor's weights."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Elementwise log density in nats, shape of ``value``."""


@dataclass(frozen=True)
class InitialScale:
    """MOPED's initial scale as a function of the trained weight: delta * max(|w|, floor), elementwise.

    Krishnan et al. 2020 (arXiv 1906.05323), section 3; the floor keeps fresh biases and pruned weights uncertain.

    Attributes:
        delta: scale relative to |w|.
        floor: 0.1 mean|w| of the whole tensor; 0.02 for an all-zero one. A scalar tensor.
    """

    delta: float
    floor: Tensor

    @classmethod
    def of(cls, weight: Tensor, delta: float, padding_idx: int | None = None) -> InitialScale:
        """The rule for one tensor; ``weight`` is all of it, and its row ``padding_idx`` does not count."""
        total, count = _norm1(weight), weight.numel()
        if padding_idx is not None:
            total, count = total - _norm1(weight[padding_idx]), count - weight[padding_idx].numel()
        mean = total / max(count, 1)
        return cls(delta, torch.where(mean > 0, 0.1 * mean, _INITIALIZER_RANGE))

    def __call__(self, weight: Tensor) -> Tensor:
        """Scales of a part of that tensor, in float32 or wider: the shape of ``weight``."""
        scale = weight.detach().to(_wide_dtype(weight)).abs()
        return torch.maximum(scale, self.floor, out=scale).mul_(self.delta).clamp_min_(MIN_SCALE)


def initial_scale(weight: Tensor, delta: float) -> Tensor:
    """MOPED's initial scale of a whole tensor: delta * max(|w|, 0.1 mean|w|); delta * 0.02 for an all-zero one.

    Shape: any -> the same, float32 or the wider dtype of ``weight``.

    >>> initial_scale(torch.tensor([1.0, -2.0, 0.0]), 0.1)
    tensor([0.1000, 0.2000, 0.0100])
    """
    return InitialScale.of(weight, delta)(weight)


class Prior(ABC):
    """A choice of prior; :meth:`for_tensor` gives its density for one tensor.

    Subclasses are frozen dataclasses with JSON values and a ``type`` name of their own.
    """

    type: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _PRIORS[cls.type] = cls

    @property
    @abstractmethod
    def needs_centre(self) -> bool:
        """Whether the density depends on the trained weight w0, which must be kept once the mean trains."""

    @abstractmethod
    def for_tensor(self, centre: Tensor, initial: InitialScale) -> PriorDistribution:
        """The density for a tensor, or a part of it, whose trained value is ``centre``.

        Args:
            centre: the trained weight (any tensor of its shape, if the prior does not need it).
            initial: the rule that gave the tensor's initial scale.
        """

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; :func:`prior_from_dict` reads it back."""
        return {"type": self.type, **asdict(self)}  # type: ignore[call-overload]


@dataclass(frozen=True)
class MopedPrior(Prior):
    """N(w0, (r sigma_0)^2), centred at the trained weight, r times as wide as the initial posterior.

    With r = 1 the KL is 0 before training and delta is the prior's noise level.

    Args:
        relative_scale: r > 0.
    """

    relative_scale: float = 1.0
    type: ClassVar[str] = "moped"

    def __post_init__(self) -> None:
        _check_positive("relative_scale", self.relative_scale)

    @property
    def needs_centre(self) -> bool:
        """Always: both its mean and its scale come from the trained weight."""
        return True

    def for_tensor(self, centre: Tensor, initial: InitialScale) -> DiagonalNormal:
        """N(centre, (r * initial(centre))^2)."""
        return DiagonalNormal(centre, initial(centre).mul_(self.relative_scale).clamp_min_(MIN_SCALE))


@dataclass(frozen=True)
class NormalPrior(Prior):
    """N(m, std^2), one absolute scale for all weights; m is the trained weight or a number.

    With far more weights than data the ELBO then drives every scale towards ``std`` and the network dissolves: the true
    optimum of that objective. Prefer :class:`MopedPrior` for fine-tuned networks.

    Args:
        std: standard deviation > 0.
        centre: "pretrained" (the trained weight) or a finite number.
    """

    std: float = 1.0
    centre: float | Literal["pretrained"] = "pretrained"
    type: ClassVar[str] = "normal"

    def __post_init__(self) -> None:
        _check_positive("std", self.std)
        _check_centre(self.centre)

    @property
    def needs_centre(self) -> bool:
        """Only with ``centre="pretrained"``."""
        return self.centre == "pretrained"

    def for_tensor(self, centre: Tensor, initial: InitialScale) -> DiagonalNormal:
        """N(m, std^2)."""
        return DiagonalNormal(_centre_tensor(self.centre, centre), _like(centre, self.std))


@dataclass(frozen=True)
class ScaleMixturePrior(Prior):
    """pi N(0, std1^2) + (1 - pi) N(0, std2^2), Blundell et al. 2015 (arXiv 1505.05424), section 3.3.

    Args:
        pi: weight of the first component, in (0, 1).
        std1: its standard deviation > 0.
        std2: the other's.
        quadrature: None for the unbiased one-draw KL, or the number of Gauss-Hermite nodes per weight.
    """

    pi: float = 0.5
    std1: float = 1.0
    std2: float = 0.0025
    quadrature: int | None = None
    type: ClassVar[str] = "scale_mixture"

    def __post_init__(self) -> None:
        if not (_is_number(self.pi) and 0 < self.pi < 1):
            raise ValueError(f"`pi` must lie in (0, 1), got {self.pi!r}; it is the weight of the first component.")
        _check_positive("std1", self.std1)
        _check_positive("std2", self.std2)
        if self.quadrature is not None and not (type(self.quadrature) is int and self.quadrature >= 1):
            raise ValueError(f"`quadrature` must be None or a whole number >= 1, got {self.quadrature!r}.")

    @property
    def needs_centre(self) -> bool:
        """Never: it is centred at zero."""
        return False

    def for_tensor(self, centre: Tensor, initial: InitialScale) -> ScaleMixture:
        """The same mixture for every tensor."""
        return ScaleMixture(self.pi, self.std1, self.std2, self.quadrature)


@dataclass(frozen=True)
class EmpiricalBayesPrior(Prior):
    """N(m, s^2) with one s per tensor, at its optimum s^2 = mean(sigma^2 + (mu - m)^2) (type-II maximum likelihood).

    Args:
        centre: "pretrained" (the trained weight) or a finite number.
    """

    centre: float | Literal["pretrained"] = "pretrained"
    type: ClassVar[str] = "empirical_bayes"

    def __post_init__(self) -> None:
        _check_centre(self.centre)

    @property
    def needs_centre(self) -> bool:
        """Only with ``centre="pretrained"``."""
        return self.centre == "pretrained"

    def for_tensor(self, centre: Tensor, initial: InitialScale) -> EmpiricalNormal:
        """The family N(m, s^2), s still free."""
        return EmpiricalNormal(_centre_tensor(self.centre, centre))


@dataclass(frozen=True)
class ScaleMixture:
    """Density of :class:`ScaleMixturePrior`, the same for every weight."""

    pi: float
    std1: float
    std2: float
    quadrature: int | None = None

    def log_prob(self, value: Tensor) -> Tensor:
        """log(pi N(value; 0, std1^2) + (1 - pi) N(value; 0, std2^2)), elementwise."""
        zero = torch.zeros((), dtype=value.dtype, device=value.device)
        first = DiagonalNormal(zero, _like(value, self.std1)).log_prob(value) + math.log(self.pi)
        second = DiagonalNormal(zero, _like(value, self.std2)).log_prob(value) + math.log1p(-self.pi)
        return torch.logaddexp(first, second)


@dataclass(frozen=True)
class EmpiricalNormal:
    """N(loc, s^2) whose s is fitted to the posterior: see :meth:`best_scale`."""

    loc: Tensor

    def best_scale(self, q: DiagonalNormal) -> Tensor:
        """The s that minimises KL(q || N(loc, s^2)): a scalar with gradient."""
        variance = q.scale.square() if self.loc is q.loc else q.scale.square() + (q.loc - self.loc).square()
        return variance.expand_as(q.loc).mean().sqrt()

    def log_prob(self, value: Tensor) -> Tensor:
        """Elementwise log density at the s that fits ``value`` itself."""
        scale = (value - self.loc).square().mean().sqrt().clamp_min(MIN_SCALE)
        return DiagonalNormal(self.loc, scale).log_prob(value)


def prior_from_dict(data: Mapping[str, Any]) -> Prior:
    """The prior that :meth:`Prior.to_dict` described.

    Raises:
        ValueError: unknown ``type``, or values that the prior refuses.

    >>> prior_from_dict({"type": "normal", "std": 0.5, "centre": 0.0})
    NormalPrior(std=0.5, centre=0.0)
    """
    values = dict(data)
    name = values.pop("type", None)
    if name not in _PRIORS:
        raise ValueError(f"`prior` has unknown type {name!r}; allowed: {sorted(_PRIORS)}.")
    known = _PRIORS[name].__dataclass_fields__  # type: ignore[attr-defined]
    return _PRIORS[name](**{key: value for key, value in values.items() if key in known})


def _centre_tensor(centre: float | str, pretrained: Tensor) -> Tensor:
    return pretrained if isinstance(centre, str) else _like(pretrained, centre)


def _norm1(weight: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(weight.detach(), ord=1, dtype=_wide_dtype(weight))
    return norm


def _wide_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _like(tensor: Tensor, value: float) -> Tensor:
    """A scalar of at least float32 on the tensor's device."""
    return torch.full((), value, dtype=_wide_dtype(tensor), device=tensor.device)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_positive(name: str, value: float) -> None:
    if not (_is_number(value) and value > 0):
        raise ValueError(f"`{name}` must be a finite number > 0, got {value!r}; it is a standard deviation.")


def _check_centre(centre: float | str) -> None:
    if centre != "pretrained" and not _is_number(centre):
        raise ValueError(f"`centre` must be 'pretrained' (the trained weight) or a finite number, got {centre!r}.")
