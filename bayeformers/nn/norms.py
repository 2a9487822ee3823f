"""Bayesian gains of normalisations: `torch.nn.LayerNorm`, `torch.nn.RMSNorm` and the RMSNorm classes of transformers.

A normalisation is affine in its gain, y = f(x; 0) + xhat * gain + bias with xhat = f(x; 1) - f(x; 0), whatever a class
calls its normalisation: f(x; 0) is 0, or xhat where the class multiplies with 1 + gain as Gemma's does.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import BayesianModule
from .estimators import REPARAMETERIZATION, Layout
from .reading import MEAN


class Normalization(BayesianModule):
    """Mixin over a normalisation: Gaussian gain and bias, random in `train()`, the mean in `eval()`.

    Only `to_bayesian(model, norms=True)` converts normalisations.
    """

    @property
    def is_random(self) -> bool:
        """Never without a gain, that is without ``elementwise_affine``."""
        draw = self.draw  # not `super().is_random`: torch.compile branches on the property itself, which is true
        return self._parameters.get("weight") is not None and (self.training if draw is None else draw is not MEAN)

    @abstractmethod
    def normalize(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the layer's output with this gain and bias instead of its own.

        Args:
            input: (*, normalized shape), the tensor to normalise.
            weight: the gain, of the normalized shape.
            bias: the shift, of the same shape; None: there is none.
        """

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer with its mean, its held draw or fresh noise."""
        if not self.is_random:
            output: Tensor = super().forward(input)
            return output
        weight, bias = self.variational("weight"), self.maybe("bias")
        if self.active_estimator is REPARAMETERIZATION:
            return self.normalize(input, weight.sample(), None if bias is None else bias.sample())
        at_zero = self.normalize(input, torch.zeros_like(weight.loc), None)
        normalised = self.normalize(input, torch.ones_like(weight.loc), None) - at_zero
        layout = Layout(features=-weight.loc.dim())
        return at_zero + self.active_estimator.affine(_scaled, (normalised,), weight, bias, layout)


class LayerNorm(Normalization, torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` with Gaussian gain and bias; see :class:`Normalization`.

    Shape: (N, ..., *normalized_shape) -> the same.

    >>> LayerNorm(4).train()(torch.randn(2, 3, 4)).shape
    torch.Size([2, 3, 4])
    """

    torch_class = torch.nn.LayerNorm

    def normalize(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Normalise as `torch.nn.functional.layer_norm` does.

        Args:
            input: (*, normalized shape), the tensor to normalise.
            weight: the gain, of the normalized shape.
            bias: the shift, of the same shape; None: there is none.

        Returns:
            The normalised tensor, of the input's shape.
        """
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(Normalization, torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` with a Gaussian gain; see :class:`Normalization`.

    Shape: (N, ..., *normalized_shape) -> the same.

    >>> RMSNorm(4).train()(torch.randn(2, 3, 4)).shape
    torch.Size([2, 3, 4])
    """

    torch_class = torch.nn.RMSNorm

    def normalize(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Normalise as `torch.nn.functional.rms_norm` does.

        Args:
            input: (*, normalized shape), the tensor to normalise.
            weight: the gain, of the normalized shape.
            bias: always None, for this normalisation has no shift.

        Returns:
            The normalised tensor, of the input's shape.
        """
        return F.rms_norm(input, self.normalized_shape, weight, self.eps)


class AnyRMSNorm(Normalization):
    """Mixin over an RMSNorm class of any library, whose own forward gets the drawn gain.

    The registry makes a class of it and of the module's own class, on demand.
    """

    def normalize(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return what the forward of `torch_class` gives with this gain.

        Args:
            input: (*, d), the tensor to normalise.
            weight: the gain, (d,).
            bias: always None, for this normalisation has no shift.
        """
        output: Tensor = self.torch_class.forward(with_gain(self, self.torch_class, weight), input)
        return output

    @classmethod
    def refusal(cls, module: torch.nn.Module) -> str | None:
        """A class that is a normalisation by its name, and is not affine in its gain."""
        reason = super().refusal(module)
        return reason or (None if _is_affine(module) else "its output is not affine in its weight")


def is_rms_norm(module: torch.nn.Module) -> bool:
    """Return whether it is one vector of gains and nothing else; `AnyRMSNorm.refusal` looks at what it does.

    Such as LlamaRMSNorm, T5LayerNorm.

    >>> is_rms_norm(torch.nn.RMSNorm(4)), is_rms_norm(torch.nn.PReLU(4))
    (True, False)
    """
    name = type(module).__name__
    own = [key for key, parameter in module._parameters.items() if parameter is not None]
    return name.endswith(("RMSNorm", "LayerNorm")) and own == ["weight"]


def with_gain(module: torch.nn.Module, kind: type[torch.nn.Module], gain: Tensor) -> torch.nn.Module:
    """Return a shallow copy of a module as its plain class with another gain, to run the class's forward on.

    Args:
        module: the normalisation, which stays as it is.
        kind: the class of the copy, whose ``forward`` is to run.
        gain: the copy's weight, (d,).
    """
    shell: torch.nn.Module = kind.__new__(kind)
    shell.__dict__ = {**module.__dict__, "_parameters": {"weight": gain}}
    return shell


@torch.no_grad()
def _is_affine(module: torch.nn.Module) -> bool:
    """Whether f(x; g) = f(x; 0) + (f(x; 1) - f(x; 0)) * g at one x and g; True on the meta device, without values."""
    weight, kind = module.get_parameter("weight"), type(module)
    if weight.is_meta:
        return True
    x = torch.linspace(-1, 2, 3 * weight.numel(), device=weight.device).reshape(3, *weight.shape)
    zero, one = torch.zeros_like(x[0]), torch.ones_like(x[0])
    gain = torch.linspace(0.5, -1.5, weight.numel(), device=weight.device).reshape(weight.shape)
    try:
        outputs = [kind.forward(with_gain(module, kind, g), x) for g in (zero, one, gain)]
    except (TypeError, ValueError, RuntimeError):  # it takes more than one tensor
        return False
    at_zero, at_one, at_gain = outputs
    return torch.allclose(at_gain, at_zero + (at_one - at_zero) * gain, rtol=1e-4, atol=1e-4)


def _scaled(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return input * weight if bias is None else torch.addcmul(bias, input, weight)
