"""A trained posterior as the next task's prior: continual fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from .diagonal_normal import DiagonalNormal
from .gaussian_priors import MopedPrior
from .initial_scale import InitialScale
from .prior import Prior, check_positive


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
        """The same for a model with these Bayesian tensors, ``fresh`` being those that A has not.

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
