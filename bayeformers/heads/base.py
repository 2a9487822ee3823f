"""`Head`: the last layer of a model as a distribution over its outputs, f ~ N(mean, variance) given the features."""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..forward import Inputs, call, logits_of, wide
from ..likelihoods import ItemNLL, Likelihood
from ..likelihoods.gaussian import gaussian_log_prob, regression_labels
from .config import HeadConfig

__all__ = ["Head", "Replaced", "check_way", "features_of", "with_logits"]

_PASSING: ContextVar[frozenset[int]] = ContextVar("passing", default=frozenset())


@dataclass
class Replaced:
    """What an undo needs: the layer that stood in the head's place, and which parameters trained."""

    is_shared_by_views: ClassVar[bool] = True

    layer: nn.Module | None = None
    requires_grad: dict[str, bool] = field(default_factory=dict)


class Head(nn.Module, ABC):
    """A last layer that knows the Gaussian of its outputs; called as a layer, it gives the mean.

    Its state is float32 or wider whatever the encoder's dtype, and so are its outputs.

    Args:
        in_features: D, the width of what it reads.
        out_features: C, the number of outputs.
        config: how it was made.
        is_regression: whether the outputs are values with Gaussian noise, else logits.
    """

    weight: nn.Parameter
    log_noise_std: nn.Parameter | None
    has_logit_noise: ClassVar[bool] = False  # logits have noise of their own
    is_own_posterior: ClassVar[bool] = True  # which conversion and Laplace refuse

    def __init__(self, in_features: int, out_features: int, config: HeadConfig, *, is_regression: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.config, self.is_regression = config, is_regression
        self.replaced = Replaced()
        self.register_parameter("log_noise_std", None)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the mean outputs (..., C) of features (..., D); inside `passing` the features as they are."""
        if id(self) in _PASSING.get():
            return inputs
        with torch.autocast(inputs.device.type, enabled=False):
            return self.mean(inputs)

    def extra_repr(self) -> str:
        """Sizes and kind, as torch's layers tell them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.config}"

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """This caller's forwards give what the head reads in place of its outputs, until exit.

        Whatever the model does with its logits, such as choosing those of the last token, it then does with these.
        """
        token = _PASSING.set(_PASSING.get() | {id(self)})
        try:
            yield
        finally:
            _PASSING.reset(token)

    # -- the Gaussian ------------------------------------------------------------------------------------------------

    @abstractmethod
    def mean(self, features: Tensor) -> Tensor:
        """The mean outputs, (..., D) -> (..., C)."""

    @abstractmethod
    def variance(self, features: Tensor) -> Tensor:
        """The variance of each output, (..., D) -> (..., C); given the features they are independent."""

    @abstractmethod
    def penalty(self) -> Tensor:
        """What the loss of N items adds once, in nats: a scalar with gradient, KL(q || p) or -log p."""

    @abstractmethod
    def sampled(self, index: int, seed: int) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """The random Parameters with their values in draw ``index`` of the sequence ``seed``."""

    @property
    def is_fitted(self) -> bool:
        """Whether the variance is that of a posterior."""
        return True

    def scale_parameters(self) -> list[nn.Parameter]:
        """Parameters of scales, which train at `rho_learning_rate`."""
        return [] if self.log_noise_std is None else [self.log_noise_std]

    # -- noise -------------------------------------------------------------------------------------------------------

    def add_noise(self, device: Any, dtype: Any) -> None:
        """Make the Parameter of a learned noise: one number of a regression, one per logit."""
        if self.config.noise_std is None and (self.is_regression or self.has_logit_noise):
            shape = () if self.is_regression else (self.out_features,)
            self.log_noise_std = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

    def reset_noise(self) -> None:
        """At the mode of its prior; of a regression at 1, the scale of standardised targets."""
        if self.log_noise_std is not None:
            dof, variance = self.config.noise_dof, self.config.noise_prior_variance
            start = 0.0 if self.is_regression else 0.5 * math.log(dof * variance / (dof + 2))
            nn.init.constant_(self.log_noise_std, start)

    @property
    def noise_variance(self) -> Tensor:
        """sigma^2: a scalar of a regression, (C,) of logits; 0 where the logits have none."""
        if self.log_noise_std is not None:
            return (2 * self.log_noise_std).exp()
        return self.weight.new_tensor((self.config.noise_std or 0.0) ** 2)

    def noise_penalty(self) -> Tensor:
        """-log p(sigma^2) of the scaled inverse chi-squared prior, summed over the noises; 0 of a fixed noise."""
        if self.log_noise_std is None:
            return self.weight.new_zeros(())
        shape, scale = 0.5 * self.config.noise_dof, 0.5 * self.config.noise_dof * self.config.noise_prior_variance
        log_variance = 2 * self.log_noise_std
        constant = shape * math.log(scale) - math.lgamma(shape)
        return ((shape + 1) * log_variance + scale * (-log_variance).exp() - constant).sum()

    # -- the objective -----------------------------------------------------------------------------------------------

    def item_nll(self, features: Tensor, batch: Any, likelihood: Likelihood) -> ItemNLL:
        """What each item adds to the loss, in nats: a bound on -E log p(label), or -log p at the mean weights.

        Args:
            features: what the head reads of each item, (B, D), or (B, T, D) per token.
            batch: with labels.
            likelihood: of the head.

        Returns:
            Values of the items' shape, with gradient.
        """
        with torch.autocast(features.device.type, enabled=False):
            if likelihood.has_noise:
                return self._regression_nll(features, batch)
            return self._class_nll(features, batch, likelihood)

    def _regression_nll(self, features: Tensor, batch: Any) -> ItemNLL:
        mean = self.mean(features)
        labels = regression_labels(batch, mean)
        spread = self._expected_square(features, mean) / self.noise_variance
        log_density = gaussian_log_prob(labels, mean.reshape(labels.shape), 0.5 * self.noise_variance.log())
        values = (0.5 * spread.reshape(labels.shape) - log_density).sum(1)
        return ItemNLL(values, torch.ones_like(values, dtype=torch.bool))

    def _expected_square(self, features: Tensor, mean: Tensor) -> Tensor:
        """What the expected squared error has besides that of the mean, of its shape."""
        return self.variance(features)

    @abstractmethod
    def _class_nll(self, features: Tensor, batch: Any, likelihood: Likelihood) -> ItemNLL:
        """Of classes or labels."""

    # -- float32 -----------------------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moved as torch moves a module, but never to 16 bits."""

        def kept_wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.is_floating_point() and moved.dtype.itemsize < 4:
                return tensor.to(moved.device)
            return moved

        return super()._apply(kept_wide, recurse)  # type: ignore[no-untyped-call]


def features_of(model: nn.Module, head: Head, inputs: Inputs) -> tuple[Any, Tensor]:
    """Run a model up to its head.

    Args:
        model: the model, perhaps wrapped.
        head: the one inside it.
        inputs: what the model's forward takes, without labels.

    Returns:
        Its output, with features in the logits' place, and these, (B, D) or (B, T, D), in float32 or wider.

    Raises:
        ValueError: the model does something with its logits that features do not survive.
    """
    with head.passing():
        outputs = call(model, inputs)
    features = logits_of(outputs)
    if features.shape[-1] != head.in_features or features.dim() not in (2, 3):
        raise ValueError(
            f"`model` ({type(model).__name__}) must return its head's outputs as its logits: of features (..., "
            f"{head.in_features}) it made {tuple(features.shape)}."
        )
    return outputs, wide(features)


def check_way(model: nn.Module, head: Head, inputs: Inputs, features: Tensor) -> None:
    """Check on one batch that a model does with its head's outputs only what it does with features.

    Args:
        model: in `eval()` mode.
        head: the one inside it.
        inputs: what the model's forward takes, without labels.
        features: what `features_of` makes of them.

    Raises:
        ValueError: the model changes its logits, so that those of these features are others.
    """
    logits = logits_of(call(model, inputs))
    expected = head(features)
    if logits.shape != expected.shape or not torch.allclose(logits, expected.to(logits), rtol=2e-2, atol=2e-2):
        raise ValueError(
            f"`model` ({type(model).__name__}) must return its head's outputs as its logits: it changes them, and a "
            "VBLL or SNGP head would be trained on others."
        )


def with_logits(outputs: Any, logits: Tensor) -> Any:
    """The output of a model with these logits in place of the features."""
    if isinstance(outputs, Tensor):
        return logits
    if isinstance(outputs, tuple):
        return (logits, *outputs[1:])
    outputs["logits"] = logits
    return outputs
