"""Functions drawn from a linearised network: f(x; theta*) + J(x) (theta_s - theta*), theta_s of a Laplace posterior.

`LaplacePosterior.predict(method="glm")` gives one Gaussian per input or token, which says nothing of two of them
together. A draw here is one function for all inputs and tokens: to be drawn as a line, or to give the probability of a
whole span. Each costs one forward-mode derivative, about two to three forward passes, however many outputs there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..laplace import LaplacePosterior


def linearized_draws(
    posterior: LaplacePosterior, inputs: Mapping[str, Tensor], *, num_samples: int, seed: int = 0
) -> Tensor:
    """Logits of the linearised network at draws 0 .. S - 1 of the weights.

    The posterior's own draws: `posterior.draw(s, seed)` puts the same weights into the network itself.

    Args:
        posterior: around the trained network.
        inputs: of its forward.
        num_samples: S.
        seed: of the draws.

    Returns:
        (S, B, C), or of tokens (S, B, T, C).
    """
    model = posterior.model
    drawn_ids = {id(parameter) for parameter in posterior.random_parameters()}
    random = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in drawn_ids}
    mean = {name: parameter.detach().clone() for name, parameter in random.items()}

    def logits(weights: dict[str, Tensor]) -> Any:
        return torch.func.functional_call(model, weights, kwargs=dict(inputs)).logits

    was_training = model.training
    model.eval()
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
        model.train(was_training)
