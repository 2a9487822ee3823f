"""`IVONPosterior`: what a training with `bayeformers.optim.IVON` ends in."""

from __future__ import annotations

from typing import ClassVar, Protocol

from torch import Tensor, nn

from .diagonal import DiagonalPosterior
from .files import register_posterior

__all__ = ["IVONPosterior"]


class HasScales(Protocol):
    """An optimizer that knows the standard deviation of every parameter that it moves."""

    def scales(self) -> dict[nn.Parameter, Tensor]:
        """Standard deviations by Parameter."""


@register_posterior
class IVONPosterior(DiagonalPosterior):
    """N(m, 1 / (ess (h + weight_decay))) of an `IVON` optimizer: m are the model's weights, h its Hessian's estimate.

    Shen et al. 2024 (arXiv 2402.17641), Algorithm 1, line 8. Made by `from_optimizer`; after a training with
    `BayesianTrainer` it is `trainer.posterior`. It is saved beside the model, the scales in float32.

    Args:
        model: at the posterior mean.
        scales: standard deviations by the Parameter's name.
    """

    file_name: ClassVar[str | None] = "ivon.safetensors"

    @classmethod
    def from_optimizer(cls, model: nn.Module, optimizer: HasScales) -> IVONPosterior:
        """Return the posterior as it is now: further steps do not change it, but move the model away from it.

        Args:
            model: whose parameters the optimizer moves.
            optimizer: an `IVON`, outside of a draw.

        Raises:
            TypeError: ``optimizer`` has no scales, or ``model`` is no module.
            ValueError: the optimizer moves a parameter that the model has not, or does not know its ``ess`` yet.
        """
        if not callable(getattr(optimizer, "scales", None)):
            raise TypeError(f"`optimizer` must be a bayeformers.optim.IVON, got {type(optimizer).__name__}.")
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}.")
        names = {parameter: name for name, parameter in model.named_parameters()}
        scales = optimizer.scales()
        strange = [tuple(parameter.shape) for parameter in scales if parameter not in names]
        if strange:
            raise ValueError(f"`optimizer` moves parameters that `model` does not have, of shapes {strange[:3]}.")
        return cls(model, {names[parameter]: scale for parameter, scale in scales.items()})
