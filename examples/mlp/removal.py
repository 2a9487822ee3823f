"""How accurate a network stays when its weights go: by signal-to-noise ratio, and by size as the baseline."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bayeformers import BayesianTrainer, prune, signal_to_noise
from examples.images.classifier_evaluation import predicted, scores
from examples.images.classifier_training import make_trainer
from examples.images.data import ImageData

Remove = Callable[[nn.Module, float], nn.Module]
Curve = list[dict[str, Any]]
"""By share: "share", "accuracy", "nll", "ece" and "layers", the share that is gone from each matrix."""


@torch.no_grad()
def remove_smallest(model: nn.Module, share: float) -> nn.Module:
    """Magnitude pruning, in place: that share of all weights in matrices together, the smallest, becomes 0."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    sizes = torch.cat([matrix.abs().flatten() for matrix in matrices])
    gone = torch.zeros_like(sizes, dtype=torch.bool)
    gone[sizes.argsort(stable=True)[: round(share * len(sizes))]] = True
    for matrix, part in zip(matrices, torch.split(gone, [matrix.numel() for matrix in matrices]), strict=True):
        matrix.masked_fill_(part.view_as(matrix), 0.0)
    return model


def removal_curve(trainer: BayesianTrainer, shares: Sequence[float], data: ImageData) -> Curve:
    """Test scores of a copy that loses more and more weights; averaged over draws where there is a posterior."""
    remove: Remove = remove_smallest if trainer.posterior is None else prune
    losing, curve = make_trainer(copy.deepcopy(trainer.model), trainer.args, data), []
    for share in sorted(shares):
        model = remove(losing.model, share)
        found = scores(predicted(losing, data.test), data.test)
        kept = {name: found[name] for name in ("accuracy", "nll", "ece")}
        curve.append({"share": share, **kept, "layers": _gone(model)})
    return curve


def _gone(model: nn.Module) -> dict[str, float]:
    means = {name: value for name, value in model.named_parameters() if not name.endswith("_rho")}
    return {name: float((value == 0).float().mean()) for name, value in means.items() if value.dim() > 1}


def decibels(model: nn.Module) -> np.ndarray:
    """20 log10(|mu| / sigma) of all random weights in matrices: the axis of figure 4 of Blundell et al. 2015."""
    ratios: list[Tensor] = [ratio.flatten() for ratio in signal_to_noise(model).values() if ratio.dim() > 1]
    return 20 * torch.cat(ratios).double().clamp_min(1e-12).log10().cpu().numpy()
