"""Priors that are Gaussian: of a given scale, of one that is fitted as the posterior trains, or a trained posterior."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor

from .diagonal_normal import MIN_SCALE, DiagonalNormal
from .initial_scale import InitialScale
from .prior import Prior, centre_tensor, check_centre, check_positive, scalar_like

Group = Literal["tensor", "layer"]


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
        check_positive("relative_scale", self.relative_scale)

    @property
    def needs_centre(self) -> bool:
        """Always: both its mean and its scale come from the trained weight."""
        return True

    def for_tensor(self, centre: Tensor, initial: InitialScale) -> DiagonalNormal:
        """N(centre, (r * initial(centre))^2)."""
        return DiagonalNormal(centre, initial(centre).mul_(self.relative_scale).clamp_min_(MIN_SCALE))


@dataclass(frozen=True)
class RelativePrior(Prior):
    """N(mu, (r sigma_0(mu))^2), centred at the present mean mu: a prior of the scale alone, for means that must train.

    sigma_0 is the initial scale that a trained weight mu would get, delta max(|mu|, 0.1 mean|mu|), with the floor of
    the posterior's scale where that is multiplicative. The KL has no
    gradient in the means, which train by the likelihood as without noise (empirical Bayes in every prior mean), and
    holds sigma / |mu| near r delta. `MopedPrior` would hold a fresh adapter to its random start, and a wide prior of
    more weights than data would end in noise. Take ``scale="multiplicative"`` with it, whose sigma moves with the mean.

    Args:
        relative_scale: r > 0.
    """

    relative_scale: float = 1.0
    type: ClassVar[str] = "relative"
    follows_mean: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive("relative_scale", self.relative_scale, "a ratio of standard deviations")

    def for_tensor(self, centre: Tensor, initial: InitialScale) -> DiagonalNormal:
        """N(centre, (r * initial(centre))^2), with the present mean as the centre."""
        centre = centre.detach()
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
        check_positive("std", self.std)
        check_centre(self.centre)

    def for_tensor(self, centre: Tensor, initial: InitialScale) -> DiagonalNormal:
        """N(m, std^2)."""
        return DiagonalNormal(centre_tensor(self.centre, centre), scalar_like(centre, self.std))


@dataclass(frozen=True)
class EmpiricalBayesPrior(Prior):
    """N(m, s^2) with one s per group, at its optimum s^2 = mean(sigma^2 + (mu - m)^2) (type-II maximum likelihood).

    Args:
        centre: "pretrained" (the trained weight) or a finite number.
        per: "tensor", or "layer": weight and bias of a layer share one s. A tied tensor belongs to the first layer
            that owns it.
    """

    centre: float | Literal["pretrained"] = "pretrained"
    per: Group = "tensor"
    type: ClassVar[str] = "empirical_bayes"

    def __post_init__(self) -> None:
        check_centre(self.centre)
        if self.per not in get_args(Group):
            raise ValueError(f"`per` must be one of {list(get_args(Group))}, got {self.per!r}.")

    def for_tensor(self, centre: Tensor, initial: InitialScale) -> EmpiricalNormal:
        """The family N(m, s^2), s still free."""
        return EmpiricalNormal(centre_tensor(self.centre, centre), self.per)


@dataclass(frozen=True)
class ARDPrior(Prior):
    """N(0, s^2) with one s for every weight, at its optimum s^2 = mu^2 + sigma^2 (automatic relevance determination).

    KL = 1/2 sum log(1 + mu^2 / sigma^2): it depends on the signal-to-noise ratio alone, is 0 for a weight that is all
    noise, and, with the multiplicative scale sigma^2 = alpha mu^2, is 1/2 sum log(1 + 1/alpha). Centred at 0, it does
    not hold a mean at its trained value. MacKay 1995; Kharitonov et al. 2018 (arXiv 1811.00596).
    """

    type: ClassVar[str] = "ard"

    def for_tensor(self, centre: Tensor, initial: InitialScale) -> ARDNormal:
        """The family, every s still free."""
        return ARDNormal()


@dataclass(frozen=True)
class PosteriorPrior(Prior):
    """N(mu_A, sigma_A^2), the posterior of task A, for every tensor that A has; :class:`MopedPrior` for the others.

    Made by `posterior_as_prior(model)`, or by `to_bayesian(model, prior=trained_model)`. Variational continual learning
    (Nguyen et al. 2018, arXiv 1710.10628): KL(q || q_A) holds each weight as firmly as task A knew it. The converted
    model keeps both tensors in buffers (``<name>_prior_centre``, ``<name>_prior_scale``), so that its checkpoint is
    whole, and this object without the tensors.

    Args:
        fresh: names of the model's tensors that A has not, such as a new head's.
        relative_scale: of their MopedPrior.
        tensors: posterior of every tensor of A, by its name; empty once a model keeps them.
    """

    fresh: Sequence[str] = ()
    relative_scale: float = 1.0
    tensors: Mapping[str, DiagonalNormal] = field(default_factory=dict, repr=False, compare=False)
    type: ClassVar[str] = "posterior"

    def __post_init__(self) -> None:
        check_positive("relative_scale", self.relative_scale, "a ratio of standard deviations")
        if not isinstance(self.fresh, (list, tuple)) or not all(isinstance(name, str) for name in self.fresh):
            raise TypeError(f"`fresh` must be a list of names of tensors, got {self.fresh!r}.")
        object.__setattr__(self, "fresh", tuple(self.fresh))

    @property
    def needs_centre(self) -> bool:
        """Always: each tensor's own, or the trained weight of a fresh one."""
        return True

    def for_tensor(self, centre: Tensor, initial: InitialScale) -> DiagonalNormal:
        """The density of a fresh tensor; the model keeps the others'."""
        return MopedPrior(self.relative_scale).for_tensor(centre, initial)

    def fitted_to(self, shapes: Mapping[str, tuple[int, ...]]) -> PosteriorPrior:
        """Return the same for a model with these Bayesian tensors, ``fresh`` being those that A has not.

        Raises:
            ValueError: a tensor has another shape in A, or no name is in both.
        """
        for name, shape in shapes.items():
            if name in self.tensors and tuple(self.tensors[name].loc.shape) != shape:
                raise ValueError(
                    f"`prior` is a posterior whose {name!r} has shape {tuple(self.tensors[name].loc.shape)}, the "
                    f"model's has {shape}. Name it in `posterior_as_prior(..., exclude=[{name!r}])` for a fresh prior."
                )
        fresh = tuple(name for name in shapes if name not in self.tensors)
        if len(fresh) == len(shapes):
            raise ValueError(
                f"`prior` is a posterior of {list(self.tensors)[:3]}..., the model converts {fresh[:3]}...: no tensor "
                "is in both. Convert the same module, under the same names, as for the posterior."
            )
        return replace(self, fresh=fresh)

    def without_tensors(self) -> PosteriorPrior:
        """What a converted model's configuration records."""
        return replace(self, tensors={})

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, without the tensors: the checkpoint of the converted model holds them."""
        return {"type": self.type, "fresh": list(self.fresh), "relative_scale": self.relative_scale}


@dataclass(frozen=True)
class EmpiricalNormal:
    """N(loc, s^2) whose s is fitted to the posterior: see :meth:`best_scale`."""

    loc: Tensor
    per: Group = "tensor"

    def best_scale(self, q: DiagonalNormal) -> Tensor:
        """The s that minimises KL(q || N(loc, s^2)): a scalar with gradient."""
        variance = q.scale.square() if self.loc is q.loc else q.scale.square() + (q.loc - self.loc).square()
        return variance.expand_as(q.loc).mean().sqrt()

    def log_prob(self, value: Tensor) -> Tensor:
        """Elementwise log density at the s that fits ``value`` itself."""
        scale = (value - self.loc).square().mean().sqrt().clamp_min(MIN_SCALE)
        return DiagonalNormal(self.loc, scale).log_prob(value)


@dataclass(frozen=True)
class ARDNormal:
    """N(0, s^2) whose s is fitted to each weight."""

    separable: ClassVar[bool] = True

    def log_prob(self, value: Tensor) -> Tensor:
        """Elementwise log density at the s = |w| that fits ``value`` itself: -log|w| - log(2 pi e) / 2."""
        return -value.abs().clamp_min(MIN_SCALE).log() - 0.5 * math.log(2 * math.pi * math.e)
