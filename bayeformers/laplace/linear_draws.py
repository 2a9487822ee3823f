"""Draws of the linearised network as functions: one set of weights for all inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..forward import Inputs, call
from .posterior import LaplacePosterior

__all__ = ["linearized_draws"]


def linearized_draws(posterior: LaplacePosterior, inputs: Inputs, *, num_samples: int, seed: int = 0) -> Tensor:
    """Return the logits of the linearised network at draws 0 .. S - 1 of the weights: (S, B, C), or (S, B, T, C).

    f(x; theta*) + J(x) (theta_s - theta*): one function for all inputs and tokens, to be drawn as a line or to give the
    probability of a whole span, where `LaplacePosterior.predict(method="glm")` has one Gaussian per input or token. A
    draw costs two to three forward passes. `posterior.draw(s, seed)` puts the same weights into the network itself.

    Args:
        posterior: around the trained network.
        inputs: of its forward, without labels.
        num_samples: S.
        seed: of the draws.
    """
    network = _Logits(posterior)
    drawn_ids = {id(parameter) for parameter in posterior.random_parameters()}
    random = {name: parameter for name, parameter in network.named_parameters() if id(parameter) in drawn_ids}
    mean = {name: parameter.detach().clone() for name, parameter in random.items()}

    def logits(weights: dict[str, Tensor]) -> Any:
        return torch.func.functional_call(network, weights, (inputs,))

    was_training = posterior.model.training
    posterior.model.eval()
    try:
        found = []
        for index in range(num_samples):
            with posterior.draw(index, seed):
                tangent = {name: parameter.detach() - mean[name] for name, parameter in random.items()}
            with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no forward-mode derivative
                value_and_change: Any = torch.func.jvp(logits, (mean,), (tangent,))
            found.append(sum(value_and_change).detach())
        return torch.stack(found)
    finally:
        posterior.model.train(was_training)


class _Logits(nn.Module):
    """From a batch, in whichever form, to the logits: `functional_call` knows Parameters by a module's names."""

    def __init__(self, posterior: LaplacePosterior) -> None:
        super().__init__()
        self.model, self.outputs_of = posterior.model, posterior.outputs_of

    def forward(self, inputs: Inputs) -> Tensor:
        return self.outputs_of(call(self.model, inputs))
