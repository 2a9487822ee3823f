"""The second task: what may hold the encoder near the first one's weights."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from bayeformers import MopedPrior, kl_divergence, posterior_as_prior, to_bayesian
from bayeformers.distributions import Prior
from bayeformers.nn import variational_tensors

from .tasks import Tasks, Top
from .training import Penalty, Scales, pull, random_batches, train

METHODS = ("plain", "l2", "posterior", "posterior_pull", "curvature", "moped")
MOPED_DELTA = 0.1


def second_task(tasks: Tasks, first: nn.Module, method: str, kl_weight: float) -> tuple[Top, dict[str, float]]:
    """The layers trained on MRPC, with a fresh head; and how far their weights went."""
    origin = {t.name: t.loc.detach().clone() for t in variational_tensors(first)}
    scales = {t.name: t.scale().detach().clone() for t in variational_tensors(first)}
    prior: Prior = MopedPrior() if method == "moped" else posterior_as_prior(first)
    top, weight = tasks.top(), kl_weight / len(tasks.train["B"])
    torch.manual_seed(tasks.seed)
    top.classifier = nn.Linear(top.classifier.in_features, 2)
    penalty: Penalty | None = None
    if method == "l2":
        penalty = pull(origin, median(scales), weight)
    elif method == "posterior_pull":
        penalty = pull(origin, scales, weight)
    elif method != "plain":
        to_bayesian(top, MOPED_DELTA, freeze=False, prior=prior, modules_to_save=["classifier"], norms=True)
        penalty = _kl(weight)
    train(top, random_batches(tasks, "B"), penalty)
    return top, movement(top, origin, scales)


def _kl(weight: float) -> Penalty:
    return lambda top: weight * kl_divergence(top)


def movement(top: nn.Module, origin: Scales, scales: Scales) -> dict[str, float]:
    """Medians of sigma_A, of |w - w_A| and of their ratio; the root mean square of w - w_A; tenths of sigma_A."""
    named = dict(top.named_parameters())
    moved = {name: (named[name].detach() - w).abs() for name, w in origin.items()}
    flat = flatten(scales)
    return {
        "sigma": median(scales),
        "sigma 10 %": float(np.quantile(flat, 0.1)),
        "sigma 90 %": float(np.quantile(flat, 0.9)),
        "moved": median(moved),
        "moved rms": float(np.sqrt(np.square(flatten(moved)).mean())),
        "moved / sigma": median({name: moved[name] / scales[name] for name in origin}),
    }


def flatten(tensors: Scales) -> np.ndarray:
    return np.concatenate([np.asarray(tensor).ravel() for tensor in tensors.values()])


def median(tensors: Scales) -> float:
    return float(np.median(flatten(tensors)))
