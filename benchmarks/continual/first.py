"""The first task's posterior: means at the checkpoint, scales by the ELBO or by the Fisher information."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

from bayeformers import NormalPrior, kl_divergence, to_bayesian
from bayeformers.nn import variational_tensors
from benchmarks.real_data.data import batches

from .tasks import Tasks
from .training import Scales, random_batches, train

RHO_RATE, KL_WEIGHT = 5e-2, 1e-2
WIDTH, DELTA = 0.02, 0.05  # of the broad prior; of the scales at the start
FISHER_ROWS = 128


def first_posterior(tasks: Tasks, source: str) -> nn.Module:
    """CoLA's posterior of the layers that will train, by "elbo" or "curvature"; its head is kept as it is."""
    torch.manual_seed(tasks.seed)
    prior = NormalPrior(std=WIDTH, centre="pretrained")
    top = to_bayesian(tasks.top(), DELTA, prior=prior, exclude_modules=["classifier"], norms=True)
    if source == "curvature":
        set_scales(top, curvature_scales(fisher(tasks, tuple(t.name for t in variational_tensors(top)))))
        return top
    weight = KL_WEIGHT / len(tasks.train["A"])
    train(top, random_batches(tasks, "A"), lambda m: weight * kl_divergence(m), RHO_RATE)
    return top


@functools.cache
def fisher(tasks: Tasks, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Diagonal Fisher information per example: squared gradients of single sentences, labels drawn from the model."""
    top, generator = tasks.top(), torch.Generator().manual_seed(tasks.seed)
    leaves = [top.get_parameter(name) for name in names]
    total = [torch.zeros_like(leaf) for leaf in leaves]
    for batch in batches(tasks.train["A"][:FISHER_ROWS], tasks.tokenizer, 1):
        logits = top(tasks.inputs(batch))
        label = torch.multinomial(logits.detach().softmax(-1)[0], 1, generator=generator)
        for sum_, gradient in zip(total, torch.autograd.grad(F.cross_entropy(logits, label), leaves), strict=True):
            sum_ += gradient.square()
    return {name: sum_ / FISHER_ROWS for name, sum_ in zip(names, total, strict=True)}


def curvature_scales(information: Scales) -> dict[str, Tensor]:
    """1/sigma^2 = (1 + F / mean F) / WIDTH^2: the likelihood is tempered until data and prior weigh the same."""
    mean = torch.cat([part.flatten() for part in information.values()]).mean()
    return {name: WIDTH / (1 + part / mean).sqrt() for name, part in information.items()}


def rank_correlations(tasks: Tasks, first: nn.Module) -> dict[str, float]:
    """Of the posterior's scales with |w_A| and with the Fisher information, over every 50th weight."""
    tensors = list(variational_tensors(first))
    information = fisher(tasks, tuple(tensor.name for tensor in tensors))
    scale = torch.cat([tensor.scale().detach().flatten() for tensor in tensors])[::50]
    size = torch.cat([tensor.loc.detach().abs().flatten() for tensor in tensors])[::50]
    known = torch.cat([information[tensor.name].flatten() for tensor in tensors])[::50]
    return {f"sigma with {k}": float(spearmanr(scale, v).statistic) for k, v in (("|w|", size), ("Fisher", known))}


def set_scales(top: nn.Module, scales: Scales) -> None:
    for tensor in variational_tensors(top):
        tensor.module.set_scale(tensor.parameter_name, scales[tensor.name])
